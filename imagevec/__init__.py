"""imagevec: a Spark column of images to a column of feature vectors."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagevec.engines.quantization import quantize
    from imagevec.errors import (
        FingerprintError,
        ImageError,
        ImageVecError,
        OptionError,
        SerializationError,
        WeightsError,
    )
    from imagevec.models.registry import list_models, register_model
    from imagevec.pickling import explain_pickle
    from imagevec.spark.conf import recommended_conf
    from imagevec.spark.featurizer import ImageFeaturizer
    from imagevec.spark.metrics import Metrics
    from imagevec.spark.udf import features_udf, make_features_udf, register
    from imagevec.spark.vectorizer import ImageVectorizer
    from imagevec.spec import Preprocessing
    from imagevec.table.provenance import check_fingerprints, fingerprint

__version__ = "0.1.0"

__all__ = [
    "FingerprintError",
    "ImageError",
    "ImageFeaturizer",
    "ImageVecError",
    "ImageVectorizer",
    "Metrics",
    "OptionError",
    "Preprocessing",
    "SerializationError",
    "WeightsError",
    "check_fingerprints",
    "explain_pickle",
    "features_udf",
    "fingerprint",
    "list_models",
    "make_features_udf",
    "quantize",
    "recommended_conf",
    "register",
    "register_model",
]

# PyTorch and Spark take seconds to import: a name brings them in where it is first used.
_MODULES = {
    "FingerprintError": "errors",
    "ImageError": "errors",
    "ImageFeaturizer": "spark.featurizer",
    "ImageVecError": "errors",
    "ImageVectorizer": "spark.vectorizer",
    "Metrics": "spark.metrics",
    "OptionError": "errors",
    "Preprocessing": "spec",
    "SerializationError": "errors",
    "WeightsError": "errors",
    "check_fingerprints": "table.provenance",
    "explain_pickle": "pickling",
    "features_udf": "spark.udf",
    "fingerprint": "table.provenance",
    "list_models": "models.registry",
    "make_features_udf": "spark.udf",
    "quantize": "engines.quantization",
    "recommended_conf": "spark.conf",
    "register": "spark.udf",
    "register_model": "models.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
