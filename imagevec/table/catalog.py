"""A table of the catalog, such as Delta or Iceberg, and a second one for bad images and nulls.

    <name>                  features
    <name>_errors           bad images and nulls, with the same columns; created with the first one
    STAGING/<folder>/       exists during a run, or after a run was killed
        epochs/             which run may publish: see ``imagevec.table.fence``
        runs/<run>/         parts that tasks have written: see ``imagevec.table.parts``
        done/<run>/         parts that are in the table, until the run ends
        replacement/        a table in a folder, which replaces this one at the end of a run
        replacing           its files, while it does

The driver publishes a wave of parts with one ``MERGE`` for each of the two tables: it inserts new
keys, updates changed ones, and deletes those that are now in the other table. Merging the same wave
again changes nothing. So the parts of a driver that was killed are merged again by the next run.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from functools import partial, reduce

import pyarrow as pa
from pyarrow import parquet
from pyspark.sql import Column, DataFrame, DataFrameWriterV2, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    ByteType,
    DataType,
    IntegerType,
    MapType,
    ShortType,
    StructField,
    StructType,
)

from imagevec.errors import ImageVecError, OptionError
from imagevec.spark.sessions import cause_of, quoted, setting, spark_path
from imagevec.spec import FeatureSpec, metadata_of_json, own_metadata
from imagevec.storage.folder import Folder
from imagevec.storage.listing import escaped
from imagevec.table.dest import check_fits, known_keys, result_schema
from imagevec.table.folder import FolderTable
from imagevec.table.parts import ERRORS, FEATURES, Part
from imagevec.table.provenance import Provenance
from imagevec.table.publish import Fencing, Publisher
from imagevec.table.schema import OWN_PREFIX, has_boxes

PROPERTY = "imagevec.features"
"""The table property with the provenance of the features, as JSON."""

_OF_RUNS = ("runs", "done", "listing", "pending")
_DELETED = f"{OWN_PREFIX}deleted"
_REPLACEMENT = "replacement"
_REPLACING = "replacing"
_PROBE = "probe.parquet"
_EMPTY = StructType().add("path", "string")  # no table of features has so few columns
_RETRY_SECONDS = 300.0
_LONGEST_PAUSE_SECONDS = 15.0
# What Delta and Iceberg raise, and Spark at a creation, if another writer has committed in between.
_CONFLICT = re.compile(
    r"io\.delta\.exceptions\.(Concurrent|MetadataChanged|ProtocolChanged)"
    r"|org\.apache\.iceberg\.exceptions\.(ValidationException|CommitFailed|CommitStateUnknown)"
    r"|\[TABLE_OR_VIEW_ALREADY_EXISTS\]"
)
_PART = r"`(?:[^`]|``)+`|[^`./\s]+"
_NAME = re.compile(rf"(?:{_PART})(?:\.(?:{_PART}))*")


class CatalogTable:
    """The features in a table of the catalog, and the errors in another.

    Args:
        spark: The session.
        name: The name of the table, as in SQL: up to three or more parts, in backticks if need be.
        staging: A folder that the workers can write.

    Raises:
        OptionError: The name is malformed.
    """

    wave_seconds = 60.0
    """The time between two publications, each of which is a commit."""

    def __init__(self, spark: SparkSession, name: str, staging: Folder) -> None:
        self._spark = spark
        self.path = name
        parts = _parts_of(name)
        errors = [*parts[:-1], f"{parts[-1]}_errors"]
        self._names = {FEATURES: _quoted(parts), ERRORS: _quoted(errors)}
        self.work = staging.sub(_folder_name(spark, parts))

    def run_folder(self, run: str) -> Folder:
        return self.work.sub(f"runs/{run}")

    def published_folders(self, run: str) -> tuple[Folder, ...]:
        return (self.work.sub(f"done/{run}"),)

    def check_is_table(self) -> None:
        """Raises ``OptionError`` if a table is another one, or has no MERGE."""
        if self._exists(FEATURES) and not self._has_merge():
            raise OptionError(f"{self.path} is a table of {self._provider()}, {_NO_MERGE}")
        for kind in self._kinds():
            if PROPERTY not in self._properties(kind):
                name = self.path if kind == FEATURES else self._names[kind]
                raise OptionError(f"{name} exists and has no features: choose another DEST")

    def check_is_features(self) -> None:
        """Raises an error if the table contains no features that this version can read."""
        self._prepare()
        if self._exists(FEATURES):
            self._provenance()
        else:
            self._create_with_merge(self._empty(_EMPTY))
            self._drop()

    def check(self, spec: FeatureSpec, columns: Sequence[str], kept: StructType) -> None:
        """Creates the table, or raises an error if it has another fingerprint, or other columns.

        ``kept`` has the types of those columns that imagevec does not define.
        """
        self._prepare()
        if not self._exists(FEATURES):
            self._create_with_merge(self._empty(_schema(spec, columns, kept)))
        there = self._table(FEATURES).schema
        check_fits(self.path, there, self._provenance(), spec, columns, _as_stored(kept, there))

    def _prepare(self) -> None:
        """Raises ``OptionError`` if Spark cannot read the staging folder.

        Drops the empty table of a run that was killed while it looked whether a new one has MERGE.
        """
        if self._exists(FEATURES) and self._table(FEATURES).columns == _EMPTY.names:
            self._drop()  # check_is_table has found its property
        self.work.write(_PROBE, _parquet_of_nothing())
        try:
            self._spark.read.parquet(escaped(spark_path(self.work.sub(_PROBE).location))).head(1)
        except Exception as error:  # of Hadoop's connectors, of any class
            raise OptionError(
                f"Spark cannot read the files in staging, {self.work.path}, which MERGE requires: "
                f"{cause_of(error)}"
            ) from error
        finally:
            self.work.delete(_PROBE)

    def known(self, retried: Sequence[str] = (), by_box: bool = False) -> DataFrame | None:
        tables = [self._table(kind) for kind in self._kinds()]
        filled = [table for table in tables if table.select("path").head(1)]
        return known_keys(filled, retried, by_box)

    def keys_among(self, parts: list[Part], run: str) -> set[str]:
        """Returns no keys: MERGE leaves those alone that the table has in the same version."""
        return set()

    def publish(self, parts: list[Part], run: str) -> None:
        """Merges parts of a run into both tables, and removes them from its folder."""
        staged = {kind: [part for part in parts if part.kind == kind] for kind in self._names}
        if staged[ERRORS]:
            self._create(ERRORS, self._empty(self._table(FEATURES).schema))
        for kind in self._kinds():
            self._retried(partial(self._merge, kind, staged, run))
        for part in parts:
            self.work.move(f"runs/{run}/{part.name}", f"done/{run}/{part.name}")

    def finish(self, run: str, outdated: Sequence[str], check: Callable[[], None]) -> None:
        """Removes the rows of outdated paths. Those of changed images are replaced already."""
        if outdated:
            check()
            rows = [(path,) for path in outdated]
            paths = self._spark.createDataFrame(rows, "path string").distinct()
            for kind in self._kinds():
                self._retried(partial(self._remove, kind, paths, run))

    def recover(self, fence: Fencing, run: str) -> None:
        dead = {name for folder in _OF_RUNS for name in self.work.names(folder)}
        is_replacing = self.work.read(_REPLACING) is not None
        fence.check()
        if is_replacing:
            self._end_replacement()
        if self._exists(FEATURES):  # else it was dropped, and its parts count no more
            for name in dead:
                self._take_over(name, run)
            Publisher(self, fence, run).adopt()
        for name in dead:
            self._remove_run(name)

    def _take_over(self, dead: str, run: str) -> None:
        """Moves the parts of a dead run to another run, except those that are in the table."""
        names = self.work.names(f"done/{dead}")
        done = {part.stem for part in map(Part.of_name, names) if part is not None}
        for name in self.work.names(f"runs/{dead}", only_files=True):
            part = Part.of_name(name)
            if part is not None and part.stem in done:  # the other file of its part
                self.work.delete(f"runs/{dead}/{name}")
            elif dead != run:
                self.work.move(f"runs/{dead}/{name}", f"runs/{run}/{name}")

    def _remove_run(self, run: str) -> None:
        for folder in _OF_RUNS:
            self.work.delete(f"{folder}/{run}")
            self.work.delete_empty(folder)

    def replacement(self) -> FolderTable:
        """Returns the table that replaces this one at the end of a run."""
        return FolderTable(self._spark, self.work.sub(_REPLACEMENT), self.work)

    def replace_by_replacement(self, run: str, check: Callable[[], None]) -> None:
        """Replaces all rows by those of ``replacement``: each table in one commit."""
        check()
        self.work.write(_REPLACING, json.dumps(self.replacement().files()).encode())
        check()
        self._end_replacement()

    def remove_work(self, run: str) -> None:
        self._remove_run(run)
        self.work.delete(_REPLACEMENT)

    def _end_replacement(self) -> None:
        """Completes a replacement, unless its files are gone: then its run was fenced."""
        listed = json.loads(self.work.read(_REPLACING) or b"[]")
        files = self.replacement().files()
        if listed and {*listed} <= {*files}:
            self._replace_by(files)
        self.work.delete(_REPLACING)
        self.work.delete(_REPLACEMENT)

    def _replace_by(self, files: list[str]) -> None:
        root = escaped(spark_path(self.work.sub(_REPLACEMENT).location))
        reader = self._spark.read.option("pathGlobFilter", "*.parquet")
        kinds = {ERRORS if file.startswith("_errors/") else FEATURES for file in files}
        folders = {FEATURES: root, ERRORS: f"{root}/_errors"}
        rows = {kind: reader.parquet(folders[kind]) for kind in kinds}
        empty = self._empty(next(iter(rows.values())).schema)
        for kind in self._names:
            if kind in (FEATURES, *rows) or self._exists(kind):
                self._retried(self._writer(kind, rows.get(kind, empty)).createOrReplace)

    def _merge(self, kind: str, staged: dict[str, list[Part]], run: str) -> None:
        """Gives a table the rows of the staged parts, and no others with the paths in them."""
        target = self._table(kind)
        rows = {of: self._staged(parts, run, target.schema) for of, parts in staged.items()}
        source = rows[kind].withColumn(_DELETED, F.lit(False))
        changes, stale = _changes(target, rows[kind], _paths(*rows.values()))
        if stale:
            schema = target.select(*_keys(target.columns)).schema
            deleted = self._spark.createDataFrame(stale, schema).withColumn(_DELETED, F.lit(True))
            source = source.unionByName(deleted, allowMissingColumns=True)
        if changes:
            self._run_merge(kind, run, source, _merge_clauses(target.columns))

    def _remove(self, kind: str, paths: DataFrame, run: str) -> None:
        if not self._table(kind).join(paths, "path", "left_semi").select("path").isEmpty():
            self._run_merge(kind, run, paths, "ON t.path = s.path WHEN MATCHED THEN DELETE")

    def _run_merge(self, kind: str, run: str, source: DataFrame, clauses: str) -> None:
        view = f"imagevec_{run}"
        source.createOrReplaceTempView(view)
        try:
            self._spark.sql(f"MERGE INTO {self._names[kind]} AS t USING {view} AS s {clauses}")
        finally:
            self._spark.catalog.dropTempView(view)

    def _retried(self, action: Callable[[], object]) -> None:
        """Repeats an action while it conflicts with commits of other writers."""
        pause, deadline = 1.0, time.monotonic() + _RETRY_SECONDS
        while True:
            try:
                action()
            except Exception as error:
                if not _CONFLICT.search(str(error)):
                    raise
                if time.monotonic() > deadline:
                    raise ImageVecError(
                        f"other writers have changed {self.path} at each try in "
                        f"{_RETRY_SECONDS:.0f} s: run extract again when they have ended"
                    ) from error
            else:
                return
            time.sleep(random.uniform(0.5, 1) * pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _staged(self, parts: list[Part], run: str, schema: StructType) -> DataFrame:
        if not parts:
            return self._empty(schema)
        folder = self.run_folder(run)
        files = [escaped(spark_path(folder.sub(part.name).location)) for part in parts]
        return self._spark.read.schema(schema).parquet(*files)

    def _create_with_merge(self, rows: DataFrame) -> None:
        """Creates the table of features, or raises ``OptionError`` if it would not have MERGE."""
        self._create(FEATURES, rows)
        if not self._has_merge():
            provider = self._provider()
            self._drop()
            raise OptionError(
                f"{self.path} would be a table of {provider}, {_NO_MERGE}: set "
                "spark.sql.sources.default to one that has it, or name a table of another catalog"
            )

    def _create(self, kind: str, rows: DataFrame) -> None:
        writer = self._writer(kind, rows)

        def create() -> None:
            if not self._exists(kind):  # another run may have created it
                writer.create()

        self._retried(create)

    def _drop(self) -> None:
        self._spark.sql(f"DROP TABLE IF EXISTS {self._names[FEATURES]}")

    def _writer(self, kind: str, rows: DataFrame) -> DataFrameWriterV2:
        """Returns the writer of a new table, with the provenance as a property and a comment."""
        metadata = {}
        if FEATURES in rows.columns:
            metadata = own_metadata(rows.schema[FEATURES].metadata)
            comment = {"comment": json.dumps(metadata)}  # Iceberg drops the other metadata
            rows = rows.withMetadata(FEATURES, metadata | comment)
        writer = rows.writeTo(self._names[kind]).tableProperty(PROPERTY, json.dumps(metadata))
        return writer.using(self._provider()) if self._exists(FEATURES) else writer

    def _exists(self, kind: str) -> bool:
        return self._spark.catalog.tableExists(self._names[kind])

    def _kinds(self) -> list[str]:
        return [kind for kind in self._names if self._exists(kind)]

    def _table(self, kind: str) -> DataFrame:
        return self._spark.read.table(self._names[kind])

    def _empty(self, schema: StructType) -> DataFrame:
        return self._spark.createDataFrame([], schema)

    def _has_merge(self) -> bool:
        source = "(SELECT 1 AS number)"
        name = self._names[FEATURES]
        merge = f"MERGE INTO {name} AS t USING {source} AS s ON false WHEN MATCHED THEN DELETE"
        rows = self._spark.sql(f"EXPLAIN {merge}").collect()  # an error has a row for each line
        return not rows[0][0].startswith("Error")

    def _provider(self) -> str:
        rows = self._spark.sql(f"DESCRIBE TABLE EXTENDED {self._names[FEATURES]}").collect()
        return next((row.data_type for row in reversed(rows) if row.col_name == "Provider"), "?")

    def _properties(self, kind: str) -> dict[str, str]:
        rows = self._spark.sql(f"SHOW TBLPROPERTIES {self._names[kind]}").collect()
        return {row.key: row.value for row in rows}

    def _provenance(self) -> Provenance:
        metadata = metadata_of_json(self._properties(FEATURES).get(PROPERTY))
        return Provenance.of_metadata(metadata, f"the table {self.path}")


_NO_MERGE = "which has no MERGE"


def _parquet_of_nothing() -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"path": pa.array([], pa.string())}), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _changes(target: DataFrame, rows: DataFrame, paths: DataFrame) -> tuple[int, list[Row]]:
    """Compares the rows of a wave with those of a table that have the same paths.

    Returns:
        The number of rows to insert, update or delete, and the keys of those to delete. They are
        on the driver, because Iceberg's MERGE cannot read its own target.
    """
    keys = _keys(target.columns)
    columns = [*keys, *_VERSION]

    def named(df: DataFrame, prefix: str) -> DataFrame:
        return df.select(*(F.col(column).alias(f"{prefix}_{column}") for column in columns))

    def is_same(names: Sequence[str]) -> Column:
        same = [F.col(f"new_{name}").eqNullSafe(F.col(f"old_{name}")) for name in names]
        return reduce(Column.__and__, same)

    old = named(target.join(paths, "path", "left_semi"), "old")
    pairs = named(rows, "new").join(old, is_same(keys), "full")
    is_stale = F.col("new_path").isNull()
    is_new = F.col("old_path").isNull()
    is_changed = is_stale | is_new | ~is_same(_VERSION)
    found = pairs.agg(
        F.count_if(is_changed).alias("changes"),
        F.collect_list(F.when(is_stale, F.struct(*(f"old_{key}" for key in keys)))).alias("stale"),
    ).first()
    assert found is not None, "an aggregate has a row"
    return found["changes"], found["stale"]


def _merge_clauses(columns: Sequence[str]) -> str:
    """Returns the part of a MERGE that says which rows are the same, and what happens to them."""
    is_key = " AND ".join(f"t.{key} <=> s.{key}" for key in _keys(columns))
    is_same = " AND ".join(f"t.{name} <=> s.{name}" for name in _VERSION)
    names = [quoted(column) for column in columns]
    updates = ", ".join(f"t.{name} = s.{name}" for name in names)
    values = ", ".join(f"s.{name}" for name in names)
    return (
        f"ON {is_key} WHEN MATCHED AND s.{_DELETED} THEN DELETE "
        f"WHEN MATCHED AND NOT ({is_same}) THEN UPDATE SET {updates} "
        f"WHEN NOT MATCHED AND NOT s.{_DELETED} "
        f"THEN INSERT ({', '.join(names)}) VALUES ({values})"
    )


_VERSION = ("version", "error")
"""The columns that differ if a row is to be updated. A bad image may be computed again."""


def _keys(columns: Sequence[str]) -> list[str]:
    return ["path", "box_number"] if has_boxes(columns) else ["path"]


def _paths(*rows: DataFrame) -> DataFrame:
    paths = [df.select("path") for df in rows]
    return reduce(DataFrame.union, paths).distinct()


def _schema(spec: FeatureSpec, columns: Sequence[str], kept: StructType) -> StructType:
    """Returns the columns of a new table. With boxes, the last field of ``kept`` is a box."""
    if not has_boxes(columns):
        return result_schema(spec, kept, None)
    *others, box = kept
    return result_schema(spec, StructType(others), ArrayType(box.dataType))


def _as_stored(kept: StructType, there: StructType) -> StructType:
    """Returns columns with the types that a table gives them: Iceberg has only int and bigint."""
    stored = []
    for field in kept:
        wide = StructField(field.name, _widened(field.dataType))
        is_wide = field.name in there.names and _same_types(there[field.name], wide)
        stored.append(wide if is_wide else field)
    return StructType(stored)


def _same_types(first: StructField, second: StructField) -> bool:
    return first.dataType.simpleString() == second.dataType.simpleString()


def _widened(type: DataType) -> DataType:
    if isinstance(type, ByteType | ShortType):
        return IntegerType()
    if isinstance(type, ArrayType):
        return ArrayType(_widened(type.elementType), type.containsNull)
    if isinstance(type, MapType):
        values = _widened(type.valueType)
        return MapType(_widened(type.keyType), values, type.valueContainsNull)
    if isinstance(type, StructType):
        return StructType([StructField(f.name, _widened(f.dataType)) for f in type])
    return type


def _parts_of(name: str) -> list[str]:
    """Splits the name of a table. Raises ``OptionError`` if it is not one."""
    if not _NAME.fullmatch(name):
        raise OptionError(
            f"{name!r} is not the name of a table: give one such as main.photos.features, with "
            "parts in backticks if they contain a dot, a slash or a space"
        )
    parts = re.findall(_PART, name)
    return [p[1:-1].replace("``", "`") if p.startswith("`") else p for p in parts]


def _quoted(parts: Sequence[str]) -> str:
    return ".".join(map(quoted, parts))


def _folder_name(spark: SparkSession, parts: list[str]) -> str:
    """Returns a name for the working files of a table, which no other table has."""
    catalog = spark.catalog.currentCatalog()
    if len(parts) == 1:
        parts = [spark.catalog.currentDatabase(), *parts]
    if len(parts) == 2 and not setting(spark, f"spark.sql.catalog.{parts[0]}"):
        parts = [catalog, *parts]
    name = ".".join(parts)
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}-{digest}"
