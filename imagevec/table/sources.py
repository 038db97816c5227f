"""What ``extract`` reads: image files, or a table with a column of images."""

from __future__ import annotations

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from imagevec.errors import OptionError, did_you_mean


class FileSource:
    """Image files."""

    def __init__(
        self, spark: SparkSession, src: str, *, recursive: bool, pattern: str | None
    ) -> None:
        self._reader = spark.read.format("binaryFile")
        self._src = src
        self._listing = {"recursiveFileLookup": str(recursive).lower()}
        if pattern:
            self._listing["pathGlobFilter"] = pattern

    def listed(self) -> DataFrame:
        """``path``, ``length`` and ``modificationTime``; no file is opened."""
        files = self._reader.options(**self._listing).load(self._src)
        return files.select("path", "length", "modificationTime")

    def of(self, paths: list[str]) -> DataFrame:
        """The same with ``content``, of some of the paths."""
        return self._reader.load([escaped(path) for path in paths])


class TableSource:
    """The rows of a table with a column of image bytes; their ``modificationTime`` is null."""

    def __init__(
        self, spark: SparkSession, src: str, *, column: str, key: str, format: str
    ) -> None:
        table = spark.read.format(format).load(src)
        for name in (column, key):
            if name not in table.columns:
                raise OptionError(
                    f"{src} has no column {name!r}: {did_you_mean(name, table.columns)}"
                )
        self._spark = spark
        self._rows = table.select(
            F.col(key).cast("string").alias("path"),
            F.octet_length(column).cast("long").alias("length"),
            F.lit(None).cast("timestamp").alias("modificationTime"),
            F.col(column).alias("content"),
        )

    def listed(self) -> DataFrame:
        return self._rows.drop("content")

    def of(self, paths: list[str]) -> DataFrame:
        keys = self._spark.createDataFrame([(path,) for path in paths], "path string")
        return self._rows.join(F.broadcast(keys), "path", "left_semi")


def escaped(path: str) -> str:
    """A path that Hadoop would else take for a glob."""
    return "".join(f"\\{letter}" if letter in "{}[]*?\\" else letter for letter in path)
