"""The files of one search, which are made on the driver and shipped to the workers."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyspark import SparkFiles
from pyspark.sql import SparkSession

from imagevec.errors import ImageVecError
from imagevec.files import PREFIX, digest_of
from imagevec.spark.sessions import is_connect
from imagevec.spark.ship import ship_file

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_IN_JAVA = ("No space left on device", "Disk quota exceeded")


@dataclass
class Workspace:
    """A folder of one search, so that two searches never write to the same file.

    Attributes:
        session: The session of the search.
        folder: The folder for new files. It is deleted at the end of the search's call.
        served: The folder of shipped files, by name. On a classic session it is the one of
            ``SparkFiles`` on the driver: Spark makes no second copy of a file that is already
            there, and deletes it when its context stops. A result may be computed until then, and
            any executor that starts fetches all files.
        needed_bytes: The disk space that the search needs on the driver, as far as is known.
    """

    session: SparkSession
    folder: Path
    served: Path
    needed_bytes: int = 0

    def ship(self, path: Path, digest: str | None = None) -> str:
        """Ships a file of the folder, and returns its name, which depends on its content.

        Args:
            path: The file, which is moved.
            digest: The SHA-256 of the file, if it is known.
        """
        name = f"{PREFIX}{digest or digest_of(path)}{path.suffix}"
        path.replace(self.path(name))  # atomic: another search may use the same file
        ship_file(self.session, self.path(name))
        return name

    def path(self, name: str) -> Path:
        """Returns the path of a shipped file on the driver."""
        return self.served / name


@contextlib.contextmanager
def workspace(session: SparkSession) -> Iterator[Workspace]:
    """Yields the workspace of one search.

    Raises:
        ImageVecError: A disk is full. The message names the folder and the setting that moves it.
    """
    served = None if is_connect(session) else Path(SparkFiles.getRootDirectory())
    space = None
    try:
        with tempfile.TemporaryDirectory(prefix="imagevec-search-", dir=served) as name:
            space = Workspace(session, Path(name), served or Path(name))
            yield space
    except (OSError, ImageVecError) as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        if not full and not any(text in str(error) for text in _FULL_IN_JAVA):
            raise
        folder = served or Path(tempfile.gettempdir())
        setting = "spark.local.dir" if served else "the environment variable TMPDIR"
        needed = f"{space.needed_bytes:,} bytes" if space and space.needed_bytes else "more space"
        where = f"the disk of {folder}" if full else "the disk of a temporary folder of Spark"
        raise ImageVecError(
            f"{where} is full: the search needs {needed} in {folder}; "
            f"set {setting} to a folder on a larger disk ({error})"
        ) from error
