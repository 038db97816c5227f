"""Post-training quantization to int8 with NNCF, which creates a saved model and measures fidelity.

NNCF (Neural Network Compression Framework) inserts 8-bit quantizers and sets their ranges from a
calibration sample: https://docs.openvino.ai, "Basic Quantization Flow".
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from imagevec import cache
from imagevec.engines import devices, openvino
from imagevec.errors import ImageVecError, MissingExtraError, OptionError
from imagevec.files import expanded
from imagevec.images.decode import Pixels
from imagevec.images.prepare import prepare
from imagevec.images.reading import read_ahead
from imagevec.images.values import Value
from imagevec.models import saved
from imagevec.plan import Plan, make_plan
from imagevec.spec import Preprocessing

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from imagevec.models.factory import ModelFactory

_MAX_IMAGES = 320
_MIN_IMAGES = 10
_HELD_OUT_EVERY = 5


class QuantizationReport(NamedTuple):
    """The similarity of int8 and float32 vectors on images held out from calibration.

    Attributes:
        median_cosine: The median cosine similarity over the held-out images.
        lowest_cosine: The lowest cosine similarity over the held-out images.
        held_out_images: The number of held-out images.
        calibration_images: The number of images used for calibration.
        bad_images: The number of images that could not be decoded.
    """

    median_cosine: float
    lowest_cosine: float
    held_out_images: int
    calibration_images: int
    bad_images: int


def quantize(
    images: Iterable[str | Path | bytes] | DataFrame,
    *,
    output: str | os.PathLike[str],
    model: str | ModelFactory = "resnet50",
    weights: str | Path = "DEFAULT",
    layer: str = "pooled",
    input_size: int | Sequence[int] | None = None,
    normalize: bool = False,
    min_median_cosine: float = 0.98,
) -> QuantizationReport:
    """Quantizes a model to int8 and saves it. Use the result with ``model=output``.

    Args:
        images: Paths, URIs or bytes of representative images, or a Spark data frame with one such
            column. The first 320 are used; at least 100 are recommended. Every fifth is held out.
        output: The folder for the saved model, which must not exist.
        model: As in ``imagevec.options.Options``.
        weights: As in ``imagevec.options.Options``.
        layer: As in ``imagevec.options.Options``.
        input_size: As in ``imagevec.options.Options``.
        normalize: As in ``imagevec.options.Options``.
        min_median_cosine: The median cosine from -1 to 1 below which the model is not saved.

    Raises:
        ImageVecError: The median cosine to float32 on the held-out images is too low, or a vector
            is zero or not finite.
        OptionError: An option is not valid, or fewer than 10 images can be decoded.
        MissingExtraError: The extra ``quantize`` is not installed.
    """
    nncf = _nncf()
    folder = expanded(Path(output))
    if folder.exists():
        raise OptionError(f"output={str(output)!r} is not valid: it already exists")
    _check_cosine(min_median_cosine)
    values = _values(images)
    plan = make_plan(
        model=model,
        weights=weights,
        layer=layer,
        input_size=input_size,
        normalize=normalize,
        engine="openvino",
        device="cpu",
    )
    pixels, bad_images = _pixels(values, plan)
    held_out = pixels[::_HELD_OUT_EVERY]
    calibration = [image for i, image in enumerate(pixels) if i % _HELD_OUT_EVERY]
    with devices.within_quota() as threads, openvino.without_telemetry():
        converted = openvino.read([cache.stored(name) for name in plan.files])
        vectors = _vectors(converted, "float32", held_out, threads)
        quantized = nncf.quantize(
            converted,
            nncf.Dataset([image[None] for image in calibration]),  # (1, H, W, 3)
            subset_size=len(calibration),
            model_type=nncf.ModelType.TRANSFORMER if _has_attention(converted) else None,
        )
        cosines = _cosines(vectors, _vectors(quantized, "int8", held_out, threads))
    report = QuantizationReport(
        median_cosine=float(np.median(cosines)),
        lowest_cosine=float(cosines.min()),
        held_out_images=len(held_out),
        calibration_images=len(calibration),
        bad_images=bad_images,
    )
    if report.median_cosine < min_median_cosine:
        raise ImageVecError(
            f"int8 model not saved: its median cosine to float32 is {report.median_cosine:.4f} on "
            f"{len(held_out)} held-out images, min_median_cosine={min_median_cosine}; "
            "precision='bfloat16' loses less accuracy"
        )
    with _folder_whole(folder) as unfinished:
        files = openvino.save(quantized, unfinished)
        int8 = dataclasses.replace(plan.spec, precision="int8")
        saved.write(unfinished, int8, plan.backend, files)
    return report


def _check_cosine(min_median_cosine: Any) -> None:
    is_number = isinstance(min_median_cosine, int | float)
    if not is_number or not -1 <= min_median_cosine <= 1:
        raise OptionError(
            f"min_median_cosine={min_median_cosine!r} is not valid: use a number from -1 to 1"
        )


def _values(images: Any) -> list[Value]:
    """Returns the first images as values.

    Raises:
        OptionError: ``images`` is a single image, or a data frame with several columns.
    """
    if isinstance(images, str | bytes | Path):
        raise OptionError(f"images={str(images)[:80]!r} is not valid: use a list of images")
    if isinstance(images, Iterable):
        given = itertools.islice(images, _MAX_IMAGES)
        return [Value(str(image) if isinstance(image, Path) else image) for image in given]
    if len(images.columns) != 1:
        raise OptionError(
            f"images has the columns {images.columns}: use a data frame with one column, "
            "for example df.select('content')"
        )
    return [Value(row[0]) for row in images.limit(_MAX_IMAGES).collect()]


def _pixels(values: list[Value], plan: Plan) -> tuple[list[Pixels], int]:
    """Returns the crops of decodable images, uint8 ``(H, W, 3)``, and the number of bad images."""
    preprocessing = cast(Preprocessing, plan.spec.preprocessing)
    rows = [prepare(value, preprocessing, plan.execution) for value in read_ahead(values)]
    pixels = [row.input for row in rows if row.input is not None]
    if len(pixels) < _MIN_IMAGES:
        raise OptionError(
            f"only {len(pixels)} of {len(rows)} images can be decoded: quantization needs at least "
            f"{_MIN_IMAGES}, and 100 or more are better"
        )
    return pixels, len(rows) - len(pixels)


def _has_attention(model: Any) -> bool:
    """Returns whether a graph multiplies matrices that both depend on the input.

    ``ModelType.TRANSFORMER`` is for such graphs: NNCF then balances the ranges of activations and
    weights (SmoothQuant), quantizes activations asymmetrically, and leaves sums, means and norms in
    float32. CNNs are a tenth slower with it and not more accurate.

    Args:
        model: An ``openvino.Model``.
    """
    computed = set()  # from the input's values, not from weights and shapes alone
    for node in model.get_ordered_ops():
        sources = [value.get_source_output().get_node() for value in node.inputs()]
        from_input = sum(source in computed for source in sources)
        kind = node.get_type_name()
        if kind == "ScaledDotProductAttention" or (kind in ("MatMul", "Einsum") and from_input > 1):
            return True
        if kind == "Parameter" or (from_input and kind != "ShapeOf"):
            computed.add(node)
    return False


def _vectors(
    model: Any, precision: str, pixels: list[Pixels], threads: int
) -> npt.NDArray[np.float32]:
    """Computes float32 ``(N, D)``.

    Raises:
        ImageVecError: The cosine to a vector is not defined.
    """
    engine = openvino.OpenVINOEngine(model, precision, threads)
    vectors = np.concatenate([engine(image[None]) for image in pixels])
    norms = np.linalg.norm(vectors, axis=1)
    defined = int((np.isfinite(norms) & (norms > 0)).sum())
    if defined < len(pixels):
        raise ImageVecError(
            f"int8 model not saved: {len(pixels) - defined} of {len(pixels)} {precision} vectors "
            "of held-out images are zero or not finite; check the weights, and omit such images"
        )
    return vectors


@contextmanager
def _folder_whole(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder and renames it to ``folder`` when it is complete."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    yield unfinished
    unfinished.rename(folder)


def _cosines(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Computes the cosines of corresponding rows, ``(N, D)`` and ``(N, D)`` to ``(N,)``."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: npt.NDArray[np.float32] = np.einsum("nd,nd->n", a, b) / norms
    return cosines


def _nncf() -> Any:
    try:
        with openvino.without_telemetry():
            import nncf
    except ImportError as error:
        raise MissingExtraError("nncf", "quantize") from error
    return nncf
