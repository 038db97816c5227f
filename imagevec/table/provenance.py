"""Where a column of features comes from, by the column's metadata.

Spark keeps a column's metadata through ``withColumn``, ``select`` and Parquet.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagevec.errors import FingerprintError
from imagevec.spark.sessions import existing_column
from imagevec.spec import METADATA_KEY, FeatureSpec, Preprocessing, Tokenization

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


@dataclass(frozen=True)
class Provenance:
    """What made a column of features.

    Attributes:
        fingerprint: 16 hex digits: equal for two columns of images, or of texts, if and only if
            their vectors are comparable.
        model: The model's name.
        weights: ``sha256:<hex digest of the weights file>``, or ``random``.
        layer: ``"pooled"``, ``"logits"`` or a node name; several as a tuple.
        num_features: The length of a vector; of each layer's, in order, if there are several.
        preprocessing: What happened to the pixels before the model, or to the texts.
        precision: The arithmetic of the forward pass.
        normalize: Whether each vector has length 1.
        imagevec: The version that computed it.
    """

    fingerprint: str
    model: str
    weights: str
    layer: str | tuple[str, ...]
    num_features: int | tuple[int, ...]
    preprocessing: Preprocessing | Tokenization
    precision: str
    normalize: bool
    imagevec: str

    @classmethod
    def of(cls, spec: FeatureSpec) -> Provenance:
        """Of features that would be made now."""
        return cls.of_metadata(spec.metadata)

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any]) -> Provenance:
        """Of a column with this metadata.

        Raises:
            FingerprintError: They do not say.
        """
        try:
            fields = dict(metadata[METADATA_KEY])
            own = {name: fields.pop(name) for name in ("fingerprint", "imagevec")}
            spec = FeatureSpec.from_json(json.dumps(fields))
            made_of = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
            return cls(**own, **made_of)
        except (KeyError, TypeError) as error:
            raise FingerprintError("the column does not say what made its features") from error


def provenance(df: DataFrame, column: str = "features") -> Provenance:
    """What made a column of features.

    Raises:
        OptionError: There is no such column.
        FingerprintError: The column does not say: ``features_udf`` did not make it, or its metadata
            was lost on the way. A UDF that was registered for SQL cannot pass any on.
    """
    name = existing_column(df.columns, column)
    try:
        return Provenance.of_metadata(df.schema[name].metadata)
    except FingerprintError as error:
        message = f"column {name!r} does not say what made its features"
        raise FingerprintError(message) from error


def check_comparable(first: DataFrame, second: DataFrame, column: str = "features") -> None:
    """Checks features before they are compared: they must have the same fingerprint.

    Features of texts and of images are comparable if they have the same model and weights.

    Raises:
        FingerprintError: They are not; the message says what differs.
    """
    check_same(provenance(first, column), provenance(second, column))


def check_same(first: Provenance, second: Provenance) -> None:
    """``check_comparable`` of two provenances."""
    if first.fingerprint == second.fingerprint:
        return
    names = {field.name for field in dataclasses.fields(Provenance)} - {"fingerprint", "imagevec"}
    if type(first.preprocessing) is not type(second.preprocessing):  # a text's and an image's
        names = {"model", "weights", "layer"}
    differing = [
        f"{name} {getattr(first, name)!r} and {getattr(second, name)!r}"
        for name in sorted(names)
        if getattr(first, name) != getattr(second, name)
    ]
    if differing:
        raise FingerprintError(f"the features are not comparable: {'; '.join(differing)}")
