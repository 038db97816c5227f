"""The table of features that a command reads: a folder of Parquet files, or what Spark reads."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("features", help="table written by `imagevec extract`")
    parser.add_argument(
        "--format",
        help="table if it is the name of a table of the catalog, or a format such as delta; Spark "
        "then reads it, with the settings of spark-defaults.conf or spark-submit (default: a "
        "folder of Parquet files, read without Spark)",
    )


@contextlib.contextmanager
def folder_of(options: argparse.Namespace) -> Iterator[str]:
    """Yields a folder of Parquet files with the columns ``path`` and ``features`` of the table."""
    if options.format is None:
        yield options.features
        return
    from imagevec.cli.session import spark_session
    from imagevec.spark.sessions import read_table
    from imagevec.table.schema import check_rows_are_images

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "features"
        with spark_session("local[*]") as spark:  # whose tasks write on this machine
            table = read_table(spark, options.features, options.format)
            check_rows_are_images(options.features, table.columns)
            table.select("path", "features").write.parquet(folder.as_uri())
        yield str(folder)
