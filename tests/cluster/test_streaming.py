"""A stream of files that arrive in waves, through a query that is killed between them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.clusters import kill_tree, session_of
from tests.helpers.factories import tiny
from tests.helpers.images import encode, photo
from tests.helpers.pipeline import vector_of

WAIT_SECONDS = 180


@contextmanager
def streaming(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process of the query; it is killed with all that it started."""
    command = [sys.executable, "-m", "tests.cluster.streaming_job", *arguments]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        kill_tree(process)


def wave(source: Path, number: int) -> dict[str, bytes]:
    """Four images and a file that is none."""
    files = {f"{number}-{i}.png": encode(photo(seed=10 * number + i)) for i in range(4)}
    files[f"{number}-bad.png"] = b"no image"
    for name, content in files.items():
        part = source.parent / name
        part.write_bytes(content)
        part.rename(source / name)  # at once: a stream takes files as it finds them
    return files


def committed(sink: Path) -> int:
    log = sink / "_spark_metadata"
    return len([file for file in log.glob("*") if file.name[0].isdigit()]) if log.exists() else 0


def test_every_file_comes_out_once(tmp_path: Path) -> None:
    source, sink, checkpoint = (tmp_path / name for name in ("source", "sink", "checkpoint"))
    source.mkdir()
    files: dict[str, bytes] = {}
    for number in (1, 2):
        files |= wave(source, number)
        before = committed(sink)
        with streaming(str(source), str(sink), str(checkpoint)) as process:
            deadline = time.monotonic() + WAIT_SECONDS
            while committed(sink) == before and time.monotonic() < deadline:
                assert process.poll() is None, "the query ended"
                time.sleep(0.05)
            assert committed(sink) > before
        # Killed after a batch, before or in the middle of the next ones.
    files |= wave(source, 3)
    with streaming(str(source), str(sink), str(checkpoint), "once") as process:
        assert process.wait(WAIT_SECONDS) == 0

    with session_of("local[2]") as spark:
        rows = spark.read.parquet(str(sink)).collect()
    by_name = {Path(row.path).name: row for row in rows}
    assert len(rows) == len(files) == 15
    assert set(by_name) == set(files)
    for name, content in files.items():
        if name.endswith("bad.png"):
            assert by_name[name].features is None
            assert by_name[name].error.startswith("unsupported_format")
        else:
            expected = vector_of(content, model=tiny, weights="random")
            assert by_name[name].features == pytest.approx(expected, rel=1e-4, abs=1e-6)
