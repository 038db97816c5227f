"""The code of docs/spark-context-errors.md runs, and fails, as it says."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from imagevec import explain_pickle
from tests.conftest import ROOT
from tests.images import encode, photo
from tests.spark.conftest import Frame

TEXT = (ROOT / "docs" / "spark-context-errors.md").read_text()
ARTICLE, EXPLAIN, FUNCTION, CLASS, IMAGEVEC = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
IMPORTS = """
import functools, io, torch, torchvision
from PIL import Image
from pyspark.sql import SparkSession
from pyspark.sql.functions import udf
from pyspark.sql.types import ArrayType, FloatType
from torchvision.transforms.functional import pil_to_tensor
"""


def scope_after(code: str, **names: Any) -> dict[str, Any]:
    # As in a notebook: what is of "__main__" is pickled by value.
    scope = {"__name__": "__main__", **names}
    exec(IMPORTS + code, scope)
    return scope


@pytest.fixture
def photos(frame: Frame) -> Any:
    return frame([encode(photo(seed=1)), encode(photo(seed=2))])


def lengths(df: Any) -> list[int]:
    return [row[0] for row in df.selectExpr("size(features)").collect()]


def test_the_class_fails_as_quoted(spark: SparkSession, photos: Any) -> None:
    vectorizer = scope_after(ARTICLE)["ImageVectorizer"]()
    with pytest.raises(Exception, match="CONTEXT_ONLY_VALID_ON_DRIVER"):
        vectorizer.process_images(photos)
    assert "CONTEXT_ONLY_VALID_ON_DRIVER" in TEXT


def test_the_report_is_as_quoted(spark: SparkSession) -> None:
    vectorizer = scope_after(ARTICLE)["ImageVectorizer"]()
    report = str(explain_pickle(vectorizer.extract_features))
    quoted = [line.strip() for line in TEXT.splitlines() if line.startswith("  problem: ")]
    assert len(quoted) == 2
    assert all(line in report for line in quoted)
    assert "explain_pickle(vectorizer.extract_features)" in EXPLAIN


def test_way_out_1_functions_of_a_module(
    spark: SparkSession, photos: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photo_features.py").write_text(IMPORTS + FUNCTION)
    spark.sparkContext.addPyFile(str(tmp_path / "photo_features.py"))
    monkeypatch.syspath_prepend(tmp_path)
    assert lengths(importlib.import_module("photo_features").process_images(photos)) == [1000, 1000]


def test_way_out_2_a_pickle_without_the_session(photos: Any) -> None:
    vectorizer = scope_after(CLASS)["Vectorizer"]()
    assert explain_pickle(vectorizer.extract_features).problems == ()
    assert lengths(vectorizer.process_images(photos)) == [1000, 1000]


def test_way_out_3_imagevec(photos: Any) -> None:
    assert lengths(scope_after(IMAGEVEC, df=photos)["features"]) == [512, 512]
