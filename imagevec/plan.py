"""Turns options into a ``Plan`` on the driver: everything that a worker needs to build its engine.

Plans are cached in this process and in the user's cache. For options that were planned before,
planning takes milliseconds: it builds no model and does not import PyTorch.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagevec import cache
from imagevec._version import __version__
from imagevec.engines import backend, saved_model
from imagevec.errors import ImageVecError, OptionError, WeightsError
from imagevec.files import digest_of, expanded, verified
from imagevec.models.source import REGISTERED, ModelSource
from imagevec.models.registry import find_source, find_text_source
from imagevec.options import DEFAULTS, ENGINES, WEIGHTS_SUFFIXES, Options, checked
from imagevec.spec import ExecutionOptions, FeatureSpec, with_decode

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from imagevec.models.features import FeatureModel

logger = logging.getLogger(__name__)

_MAX_PLANS = 32  # cached in this process

_plans: dict[Any, Plan] = {}
# One thread builds at a time: seeds, warning filters and the tracer belong to the whole process.
_lock = threading.RLock()


@dataclass(frozen=True)
class Plan:
    """How to compute features. It is sent to workers and takes a few KB for any model.

    Attributes:
        spec: The features to compute.
        execution: How to compute them; ``device`` is ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        backend: The library that runs the forward pass, one of ``imagevec.options.ENGINES``.
        files: The names of the content-addressed files that workers need.
        source: The model source, if the backend's workers build the model.
        content: A digest that distinguishes factories whose specs are equal.
    """

    spec: FeatureSpec
    execution: ExecutionOptions
    backend: str
    files: tuple[str, ...]
    source: ModelSource | None = None
    content: str = ""

    @property
    def engine_files(self) -> tuple[str, ...]:
        """The names in ``files`` that the backend prepared, in order."""
        return tuple(name for name in self.files if name not in self.spec.preprocessing.files)

    @property
    def key(self) -> str:
        """A digest that is equal for two plans if and only if they can share an engine."""
        return _digest(self.spec.to_json(), self.backend, self.files, self.content)


def make_plan(*, gpus: bool | None = None, texts: bool = False, **options: Unpack[Options]) -> Plan:
    """Checks all options and resolves ``"auto"`` and ``"DEFAULT"``.

    Args:
        gpus: Whether the tasks have GPUs, used for ``device="auto"``; ``None`` if the tasks run on
            this machine, which is then checked for a GPU.
        texts: Whether to plan for the model's text tower.
        **options: See ``imagevec.options.Options``.

    Raises:
        OptionError: An option is not valid. The message lists the nearest valid choices.
        WeightsError: The weights cannot be loaded or do not fit the model.
    """
    given = checked(options)
    key = _process_key(given, gpus, texts)
    known = _known_plan(key)
    if known is not None:
        return known
    with _lock:
        return _known_plan(key) or _new_plan(key, given, gpus, texts)


def _known_plan(key: Any) -> Plan | None:
    plan = _plans.get(key)
    return plan if plan is not None and _has_files(plan) else None


def _new_plan(key: Any, given: dict[str, Any], gpus: bool | None, texts: bool) -> Plan:
    if saved_model.is_saved_model(given.get("model")) and not texts:
        plan = _of_saved_model(expanded(given["model"]), given, gpus)
    else:
        chosen = {**checked(DEFAULTS), **given}
        source = (find_text_source if texts else find_source)(chosen["model"])
        plan = _of_source(source, chosen, gpus)
    if key is not None:
        _plans[key] = plan
        while len(_plans) > _MAX_PLANS:
            del _plans[next(iter(_plans))]
    return plan


def devices(device: str, gpus: bool | None = None) -> tuple[str, ...]:
    """Returns the candidates for a ``device`` option, best first. Only this resolves ``"auto"``.

    ``gpus`` is the argument of ``make_plan``.
    """
    if device != "auto":
        return (device,)
    return ("cuda", "cpu") if (has_cuda() if gpus is None else gpus) else ("cpu",)


def has_cuda() -> bool:
    """Returns whether PyTorch finds a GPU. Imports PyTorch only if a driver library is found."""
    if not _has_gpu_driver():
        return False
    import torch

    return torch.cuda.is_available()


@functools.cache
def _has_gpu_driver() -> bool:
    for name in ("libcuda.so.1", "nvcuda.dll", "libamdhip64.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def _of_source(source: ModelSource, chosen: dict[str, Any], gpus: bool | None) -> Plan:
    execution = ExecutionOptions.of(chosen)
    if chosen["precision"] == "auto":  # whatever this machine has: each worker looks for itself
        chosen = {**chosen, "precision": "bfloat16"}
    if chosen["precision"] == "int8":
        raise OptionError(
            "precision='int8' needs a saved model: create one with imagevec.quantize(images, "
            "model=..., output=path), then use model=path"
        )
    model = functools.cache(functools.partial(_feature_model, source, chosen))
    for name, device in _candidates(source, chosen, gpus):
        try:
            prepared = _prepared(source, chosen, name, model)
        except _ConversionError as error:
            if chosen["engine"] != "auto":
                raise OptionError(str(error)) from error.__cause__
            logger.warning("%s; using another engine", error)
            continue
        return dataclasses.replace(
            prepared,
            spec=_with(prepared.spec, chosen["precision"], chosen["decode"]),
            execution=dataclasses.replace(execution, device=device),
        )
    raise OptionError(f"no engine can run {source.name!r}: see the warnings above")


def _candidates(
    source: ModelSource, chosen: dict[str, Any], gpus: bool | None
) -> Iterator[tuple[str, str]]:
    """Yields the backends and devices that can run the chosen options, best first.

    Raises:
        OptionError: There are none. The message is the last backend's reason.
    """
    engine = chosen["engine"]
    if engine != "auto" and engine not in source.backends:
        raise OptionError(
            f"{engine} cannot run {chosen['model']}: "
            f"use engine={' or '.join(map(repr, source.backends))}"
        )
    reasons = []
    found = False
    for device in devices(chosen["device"], gpus):
        for name in source.backends if engine == "auto" else (engine,):
            reason = backend(name).why_not(chosen["precision"], device)
            if reason is not None:
                reasons.append(reason)
            elif engine == "auto" and not backend(name).is_available():
                _warn_once_that_it_is_missing(name)
            else:
                found = True
                yield name, device
    if not found:
        raise OptionError(reasons[-1])


@functools.cache
def _warn_once_that_it_is_missing(name: str) -> None:
    logger.warning(
        "%s is not installed; using another engine, which is slower on the CPU: "
        "pip install 'imagevec[%s]'",
        name,
        name,
    )


class _ConversionError(Exception):
    """A backend failed to convert a model that it should support."""


def _prepared(
    source: ModelSource, chosen: dict[str, Any], name: str, get_model: Callable[[], FeatureModel]
) -> Plan:
    """Returns a float32 plan. If it is cached, no model is built.

    Raises:
        _ConversionError: The backend cannot prepare the model.
    """
    parts = [chosen[option] for option in ("layer", "normalize")]
    parts += [name, backend(name).version(), __version__, *map(_version, source.libraries)]
    parts += [type(source).__name__]  # distinguishes the two towers of one model
    content = ""
    if source.identity == "name":
        key = _digest(source.name, _weights_key(source, chosen["weights"]), *parts)
    else:
        model = get_model()
        content = model.content if source.identity == "content" else ""
        preprocessing = dataclasses.asdict(model.preprocessing)
        key = _digest(source.name, model.weights_name, content, preprocessing, *parts)
    record = cache.recall(key)
    if record is None:
        spec = get_model().spec
        files = (*_prepared_files(name, get_model()), *spec.preprocessing.files)
        record = {"spec": json.loads(spec.to_json()), "weights": chosen["weights"], "files": files}
        cache.remember(key, record)
    else:
        spec = FeatureSpec.from_json(json.dumps(record["spec"]))
        files = tuple(record["files"])
    builds = backend(name).BUILDS_MODULE
    execution = ExecutionOptions.of(chosen)
    return Plan(spec, execution, name, files, source if builds else None, content if builds else "")


def _prepared_files(name: str, model: FeatureModel) -> tuple[str, ...]:
    try:
        return tuple(path.name for path in backend(name).prepare(model))
    except (ImageVecError, MemoryError):
        raise
    except Exception as error:  # converters and torch.jit raise arbitrary exceptions
        raise _ConversionError(f"{name} cannot convert {model.source.name!r}: {error}") from error


def _feature_model(source: ModelSource, chosen: dict[str, Any]) -> FeatureModel:
    from imagevec.models.features import FeatureModel

    names = ("weights", "layer", "normalize", "decode")
    return FeatureModel(source, **{name: chosen[name] for name in names})


def _of_saved_model(folder: Path, given: dict[str, Any], gpus: bool | None) -> Plan:
    saved = saved_model.read(folder)
    for name in ("layer", "normalize", "precision"):
        value = getattr(saved.spec, name)
        if given.get(name, value) not in (value, "auto"):
            raise OptionError(f"{name}={given[name]!r} is not valid: {folder} uses {value!r}")
    if "weights" in given:
        raise OptionError(f"weights={given['weights']!r} is not valid: {folder} contains weights")
    chosen = {**checked(DEFAULTS), **given}
    runs_on = [
        device
        for device in ("cpu", "cuda")
        if backend(saved.backend).why_not(saved.spec.precision, device) is None
    ]
    wanted = devices(chosen["device"], gpus)
    usable = [device for device in wanted if device.partition(":")[0] in runs_on]
    if chosen["engine"] not in ("auto", saved.backend) or not usable:
        raise OptionError(
            f"{folder} only runs with engine={saved.backend!r} and "
            f"device={' or '.join(map(repr, runs_on))}"
        )
    spec = saved.spec
    if "decode" in given:
        spec = _with(spec, spec.precision, given["decode"])
    return Plan(
        spec,
        dataclasses.replace(ExecutionOptions.of(chosen), device=usable[0]),
        saved.backend,
        tuple(path.name for path in saved_model.store(saved)),
    )


def _with(spec: FeatureSpec, precision: str, decode: Any) -> FeatureSpec:
    preprocessing = with_decode(spec.preprocessing, decode)
    return dataclasses.replace(spec, precision=precision, preprocessing=preprocessing)


def _weights_key(source: ModelSource, weights: str) -> list[str]:
    """Returns a weights name unchanged, or the digests of a file and its companion files."""
    if not weights.endswith(WEIGHTS_SUFFIXES):
        return [weights]
    path = expanded(weights)
    if not path.is_file():
        return [weights]
    files = [path, *map(path.with_name, source.beside_weights)]
    return [digest_of(file) if file.is_file() else "" for file in files]


def _process_key(given: dict[str, Any], gpus: bool | None, texts: bool) -> Any:
    """Returns the key of a plan in this process, or ``None`` for a factory.

    A factory can read globals and files. Only the module that it builds shows what it computes.
    """
    model = given.get("model", DEFAULTS["model"])
    weights = given.get("weights")
    if callable(model) or model in REGISTERED:
        return None
    files = [_version_of_file(path) for path in (model, weights)]
    if isinstance(model, str) and weights is not None and weights.endswith(WEIGHTS_SUFFIXES):
        with suppress(OptionError):  # of a model that does not exist, or has weights: raised later
            beside = find_source(model).beside_weights
            files += [_version_of_file(Path(weights).with_name(name)) for name in beside]
    spec_file = _version_of_file(Path(model) / saved_model.SPEC_FILE)
    available = tuple(name for name in ENGINES if backend(name).is_available())
    options = tuple(sorted(given.items(), key=lambda item: item[0]))
    return (options, *files, spec_file, available, gpus, texts)


def _version_of_file(path: Any) -> tuple[int, int] | None:
    try:
        stat = expanded(path).stat()
    except (OSError, TypeError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns


def _has_files(plan: Plan) -> bool:
    try:
        for name in plan.files:
            cache.use(cache.stored(name))
            verified(cache.stored(name))
    except WeightsError:
        return False
    return True


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
