"""Feature vectors of texts, in the same space as a model's image features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from imagevec import cache
from imagevec.errors import OptionError
from imagevec.options import TextOptions, checked
from imagevec.plan import Plan, make_plan
from imagevec.runtime import device_here, get_engine, get_tokenizer, schedule, threads_here
from imagevec.stream import text_stream

if TYPE_CHECKING:
    from pyspark.sql import Column
    from typing_extensions import Unpack

    from imagevec.spark.metrics import Metrics


def text_features(
    texts: Iterable[str], *, model: str, **options: Unpack[TextOptions]
) -> npt.NDArray[np.float32]:
    """Computes the feature vectors of texts, in this process.

        text_features(["a red shoe"], model="open_clip/ViT-B-32", weights="laion2b_s34b_b79k")

    They are comparable with image features from the same model and weights. A text that exceeds the
    model's context length (77 tokens for CLIP, 64 for SigLIP) is truncated, as in the library's
    tokenizer.

    Args:
        texts: Any number of strings.
        model: ``"open_clip/<name>"``, or ``"transformers/<name>"`` or a folder of CLIP, SigLIP or
            another dual encoder.
        **options: See ``imagevec.options.TextOptions``.

    Returns:
        float32 ``(N, num_features)``, in the order of ``texts``.

    Raises:
        OptionError: An option is invalid, the model cannot encode text, or ``texts`` is a single
            string or contains values that are not strings.
        WeightsError: The weights cannot be loaded, or do not fit the model.
    """
    if isinstance(texts, str):
        raise OptionError(f"texts={texts[:80]!r} is not valid: use a list of strings")
    given: list[Any] = list(texts)
    if None in given:
        raise OptionError(f"texts[{given.index(None)}] is None: use strings")
    plan = text_plan(model, **options)
    device = device_here(plan.execution.device)
    how = schedule(plan, device, threads_here())
    engine = get_engine(plan, cache.stored, device, how.forward_threads)
    tokenizer = get_tokenizer(plan, cache.stored)
    batches = text_stream([pd.Series(given)], engine, plan.spec, tokenizer, how)
    vectors = [vector for batch in batches for vector in batch]
    return np.array(vectors, np.float32).reshape(len(given), cast(int, plan.spec.num_features))


def text_features_udf(
    column: Column | str,
    *,
    model: str,
    metrics: Metrics | None = None,
    **options: Unpack[TextOptions],
) -> Column:
    """Returns a column of feature vectors for a column of texts.

        clip = {"model": "open_clip/ViT-B-32", "weights": "laion2b_s34b_b79k"}
        captions.withColumn("features", text_features_udf("caption", **clip))

    See ``text_features``, and ``features_udf`` for images.

    Args:
        column: A column of type string.
        model: ``"open_clip/<name>"``, or ``"transformers/<name>"`` or a folder of CLIP, SigLIP or
            another dual encoder.
        metrics: A ``Metrics`` that counts what the queries process.
        **options: See ``imagevec.options.TextOptions``.

    Returns:
        ``array<float>`` of ``num_features`` values, or null for a null. The column is named
        ``features``, its metadata describes how it was computed, and it is nondeterministic.

    Raises:
        OptionError: An option is invalid, or the model cannot encode text. If the column has
            another type, the query fails with this error.
        WeightsError: The weights cannot be loaded, or do not fit the model.
    """
    from imagevec.spark.sessions import active_session, gpus_of_tasks
    from imagevec.spark.udf import feature_column

    session = active_session()
    plan = text_plan(model, gpus_of_tasks(session), **options)
    return feature_column("features", column, session, plan, metrics)


def text_plan(model: str, gpus: bool | None = None, **options: Unpack[TextOptions]) -> Plan:
    """Returns the plan for a model's text tower. For ``gpus``, see ``make_plan``."""
    given: Any = checked(options, TextOptions.__annotations__)
    return make_plan(gpus=gpus, texts=True, model=model, **given)
