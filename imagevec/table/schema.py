"""The columns of the tables that ``extract`` writes."""

from __future__ import annotations

from collections.abc import Iterable

from imagevec.errors import OptionError

OWN_COLUMNS = (
    *("path", "length", "modificationTime", "version"),
    *("features", "width", "height", "truncated", "error"),
)
"""The columns of a result."""

BOX_COLUMNS = ("box", "box_number", "box_count")
"""Its further columns if each row is a box."""


SPARK_SCHEMA = "org.apache.spark.sql.parquet.row.metadata"
"""The key of Spark's schema, with the metadata of columns, in a Parquet file."""

OWN_PREFIX = "imagevec_"
"""Of columns that exist during a run; kept columns must not have it."""

IMAGE = f"{OWN_PREFIX}image"
BOXES = f"{OWN_PREFIX}boxes"
SOURCE_ERROR = f"{OWN_PREFIX}error"
CHANGED = f"{OWN_PREFIX}changed"
"""Whether the table has the image in another version."""


def kept_column(number: int) -> str:
    """Returns the name of a kept column during a run: its own may need quotes in SQL."""
    return f"{OWN_PREFIX}kept_{number}"


def has_boxes(columns: Iterable[str]) -> bool:
    """Returns whether a table with these columns has a row for each box."""
    return set(BOX_COLUMNS) <= set(columns)


def check_rows_are_images(table: str, columns: Iterable[str]) -> None:
    """Raises ``OptionError`` if a table has several rows with the same path."""
    if has_boxes(columns):
        raise OptionError(
            f"{table} has a row for each box, not for each image: search it in Python, with a key "
            "for each box (see 'Boxes' in docs/search.md)"
        )
