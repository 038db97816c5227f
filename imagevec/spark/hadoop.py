"""Hadoop's file systems, local ones and object stores alike: the one place that asks the JVM."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, cast

from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from imagevec.errors import ImageVecError, WeightsError
from imagevec.spark.sessions import is_connect


def check_has_jvm(session: SparkSession) -> None:
    """Raises ``ImageVecError`` under Spark Connect."""
    if is_connect(session):
        raise ImageVecError(
            "Spark Connect has no access to Hadoop's file systems: extract, and save and load a "
            "featurizer with weights or a saved model of its own, in a classic session"
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
        conf = cast(Any, session)._jsparkSession.sessionState().newHadoopConf()
        self._fs = self._path(self.path).getFileSystem(conf)
        # Local files, without the checksums that a reader could find out of step.
        conf.set("fs.file.impl", "org.apache.hadoop.fs.RawLocalFileSystem")
        conf.set("fs.file.impl.disable.cache", "true")
        self._raw = self._path(self.path).getFileSystem(conf)

    def names(self, folder: str = "") -> list[str]:
        """What is in it, or in a folder of it; nothing where it does not exist."""
        path = self._path(f"{self.path}/{folder}")
        if not self._fs.exists(path):
            return []
        return [status.getPath().getName() for status in self._fs.listStatus(path)]

    def delete(self, path: str) -> None:
        """Deletes a file or a folder with all that is in it, if it is there."""
        self._fs.delete(self._path(path), True)

    def delete_if_empty(self, path: str) -> None:
        """Deletes a folder that holds nothing."""
        with contextlib.suppress(Py4JJavaError):  # it does hold something
            self._raw.delete(self._path(path), False)

    def move(self, source: str, target: str) -> None:
        """Renames a file. Where the target is there, an earlier move was cut off: it is kept."""
        source_path, target_path = self._path(source), self._path(target)
        if self._fs.exists(target_path):
            self._fs.delete(source_path, True)
            return
        self._fs.mkdirs(target_path.getParent())
        if not self._fs.rename(source_path, target_path):
            raise ImageVecError(f"{source} could not be moved to {target}")

    def read_text(self, path: str) -> str | None:
        """What is in a small file; ``None`` if it is not there."""
        place = self._path(path)
        if not self._raw.exists(place):
            return None
        stream = self._raw.open(place)
        try:
            return str(self._jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))
        finally:
            stream.close()

    def write_text(self, path: str, text: str, overwrite: bool = True) -> bool:
        """Writes a small file; says no where it is there and is not to be overwritten."""
        place = self._path(path)
        self._raw.mkdirs(place.getParent())
        if not overwrite and not self._raw.createNewFile(place):
            return False
        stream = self._raw.create(place, True)
        stream.write(bytearray(text.encode()))
        stream.close()
        return True

    def jvm_process(self) -> int:
        """The id of the driver's JVM."""
        return int(self._jvm.java.lang.ProcessHandle.current().pid())

    def _path(self, path: str) -> Any:
        return self._jvm.org.apache.hadoop.fs.Path(path)
