from __future__ import annotations

import errno
from pathlib import Path

import pytest
from pyspark import SparkFiles
from pyspark.sql import SparkSession

from imagevec import ImageVecError
from imagevec.search.workspace import workspace


def test_shipped_files_outlive_the_folder(spark: SparkSession) -> None:
    with workspace(spark) as space:
        (space.folder / "a.txt").write_text("one")
        (space.folder / "b.txt").write_text("one")
        name = space.ship(space.folder / "a.txt")
        assert space.ship(space.folder / "b.txt") == name  # the same content
        (space.folder / "rest").write_text("two")
    assert not space.folder.exists()
    assert space.path(name).read_text() == "one"
    read = spark.sparkContext.range(2).map(lambda _: Path(SparkFiles.get(name)).read_text())
    assert read.collect() == ["one", "one"]


@pytest.mark.parametrize(
    ("error", "disk"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk of {}"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk of {}"),
        (
            ImageVecError("java.io.IOException: No space left on device"),
            "the disk of a temporary folder of Spark",
        ),
    ],
)
def test_full_disk(spark: SparkSession, error: Exception, disk: str) -> None:
    root = SparkFiles.getRootDirectory()
    with pytest.raises(ImageVecError) as raised, workspace(spark) as space:
        space.needed_bytes = 8_000_000
        raise error
    message = str(raised.value)
    assert message.startswith(f"{disk.format(root)} is full: the search needs 8,000,000 bytes in")
    assert "set spark.local.dir to a folder on a larger disk" in message
    assert message.endswith(f"({error})")


def test_other_errors_are_raised_unchanged(spark: SparkSession) -> None:
    for error in (PermissionError(errno.EACCES, "no"), ImageVecError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, workspace(spark) as space:
            raise error
        assert raised.value is error
        assert not space.folder.exists()
