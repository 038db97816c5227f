"""Hadoop's file systems, local ones and object stores alike: the one place that asks the JVM."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from pyspark.sql import SparkSession

from imagevec.errors import ImageVecError, WeightsError
from imagevec.spark.sessions import is_connect


def check_has_jvm(session: SparkSession) -> None:
    """Raises ``ImageVecError`` under Spark Connect."""
    if is_connect(session):
        raise ImageVecError(
            "Spark Connect has no access to Hadoop's file systems: save and load a featurizer "
            "with weights or a saved model of its own in a classic session"
        )


def upload(session: SparkSession, file: Path, target: str) -> None:
    """Copies a local file to a path or URI."""
    _copy(session, f"file://{file.resolve()}", target)


def download(session: SparkSession, source: str, file: Path) -> None:
    """Copies what is at a path or URI to a local file.

    Raises:
        WeightsError: There is no such file.
    """
    _copy(session, source, f"file://{file}")


def _copy(session: SparkSession, source: str, target: str) -> None:
    check_has_jvm(session)
    fs = cast(Any, session)._jvm.org.apache.hadoop.fs
    conf = cast(Any, session)._jsparkSession.sessionState().newHadoopConf()
    # Hadoop's own checksums are hidden files beside local ones: ours go along with the file.
    conf.set("fs.file.impl", "org.apache.hadoop.fs.RawLocalFileSystem")
    conf.set("fs.file.impl.disable.cache", "true")
    source_path, target_path = fs.Path(source), fs.Path(target)
    source_fs, target_fs = source_path.getFileSystem(conf), target_path.getFileSystem(conf)
    if not source_fs.exists(source_path):
        raise WeightsError(f"{source} is not there")
    fs.FileUtil.copy(source_fs, source_path, target_fs, target_path, False, True, conf)


class Folder:
    """A folder at a path or URI, which need not exist."""

    def __init__(self, session: SparkSession, path: str) -> None:
        check_has_jvm(session)
        self.path = path.rstrip("/")
        self._jvm: Any = cast(Any, session)._jvm
        self._conf = cast(Any, session)._jsc.hadoopConfiguration()
        self._fs = self._path(self.path).getFileSystem(self._conf)

    def names(self, folder: str = "") -> list[str]:
        """What is in it, or in a folder of it; nothing where it does not exist."""
        path = self._path(f"{self.path}/{folder}")
        if not self._fs.exists(path):
            return []
        return [status.getPath().getName() for status in self._fs.listStatus(path)]

    def delete(self, path: str | None = None) -> None:
        """Deletes it, or one file or folder, with all that is in it."""
        self._fs.delete(self._path(path or self.path), True)

    def move(self, source: str, target: str) -> None:
        """Renames a file."""
        self._fs.rename(self._path(source), self._path(target))

    def lies_in(self, other: str) -> bool:
        """Whether it is another folder, or in it."""
        here, there = (
            path.getFileSystem(self._conf).makeQualified(path).toString()
            for path in (self._path(self.path), self._path(other))
        )
        return f"{here}/".startswith(f"{there.rstrip('/')}/")

    def _path(self, path: str) -> Any:
        return self._jvm.org.apache.hadoop.fs.Path(path)
