"""WebDataset: tar files whose members ``<key>.<extension>`` form samples.

    spark.dataSource.register(WebDatasetSource)  # Spark 4
    spark.read.format("webdataset").option("members", "json,cls").load("shards/")
    WebDatasetSource.read(spark, "shards/", members=("json", "cls"))  # Spark 3.5 and 4

``schema`` defines the columns. Each partition reads one shard from start to end, and holds a few
samples at a time. Shards are untrusted: members and headers have a maximum size, and what a header
says is never allocated before it is checked.
"""

from __future__ import annotations

import functools
import gzip
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from imagevec.errors import ImageError, OptionError, ReadError
from imagevec.images.formats import TABLE
from imagevec.options import DEFAULTS
from imagevec.storage.listing import Listed, check_exists, list_files
from imagevec.storage.location import Location
from imagevec.storage.opened import open_file

try:
    from pyspark.sql.datasource import DataSource, DataSourceReader, InputPartition
except ImportError:  # Spark 3.5 has no data sources in Python
    DataSource = DataSourceReader = object  # type: ignore[assignment, misc]
    InputPartition = None  # type: ignore[assignment, misc]

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

SHARDS = "*.{tar,tar.gz,tgz}"
IMAGE_EXTENSIONS = tuple(
    suffix.removeprefix(".") for format in TABLE if format.decoder for suffix in format.suffixes
)

# WebDataset's own rule: a sample's key ends at the first dot of the file's name.
_MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
_BATCH_ROWS = 64
_BATCH_BYTES = 8 << 20
_TAR_BLOCK = 512
_MAX_HEADER_BYTES = 256 << 10  # of one member: its long name, pax fields and map of holes
_MAX_MEMBER_BYTES = 1 << 40  # a file cannot be sought at any offset

_Content = Callable[[], bytes | None]


class WebDatasetSource(DataSource):
    """The Spark data source ``webdataset``.

    Options:
        path: A shard (``.tar``, ``.tar.gz``, ``.tgz``), or a folder or glob of shards: a path or
            URI that the workers can read.
        members: Comma-separated extensions whose members become text columns: ``"json,txt,cls"``.
        recursive: ``"true"`` to include subfolders.

    Columns:
        - ``__key__`` string: the sample's key. Null in a row that reports a damaged shard.
        - ``__url__`` string: the shard.
        - ``image`` binary: the first member with an image extension; null if there is none.
        - ``error`` string: why the shard could not be read to its end, in a row without a key.
          Samples before the damage have rows. In a row with a key: why a member was not read.
        - one string column for each of ``members``; null if a sample has no such member.
    """

    @classmethod
    def name(cls) -> str:
        return "webdataset"

    def schema(self) -> str:
        return schema(self._members())

    def reader(self, schema: Any) -> DataSourceReader:
        src = self.options.get("path", "")
        recursive = self.options.get("recursive", "false").lower() == "true"
        return _Reader(shards(src, recursive), self._members())

    def _members(self) -> tuple[str, ...]:
        names = self.options.get("members", "").split(",")
        return tuple(name.strip() for name in names if name.strip())

    @staticmethod
    def read(
        spark: SparkSession, src: str, *, members: Sequence[str] = (), recursive: bool = False
    ) -> DataFrame:
        """Returns the same rows as a data frame, also on Spark 3.5.

        Raises:
            OptionError: The source has no shards.
        """
        return read_shards(spark, shards(src, recursive), tuple(members))


class _Reader(DataSourceReader):
    def __init__(self, found: list[Listed], members: tuple[str, ...]) -> None:
        self._paths = [shard.path for shard in found]
        self._members = members

    def partitions(self) -> Sequence[InputPartition]:
        return [InputPartition(path) for path in self._paths]

    def read(self, partition: InputPartition) -> Iterator[pa.RecordBatch]:
        return batches(partition.value, self._members)


def shards(
    src: str, recursive: bool = False, timeout_seconds: float = DEFAULTS["read_timeout_seconds"]
) -> list[Listed]:
    """Returns the shards of a source, sorted by path.

    Raises:
        OptionError: The source does not exist, or has no shards.
        ReadError: The source cannot be listed within the timeout.
    """
    if not src:
        raise OptionError("webdataset needs a path: .load('shards/')")
    check_exists(src, timeout_seconds)
    listed = list_files(src, recursive=recursive, pattern=SHARDS, timeout_seconds=timeout_seconds)
    found = sorted(file for file in listed if file.skipped is None)
    if not found:
        raise OptionError(f"{src} has no shards: their names must end in .tar, .tar.gz or .tgz")
    return found


def schema(members: Sequence[str] = ()) -> str:
    """Returns the schema of the rows, as a DDL string."""
    columns = ["__key__ string", "__url__ string", "image binary", "error string"]
    return ", ".join(columns + [f"`{name}` string" for name in members])


def read_shards(
    spark: SparkSession,
    found: list[Listed],
    members: tuple[str, ...] = (),
    images: bool = True,
    timeout_seconds: float = DEFAULTS["read_timeout_seconds"],
    max_bytes: int = DEFAULTS["max_bytes"],
) -> DataFrame:
    """Returns the rows of some shards. If ``images`` is false, images are null and are not read."""
    paths = [shard.path for shard in found]

    def rows(frames: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for frame in frames:
            for number in frame.column(0).to_pylist():
                yield from batches(paths[number], members, images, timeout_seconds, max_bytes)

    # Each partition has one number, that of its shard.
    numbers = spark.range(0, len(paths), 1, len(paths))
    return numbers.mapInArrow(rows, schema(members))


def batches(
    shard: str,
    members: tuple[str, ...] = (),
    images: bool = True,
    timeout_seconds: float = DEFAULTS["read_timeout_seconds"],
    max_bytes: int = DEFAULTS["max_bytes"],
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of one shard, a few at a time. Larger members than ``max_bytes`` are errors.

    Raises:
        ReadError: The shard cannot be opened, or the store fails while it is read.
    """
    arrow = pa.schema(
        [("__key__", pa.string()), ("__url__", pa.string()), ("image", pa.binary())]
        + [("error", pa.string()), *((name, pa.string()) for name in members)]
    )
    rows: list[dict[str, Any]] = []
    size = 0
    for row in _rows(shard, members, images, timeout_seconds, max_bytes):
        rows.append(row)
        size += sum(map(len, filter(None, row.values())))
        if len(rows) == _BATCH_ROWS or size >= _BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(rows, schema=arrow)
            rows, size = [], 0
    if rows:
        yield pa.RecordBatch.from_pylist(rows, schema=arrow)


def _rows(
    shard: str, members: tuple[str, ...], images: bool, timeout_seconds: float, max_bytes: int
) -> Iterator[dict[str, Any]]:
    count = 0
    try:
        location = Location.parse(shard)
        with open_file(location, timeout_seconds) as file:
            for row in _samples(_members_of(file, members, images, max_bytes), members):
                count += 1
                row["__url__"] = shard
                yield row if images and "error" not in row else {**row, "image": None}
    # These errors mean that the bytes are not a complete tar file.
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        reason = f"corrupt: {shard} is damaged after {count} samples: {error}"
        yield {"__url__": shard, "error": reason}
    except OSError as error:
        raise ReadError(f"{shard} cannot be read: {error}") from error


def _samples(
    found: Iterable[tuple[str, str, _Content]], members: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    row: dict[str, Any] = {}
    for key, extension, content in found:
        if row.get("__key__") != key:
            if row:
                yield row
            row = {"__key__": key}
        try:
            data = content()  # after the previous sample was yielded: this one may be truncated
        except ImageError as error:
            row["error"], data = str(error), None
        if extension in members and data is not None:
            row[extension] = data.decode("utf-8", "replace")
        if extension in IMAGE_EXTENSIONS:
            row.setdefault("image", data)
    if row:
        yield row


def _members_of(
    file: Any, members: tuple[str, ...], images: bool, max_bytes: int
) -> Iterator[tuple[str, str, _Content]]:
    """Yields each member's key, extension and content, which is ``None`` unless it is needed."""
    start = file.read(2)
    file.seek(0)
    is_gzip = start == b"\x1f\x8b"
    stream = _Stream(gzip.GzipFile(fileobj=file) if is_gzip else file)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:  # type: ignore[call-overload]
            for member in tar:
                if not 0 <= tar.offset - stream.tell() <= _MAX_MEMBER_BYTES:
                    raise tarfile.ReadError(f"the size of {member.name} is impossible")
                stream.header_bytes = 0
                match = _MEMBER.fullmatch(member.name)
                if match and member.isfile() and not match[1].rpartition("/")[2].startswith("__"):
                    extension = match[2].lower()
                    # A gzip file is read completely anyway, and where a truncated one fails depends
                    # on how it is read.
                    is_image = extension in IMAGE_EXTENSIONS
                    reads = extension in members or (is_image and (images or is_gzip))
                    content = functools.partial(_content, stream, member, reads, max_bytes)
                    yield match[1], extension, content if reads or is_image else lambda: None
                # Else tarfile keeps all of them.
                tar.members.clear()
                tar.pax_headers.clear()
    except OSError:  # the store's
        raise
    except (RecursionError, OverflowError, ValueError, LookupError) as error:
        # tarfile raises them for headers that make no sense.
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error
    if stream.last != b"\0" * _TAR_BLOCK:
        raise tarfile.ReadError("the end-of-archive marker is missing")


def _content(stream: _Stream, member: tarfile.TarInfo, reads: bool, max_bytes: int) -> bytes | None:
    """Returns the content of the current member, or ``None`` unless it is read.

    Raises:
        ImageError: The member is too large, or sparse.
    """
    if member.size > max_bytes:
        detail = f"{member.name} has {member.size} bytes, max_bytes={max_bytes}"
        raise ImageError("too_large", detail)
    if member.issparse():  # a few bytes may become any number of zeros
        raise ImageError("unsupported_format", f"{member.name} is sparse")
    return stream.content(member.size) if reads else None


class _Stream:
    """A file for tarfile, which reads headers from it, and for the contents of members.

    Attributes:
        last: The last read, a block of zeros at the end of a complete tar file.
        header_bytes: The length of the headers that were read since this was set to 0.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell
        self.last = b""
        self.header_bytes = 0

    def read(self, size: int) -> bytes:
        self.header_bytes += size
        if self.header_bytes > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of more than {_MAX_HEADER_BYTES} bytes")
        self.last = self._file.read(size)
        return self.last

    def content(self, size: int) -> bytes:
        data: bytes = self._file.read(size)
        if len(data) < size:
            raise tarfile.ReadError("unexpected end of data")
        return data
