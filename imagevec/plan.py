"""Turns options into a ``Plan`` on the driver: everything that a worker needs to build its engine.

Plans are cached in this process and in the user's cache. For options that were planned before,
planning takes milliseconds: it builds no model and does not import PyTorch.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagevec import cache
from imagevec.engines import backend
from imagevec.errors import OptionError, WeightsError
from imagevec.files import verified
from imagevec.models.features import FeatureModel
from imagevec.models.registry import find_source
from imagevec.models.source import ConversionError, ModelSource
from imagevec.options import DEFAULTS, ENGINES, Options, checked
from imagevec.spec import ExecutionOptions, FeatureSpec, with_decoding

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
    source = find_source(given.get("model", DEFAULTS["model"]))
    if texts:
        source = source.text_source()
    chosen = {**checked(DEFAULTS), **source.defaults, **given}
    chosen["precision"] = source.precision(chosen["precision"])
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
    options = ("weights", "layer", "normalize", "input_size")
    model = FeatureModel(source, **{name: chosen[name] for name in options})
    execution = ExecutionOptions.of(chosen)
    for name, device in _candidates(source, chosen, gpus):
        try:
            prepared = source.prepare(backend(name), model)
        except ConversionError as error:
            if chosen["engine"] != "auto":
                raise OptionError(str(error)) from error.__cause__
            logger.warning("%s; using another engine", error)
            continue
        preprocessing = with_decoding(prepared.spec.preprocessing, chosen)
        return Plan(
            dataclasses.replace(
                prepared.spec, precision=chosen["precision"], preprocessing=preprocessing
            ),
            dataclasses.replace(execution, device=device),
            name,
            (*prepared.files, *preprocessing.files),
            source if backend(name).BUILDS_MODULE else None,
            prepared.content,
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
    may_skip = engine == "auto" and len(source.backends) > 1
    for device in devices(chosen["device"], gpus):
        for name in source.backends if engine == "auto" else (engine,):
            reason = backend(name).why_not(chosen["precision"], device)
            if reason is not None:
                reasons.append(reason)
            elif may_skip and not backend(name).is_available():
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


def _process_key(given: dict[str, Any], gpus: bool | None, texts: bool) -> Any:
    """Returns the key of a plan in this process, or ``None`` for a factory.

    A factory can read globals and files. Only the module that it builds shows what it computes.
    """
    source = find_source(given.get("model", DEFAULTS["model"]))
    if source.identity == "content":
        return None
    files = [(str(path), _version_of_file(path)) for path in source.files(given.get("weights", ""))]
    available = tuple(name for name in ENGINES if backend(name).is_available())
    options = tuple(sorted(given.items(), key=lambda item: item[0]))
    return (source, options, *files, available, gpus, texts)


def _version_of_file(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
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


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
