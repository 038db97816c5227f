"""Hadoop file systems, local and remote: the only module that calls them through the JVM."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any, cast

from py4j.protocol import Py4JJavaError
from pyspark.errors import IllegalArgumentException
from pyspark.sql import SparkSession

from imagevec.errors import ImageVecError, OptionError, WeightsError
from imagevec.spark.sessions import is_connect
from imagevec.storage.location import Location

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:/")


def check_has_jvm(session: SparkSession) -> None:
    """Raises ``ImageVecError`` under Spark Connect."""
    if is_connect(session):
        raise ImageVecError(
            "Spark Connect cannot access Hadoop file systems: use a classic session for extract, "
            "and to save or load a featurizer with custom weights or a saved model"
        )


def hadoop_path(session: SparkSession, path: str) -> str:
    """Returns a path or URI as the JVM must get it: a local path becomes absolute.

    The JVM does not notice ``os.chdir``, so that relative paths are resolved here, once.

    Raises:
        OptionError: The JVM cannot name the path: in the locale C, it writes ``?`` for ``é``.
    """
    jvm = cast(Any, session)._jvm
    uri = _URI.match(path)
    default = jvm.org.apache.hadoop.fs.FileSystem.getDefaultUri(
        cast(Any, session)._jsparkSession.sessionState().newHadoopConf()
    )
    if (uri[0] if uri else f"{default.getScheme()}:/") != "file:/":
        return path
    local = path if uri else str(Location.of(path))
    try:
        jvm.java.io.File(local).toPath()
    except IllegalArgumentException as error:
        encoding = jvm.java.lang.System.getProperty("sun.jnu.encoding")
        raise OptionError(
            f"{path!r} has letters that Java cannot write in the encoding {encoding}: set the "
            "environment variable LC_ALL=C.UTF-8 before Spark starts"
        ) from error
    return local


def upload(session: SparkSession, file: Path, target: str) -> None:
    """Copies a local file to a path or URI."""
    _copy(session, f"file://{file.resolve()}", target)


def download(session: SparkSession, source: str, file: Path) -> None:
    """Copies a file at a path or URI to a local file.

    Raises:
        WeightsError: The file does not exist.
    """
    _copy(session, source, f"file://{file}")


def _copy(session: SparkSession, source: str, target: str) -> None:
    check_has_jvm(session)
    fs = cast(Any, session)._jvm.org.apache.hadoop.fs
    conf = cast(Any, session)._jsparkSession.sessionState().newHadoopConf()
    # No hidden checksum files of Hadoop next to local files: digests are in the files' names.
    conf.set("fs.file.impl", "org.apache.hadoop.fs.RawLocalFileSystem")
    conf.set("fs.file.impl.disable.cache", "true")
    source_path, target_path = fs.Path(source), fs.Path(target)
    source_fs, target_fs = source_path.getFileSystem(conf), target_path.getFileSystem(conf)
    if not source_fs.exists(source_path):
        raise WeightsError(f"{source} does not exist")
    fs.FileUtil.copy(source_fs, source_path, target_fs, target_path, False, True, conf)


class Folder:
    """A folder at a path or URI. It need not exist."""

    def __init__(self, session: SparkSession, path: str) -> None:
        check_has_jvm(session)
        self.path = hadoop_path(session, path).rstrip("/")
        self._jvm: Any = cast(Any, session)._jvm
        conf = cast(Any, session)._jsparkSession.sessionState().newHadoopConf()
        self._fs = self._path(self.path).getFileSystem(conf)
        # Local files without checksum files, which a reader could find out of date.
        conf.set("fs.file.impl", "org.apache.hadoop.fs.RawLocalFileSystem")
        conf.set("fs.file.impl.disable.cache", "true")
        self._raw = self._path(self.path).getFileSystem(conf)

    def names(self, folder: str = "", only_files: bool = False) -> list[str]:
        """Returns the names in the folder, or in a subfolder; empty if it does not exist."""
        path = self._path(f"{self.path}/{folder}")
        if not self._fs.exists(path):
            return []
        found = self._fs.listStatus(path)
        return [one.getPath().getName() for one in found if one.isFile() or not only_files]

    def delete(self, path: str) -> None:
        """Deletes a file, or a folder and its contents, if it exists."""
        self._fs.delete(self._path(path), True)

    def delete_if_empty(self, path: str) -> None:
        """Deletes a folder if it is empty."""
        with contextlib.suppress(Py4JJavaError):  # it is not empty
            self._raw.delete(self._path(path), False)

    def move(self, source: str, target: str) -> None:
        """Renames a file. An existing target is kept: an earlier move was interrupted."""
        source_path, target_path = self._path(source), self._path(target)
        if self._fs.exists(target_path):
            self._fs.delete(source_path, True)
            return
        self._fs.mkdirs(target_path.getParent())
        if not self._fs.rename(source_path, target_path):
            raise ImageVecError(f"{source} could not be moved to {target}")

    def read_text(self, path: str) -> str | None:
        """Returns the text of a small file; ``None`` if it does not exist."""
        place = self._path(path)
        if not self._raw.exists(place):
            return None
        stream = self._raw.open(place)
        try:
            return str(self._jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))
        finally:
            stream.close()

    def write_text(self, path: str, text: str, overwrite: bool = True) -> bool:
        """Writes a small file. Returns ``False`` if it exists and may not be overwritten."""
        place = self._path(path)
        self._raw.mkdirs(place.getParent())
        if not overwrite and not self._raw.createNewFile(place):
            return False
        stream = self._raw.create(place, True)
        stream.write(bytearray(text.encode()))
        stream.close()
        return True

    def jvm_process(self) -> int:
        """Returns the process ID of the driver's JVM."""
        return int(self._jvm.java.lang.ProcessHandle.current().pid())

    def _path(self, path: str) -> Any:
        return self._jvm.org.apache.hadoop.fs.Path(path)
