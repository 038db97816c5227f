"""Tables of features, and their images."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from tests.helpers.images import encode, photo

FLOATS = pa.list_(pa.float32())


HOSTILE = "</script><img src=x onerror=\"document.title='harm'\">'&\u2028{{ data }}.jpg"


def write_table(
    folder: Path,
    rows: dict[str, Any],
    type: pa.DataType = FLOATS,
    part: int = 0,
    metadata: Any = None,
) -> Path:
    """Writes one file of a table like ``imagevec extract``, from paths to features."""
    count = len(rows)
    table = pa.table(
        {
            "path": pa.array(list(rows), pa.string()),
            "length": pa.array([1] * count, pa.int64()),
            "modificationTime": pa.array(
                [datetime.datetime(2024, 1, 1)] * count, pa.timestamp("us", "UTC")
            ),
            "features": pa.array(list(rows.values()), type),
            "width": pa.array([4] * count, pa.int32()),
            "height": pa.array([3] * count, pa.int32()),
        }
    )
    if metadata is not None:
        table = with_column_metadata(table, "features", metadata)
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, folder / f"part-{part:05}.snappy.parquet", row_group_size=2)
    return folder


def with_column_metadata(table: pa.Table, column: str, metadata: Any) -> pa.Table:
    """Adds the metadata of a column in the form that Spark writes to Parquet."""
    fields = [{"name": column, "metadata": metadata}]
    spark = {"org.apache.spark.sql.parquet.row.metadata": json.dumps({"fields": fields})}
    return table.replace_schema_metadata(spark)


def write_images(folder: Path, names: list[str], size: tuple[int, int] = (80, 60)) -> list[str]:
    """Writes PNG files with any names, and returns their paths in Spark's form."""
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(photo(*size, seed=number)))
    return [f"file:{folder / name}" for name in names]


def write_made_of(folder: Path, rows: dict[str, Any], metadata: dict[str, Any]) -> str:
    """Writes a table that records what made its features."""
    write_table(folder, rows)
    (file,) = folder.iterdir()
    fields = [{"name": "features", "metadata": metadata}]
    spark = {"org.apache.spark.sql.parquet.row.metadata": json.dumps({"fields": fields})}
    parquet.write_table(parquet.read_table(file).replace_schema_metadata(spark), file)
    return str(folder)
