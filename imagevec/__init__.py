"""imagevec turns a Spark column of images into a column of feature vectors."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from imagevec._version import __version__ as __version__
from imagevec.errors import pyspark_required as _pyspark_required

if TYPE_CHECKING:
    from imagevec.errors import FingerprintError as FingerprintError
    from imagevec.errors import ImageError as ImageError
    from imagevec.errors import ImageVecError as ImageVecError
    from imagevec.errors import MissingExtraError as MissingExtraError
    from imagevec.errors import OptionError as OptionError
    from imagevec.errors import ReadError as ReadError
    from imagevec.errors import SerializationError as SerializationError
    from imagevec.errors import WeightsError as WeightsError
    from imagevec.errors import WriteError as WriteError
    from imagevec.models.registry import list_models as list_models
    from imagevec.models.registry import register_model as register_model
    from imagevec.pickling import CapturedObject as CapturedObject
    from imagevec.pickling import PickleReport as PickleReport
    from imagevec.pickling import explain_pickle as explain_pickle
    from imagevec.quantization import QuantizationReport as QuantizationReport
    from imagevec.quantization import quantize as quantize
    from imagevec.search.joins import near_duplicates as near_duplicates
    from imagevec.search.joins import nearest as nearest
    from imagevec.spark.conf import recommended_conf as recommended_conf
    from imagevec.spark.featurizer import ImageFeaturizer as ImageFeaturizer
    from imagevec.spark.metrics import Metrics as Metrics
    from imagevec.spark.text import text_features as text_features
    from imagevec.spark.text import text_features_udf as text_features_udf
    from imagevec.spark.udf import features_udf as features_udf
    from imagevec.spark.udf import make_features_udf as make_features_udf
    from imagevec.spark.udf import register as register
    from imagevec.spark.vectorizer import ImageVectorizer as ImageVectorizer
    from imagevec.spec import FeatureSpec as FeatureSpec
    from imagevec.spec import Preprocessing as Preprocessing
    from imagevec.spec import Tokenization as Tokenization
    from imagevec.table.extract import ExtractReport as ExtractReport
    from imagevec.table.extract import extract as extract
    from imagevec.table.provenance import Provenance as Provenance
    from imagevec.table.provenance import check_comparable as check_comparable
    from imagevec.table.provenance import provenance as provenance
    from imagevec.table.webdataset import WebDatasetSource as WebDatasetSource

# Spark takes one second to import, PyTorch three, so each name is imported on first use.
_MODULE_OF = {
    name: module
    for module, names in {
        "errors": (
            "FingerprintError",
            "ImageError",
            "ImageVecError",
            "MissingExtraError",
            "OptionError",
            "ReadError",
            "SerializationError",
            "WeightsError",
            "WriteError",
        ),
        "models.registry": ("list_models", "register_model"),
        "pickling": ("CapturedObject", "PickleReport", "explain_pickle"),
        "quantization": ("QuantizationReport", "quantize"),
        "search.joins": ("near_duplicates", "nearest"),
        "spark.conf": ("recommended_conf",),
        "spark.featurizer": ("ImageFeaturizer",),
        "spark.metrics": ("Metrics",),
        "spark.text": ("text_features", "text_features_udf"),
        "spark.udf": ("features_udf", "make_features_udf", "register"),
        "spark.vectorizer": ("ImageVectorizer",),
        "spec": ("FeatureSpec", "Preprocessing", "Tokenization"),
        "table.extract": ("ExtractReport", "extract"),
        "table.provenance": ("Provenance", "check_comparable", "provenance"),
        "table.webdataset": ("WebDatasetSource",),
    }.items()
    for name in names
}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _pyspark_required():
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
