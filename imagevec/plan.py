"""Options to a ``Recipe``, on the driver: all that a worker needs to build its engine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch

import imagevec
from imagevec.engines import Engine, openvino, saved_model
from imagevec.engines.torch import TorchEngine, supports_bfloat16
from imagevec.errors import ImageVecError, OptionError, did_you_mean
from imagevec.files import cache_dir, content_addressed, digest_of, verified
from imagevec.models.registry import (
    Entry,
    ExportedEntry,
    FactoryEntry,
    build_model,
    find_entry,
    infer_num_features,
    to_feature_model,
)
from imagevec.models.state_dict import RANDOM, find_weights, load_state_dict
from imagevec.spec import (
    DEFAULTS,
    ExecutionOptions,
    FeatureSpec,
    Options,
    Preprocessing,
    check_choice,
    check_layer,
)

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How to build an engine: a few KB, whatever the model.

    Attributes:
        spec: What to compute.
        engine: ``"torch"`` or ``"openvino"``.
        entry: How to build the model; ``None`` if it is in the files.
        files: The names of the content-addressed files: the weights (none if they are random), or
            a converted model's graph and weights.
        key: Equal for two recipes only if one engine serves both.
    """

    spec: FeatureSpec
    engine: str
    entry: Entry | None
    files: tuple[str, ...]
    key: str

    def build_engine(
        self, locate: Callable[[str], Path], device: torch.device, threads: int
    ) -> Engine:
        """Loads and verifies the files, and prepares the forward pass.

        Args:
            locate: The name of a file to its path on this machine.
            device: Where the forward pass runs.
            threads: Of one forward pass on the CPU.

        Raises:
            WeightsError: A file is missing or was altered.
        """
        paths = [verified(locate(name)) for name in self.files]
        if self.entry is None:
            model = openvino.read(*paths)
            return openvino.OpenVINOEngine(model, self.spec.precision, threads)
        spec = self.spec
        path = paths[0] if paths else None
        model = _feature_model(self.entry, spec.preprocessing, spec.layer, spec.normalize, path)
        return TorchEngine(model, spec.preprocessing, device, spec.precision)


def resolve(**options: Unpack[Options]) -> tuple[Recipe, tuple[Path, ...], ExecutionOptions]:
    """Checks all options and decides what ``"auto"`` and ``"DEFAULT"`` mean.

    Returns:
        The recipe, its files on this machine, and how to run it.

    Raises:
        OptionError: An option is wrong; the message names the nearest valid choice.
        WeightsError: The weights cannot be had, or do not fit the model.
    """
    for name in options.keys() - DEFAULTS.keys():
        raise OptionError(f"the option {name!r} is not known: {did_you_mean(name, DEFAULTS)}")
    chosen: dict[str, Any] = {**DEFAULTS, **options}
    execution = ExecutionOptions.of(chosen)
    if saved_model.is_saved_model(chosen["model"]):
        recipe, paths = _saved_recipe(Path(chosen["model"]), dict(options), execution)
    else:
        recipe, paths = _recipe(chosen, execution)
    return recipe, paths, execution


def feature_spec(chosen: dict[str, Any], precision: str) -> tuple[FeatureSpec, Entry, Path | None]:
    """The spec of a registered model or a factory, its entry, and its weights file.

    Args:
        chosen: All of ``Options``.
        precision: What ``chosen["precision"]`` comes to.
    """
    layer = check_layer(chosen["layer"])
    entry = find_entry(chosen["model"])
    weights_path = find_weights(chosen["weights"], entry)
    digest = digest_of(weights_path) if weights_path else None
    preprocessing = dataclasses.replace(entry.preprocessing(digest), decode=chosen["decode"])
    model = _feature_model(entry, preprocessing, layer, chosen["normalize"], weights_path)
    # A library model's shapes tell; one of the user's own is run once, on a black image.
    device = "cpu" if isinstance(entry, FactoryEntry | ExportedEntry) else "meta"
    num_features = infer_num_features(model, preprocessing.crop_size, device)
    spec = FeatureSpec(
        model=entry.name,
        weights=f"sha256:{digest}" if digest else RANDOM,
        layer=layer,
        num_features=num_features if isinstance(layer, tuple) else num_features[0],
        preprocessing=preprocessing,
        precision=precision,
        normalize=chosen["normalize"],
    )
    return spec, entry, weights_path


def convert(spec: FeatureSpec, entry: Entry, weights_path: Path | None) -> Any:
    """The spec's model as an ``openvino.Model``.

    Raises:
        OptionError: The model is a ``.pt2`` file: tracing would fix the size of a batch.
    """
    if isinstance(entry, ExportedEntry):
        raise OptionError(f"OpenVINO does not run {entry.path.name}: use engine='torch'")
    model = _feature_model(entry, spec.preprocessing, spec.layer, spec.normalize, weights_path)
    return openvino.convert(model, spec.preprocessing)


def _recipe(chosen: dict[str, Any], execution: ExecutionOptions) -> tuple[Recipe, tuple[Path, ...]]:
    if chosen["engine"] == "auto" and isinstance(find_entry(chosen["model"]), ExportedEntry):
        chosen = {**chosen, "engine": "torch"}  # the only one that runs it
    engine = _resolve_engine(chosen["engine"], execution.device, chosen["precision"])
    precision = _resolve_precision(chosen["precision"], engine, execution.device)
    spec, entry, weights_path = feature_spec(chosen, precision)
    if engine == "openvino":
        try:
            paths = _converted(spec, entry, weights_path)
        except ImageVecError:
            raise
        except Exception as error:  # OpenVINO's frontend and torch.jit raise whatever comes up
            if chosen["engine"] != "auto":
                raise OptionError(f"OpenVINO cannot convert {entry.name!r}: {error}") from error
            logger.warning("OpenVINO cannot convert %r, PyTorch runs it: %s", entry.name, error)
            engine = "torch"
    if engine == "torch":
        paths = (content_addressed(weights_path),) if weights_path else ()
    names = tuple(path.name for path in paths)
    key = hashlib.sha256(cloudpickle.dumps((spec, entry, engine))).hexdigest()
    return Recipe(spec, engine, entry if engine == "torch" else None, names, key), paths


def _saved_recipe(
    folder: Path, options: dict[str, Any], execution: ExecutionOptions
) -> tuple[Recipe, tuple[Path, ...]]:
    spec, paths = saved_model.read(folder)
    if "layer" in options:
        options["layer"] = check_layer(options["layer"])
    for name in ("layer", "normalize", "precision"):
        saved = getattr(spec, name)
        if options.get(name, saved) not in (saved, "auto"):
            raise OptionError(f"{name}={options[name]!r} is not valid: {folder} has {saved!r}")
    if "weights" in options:
        raise OptionError(f"weights={options['weights']!r} is not valid: {folder} has its own")
    if execution.engine == "torch" or execution.device.startswith("cuda"):
        raise OptionError(f"{folder} runs with engine='openvino' and device='cpu' alone")
    preprocessing = dataclasses.replace(
        spec.preprocessing, decode=options.get("decode", spec.preprocessing.decode)
    )
    spec = dataclasses.replace(spec, preprocessing=preprocessing)
    names = tuple(path.name for path in paths)
    key = hashlib.sha256(repr((spec, names)).encode()).hexdigest()
    return Recipe(spec, "openvino", None, names, key), paths


def _feature_model(
    entry: Entry,
    preprocessing: Preprocessing,
    layer: str | tuple[str, ...],
    normalize: bool,
    weights_path: Path | None,
) -> nn.Module:
    if isinstance(entry, ExportedEntry):
        if layer != "pooled":
            raise OptionError(
                f"layer={layer!r} is not valid: a .pt2 file has its output alone, use 'pooled'"
            )
        # On a worker the file is at another place.
        model = dataclasses.replace(entry, path=weights_path or entry.path).build(0)
        return to_feature_model(model, layer, normalize)
    state_dict = load_state_dict(weights_path) if weights_path else None
    model = build_model(entry, preprocessing.crop_size, state_dict)
    return to_feature_model(model, layer, normalize)


def _resolve_engine(engine: str, device: str, precision: str) -> str:
    on_cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if engine == "openvino" and on_cuda:
        raise OptionError(f"engine='openvino' runs on the CPU, not on device={device!r}")
    if engine != "auto":
        return engine
    if on_cuda or precision == "float16":
        return "torch"
    if openvino.is_installed():
        return "openvino"
    _warn_once_that_openvino_is_missing()
    return "torch"


@functools.cache
def _warn_once_that_openvino_is_missing() -> None:
    logger.warning(
        "OpenVINO is not installed, PyTorch computes on the CPU; for ResNet-50 OpenVINO is about "
        "1.3 times as fast: pip install 'imagevec[openvino]'"
    )


def _resolve_precision(precision: str, engine: str, device: str) -> str:
    check_choice("precision", precision, ("float32", "bfloat16", "float16", "int8", "auto"))
    if precision == "int8":
        raise OptionError(
            "precision='int8' is of a saved model: imagevec.quantize(images, model=..., "
            "output=path) makes one, and model=path runs it"
        )
    if precision == "float16" and (device == "cpu" or engine == "openvino"):
        raise OptionError("precision='float16' needs CUDA: did you mean 'bfloat16'?")
    if precision != "auto":
        return precision
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    native = supports_bfloat16("cpu" if on_cpu else "cuda")
    return "bfloat16" if native else "float32"


def _converted(spec: FeatureSpec, entry: Entry, weights_path: Path | None) -> tuple[Path, ...]:
    """A model's graph and weights for OpenVINO; the user's cache keeps them for the next call."""
    preprocessing = dataclasses.replace(spec.preprocessing, decode="exact")
    graph_spec = dataclasses.replace(spec, preprocessing=preprocessing, precision="float32")
    parts = (graph_spec, entry, openvino.version(), imagevec.__version__)
    key = hashlib.sha256(cloudpickle.dumps(parts)).hexdigest()
    folder = cache_dir("openvino") / key
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            openvino.save(convert(spec, entry, weights_path), Path(temporary) / "new" / "model.xml")
            with contextlib.suppress(OSError):  # another process was first
                (Path(temporary) / "new").rename(folder)
    return tuple(content_addressed(folder / f"model.{kind}") for kind in ("xml", "bin"))
