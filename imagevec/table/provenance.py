"""The provenance of a column of features, which is stored in the column's metadata.

Spark keeps a column's metadata through ``withColumn``, ``select`` and Parquet. Iceberg keeps only
the comment, so that in a table of a catalog, the comment contains the metadata as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagevec._version import __version__
from imagevec.errors import FingerprintError
from imagevec.spark.sessions import existing_column
from imagevec.spec import METADATA_KEY, FeatureSpec, Preprocessing, Tokenization, own_metadata

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


@dataclass(frozen=True)
class Provenance:
    """How a column of features was computed.

    Attributes:
        fingerprint: 16 hex digits. They are equal for two columns of images, or of texts, if and
            only if their vectors are comparable.
        model: The model's name.
        weights: ``sha256:<hex digest of the weights file>``, or ``random``.
        layer: ``"pooled"``, ``"logits"`` or a node name; a tuple of several.
        num_features: The length of a vector; with several layers, a tuple in the same order.
        preprocessing: How the pixels or texts were prepared for the model.
        precision: The lowest precision of the forward pass.
        normalize: Whether each vector has length 1.
        code: A digest of a factory's code, or of a configuration that comes with the weights; empty
            for other models.
        imagevec: The version of imagevec that computed the features.
    """

    fingerprint: str
    model: str
    weights: str
    layer: str | tuple[str, ...]
    num_features: int | tuple[int, ...]
    preprocessing: Preprocessing | Tokenization
    precision: str
    normalize: bool
    code: str
    imagevec: str

    @classmethod
    def of(cls, spec: FeatureSpec) -> Provenance:
        """Returns the provenance of features that this spec computes."""
        return cls.of_metadata(spec.metadata)

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any], column: str = "the column") -> Provenance:
        """Returns the provenance in a column's metadata. ``column`` is for the message.

        Raises:
            FingerprintError: The metadata contains none, or another version of imagevec wrote it
                with fields or values that this one does not know.
        """
        try:
            fields = dict(own_metadata(metadata)[METADATA_KEY])
            own = {name: fields.pop(name) for name in ("fingerprint", "imagevec")}
        except (KeyError, TypeError, ValueError) as error:
            raise FingerprintError(f"{column} has no provenance in its metadata") from error
        try:
            spec = FeatureSpec.from_json(json.dumps(fields))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FingerprintError(
                f"{column} was written by imagevec {own['imagevec']}, whose provenance "
                f"imagevec {__version__} cannot read: install that version"
            ) from error
        made_of = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        return cls(**own, **made_of)


def provenance(df: DataFrame, column: str = "features") -> Provenance:
    """Returns the provenance of a column of features.

    Raises:
        OptionError: The column does not exist.
        FingerprintError: The column has no provenance: ``features_udf`` did not compute it, or its
            metadata was lost. A UDF that is registered for SQL cannot set metadata. Or a later
            version of imagevec computed it.
    """
    name = existing_column(df.columns, column)
    return Provenance.of_metadata(df.schema[name].metadata, f"column {name!r}")


def check_comparable(first: DataFrame, second: DataFrame, column: str = "features") -> None:
    """Checks that two columns of features are comparable: they must have the same fingerprint.

    Features of texts and of images are comparable if they have the same model and weights.

    Raises:
        FingerprintError: They are not comparable. The message states the differences.
    """
    check_same(provenance(first, column), provenance(second, column))


def check_same(first: Provenance, second: Provenance) -> None:
    """Like ``check_comparable``, for two provenances."""
    if first.fingerprint == second.fingerprint:
        return
    names = {field.name for field in dataclasses.fields(Provenance)} - {"fingerprint", "imagevec"}
    if type(first.preprocessing) is not type(second.preprocessing):  # texts and images
        names = {"model", "weights", "layer"}
    differing = [
        f"{name} {getattr(first, name)!r} and {getattr(second, name)!r}"
        + (" (digests of the model's code)" if name == "code" else "")
        for name in sorted(names)
        if getattr(first, name) != getattr(second, name)
    ]
    if differing:
        raise FingerprintError(f"the features are not comparable: {'; '.join(differing)}")
