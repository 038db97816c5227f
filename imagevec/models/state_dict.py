"""Loads the tensors of checkpoints into models.

A checkpoint may nest its weights in dictionaries, add prefixes to their keys, and contain more than
one set of weights. The keys that fit a module by name and shape decide which part of it is loaded.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
import weakref
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from imagevec import cache
from imagevec.errors import ImageVecError, WeightsError
from imagevec.models.checkpoints import read_tensors
from imagevec.models.source import ModelSource
from imagevec.spec import Preprocessing, Tokenization

logger = logging.getLogger(__name__)

OFFLINE = (
    "Downloads are stored in ~/.cache, or in XDG_CACHE_HOME. Without a network, use "
    "weights='<path>' with a checkpoint, such as a .pth or .safetensors file, or weights='random' "
    "for tests"
)

Tensors = dict[str, torch.Tensor]

# Modules that wrap others: DataParallel and DeepSpeed, torch.compile, FSDP, activation checkpoints,
# fairscale, Opacus.
_WRAPPERS = {
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"),
    *("_fpw_module", "_module"),
}
_AVERAGED = re.compile(
    r"(^|[._])(ema|swa|avg|averaged?|polyak|teacher|shadow)([._]|$)", re.IGNORECASE
)
_SWAPPED = "ema_state_dict.steps"  # MMEngine's; it saves the average as state_dict
_ADAPTER = re.compile(
    r"(^|[._])(lora|loha|lokr|hada|ia3|vera)_(A|B|up|down|w\d|l|lambda|embedding)(_|\.|\d|$)"
)
_COUNTERS = {"total_ops", "total_params", "n_averaged"}  # of thop and AveragedModel
# Parts beside a backbone: classifiers, heads of self-supervised training, losses.
_HEADS = re.compile(
    r"(\w+_)?(head|heads|classifier|classifiers|projector|projection|proj|predictor|prediction|pred"
    r"|loss|criterion|prototypes|queue|queue_ptr|logits)\d*|fc\d*|decoder\w*|aux\w*|AuxLogits"
    r"|mask_token"
)


def with_weights(
    source: ModelSource, preprocessing: Preprocessing | Tokenization, weights: Path | None
) -> nn.Module:
    """Builds a model with its weights.

    Tensors that are not in the file, such as those of a classifier with another number of classes,
    get arbitrary values: ``check_loaded`` checks that the chosen layers do not depend on them.

    Args:
        source: The source that builds the model.
        preprocessing: The preprocessing of the model's input.
        weights: The weights file; ``None`` for random weights, identical on every machine.

    Raises:
        WeightsError: The weights belong to another model.
    """
    if weights is None:
        with seeded():
            return source.build(preprocessing)
    with no_random_init():
        model = source.build(preprocessing)
    if isinstance(model, torchvision.models.GoogLeNet | torchvision.models.Inception3):
        for name in {"aux1", "aux2", "AuxLogits"} & model._modules.keys():
            setattr(model, name, None)  # only training uses them
    is_densenet = isinstance(model, torchvision.models.DenseNet)

    def convert(tensors: Tensors) -> Tensors:
        with no_random_init():
            return source.fitted(tensors, model, preprocessing, weights)

    load_weights(model, weights, source.name, _new_densenet_key if is_densenet else str, convert)
    return model


def _new_densenet_key(key: str) -> str:
    """Converts a key of torchvision's files, which have the original names: norm.1, now norm1."""
    return re.sub(r"\.(norm|conv)\.(\d)\.", r".\1\2.", key)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """What was loaded into a module.

    Attributes:
        name: The name of the model.
        report: Which keys of the file were loaded, and how many of them fit.
        tensors: The module's tensors by name, before layers were selected.
        misfits: The reason why a tensor was not loaded, by its name.
        extra: The tensors of the file that the module does not have, by name.
        modules: The names of the module's parts.
    """

    name: str
    report: str
    tensors: Tensors
    misfits: dict[str, str]
    extra: Tensors
    modules: set[str]


_loaded: weakref.WeakKeyDictionary[nn.Module, _Loaded] = weakref.WeakKeyDictionary()


def load_weights(
    module: nn.Module,
    path: Path,
    name: str,
    rename: Callable[[str], str] = str,
    convert: Callable[[Tensors], Tensors] = dict,
    adds: bool = True,
) -> None:
    """Loads the tensors of a checkpoint that fit a module. ``check_loaded`` must follow.

    Args:
        module: The module. Its tensors that are not loaded get arbitrary values.
        path: The checkpoint.
        name: The model's name, for messages.
        rename: A function that converts each key of the file, with its prefix.
        convert: A function that converts the tensors, with their prefix removed.
        adds: Whether a prefix of the model's keys may be added to those of the file.

    Raises:
        WeightsError: The file contains no weights, or none that fit.
    """
    tensors = {
        key: tensor
        for key, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)  # there may be extra states
    }
    found = {rename(key): tensor for key, tensor in read_tensors(path).items()}
    found = _without_wrappers(found, tensors)
    adapter = next((key for key in found if _ADAPTER.search(key)), None)
    if adapter is not None and not any(map(_ADAPTER.search, tensors)):
        raise WeightsError(
            f"{path.name} contains an adapter ({adapter}), which changes the weights of a base "
            "model: merge the two, for example with peft's merge_and_unload, and save the result"
        )
    removed, added = _prefixes(found, tensors, path.name, adds)
    given = {added + k[len(removed) :]: found[k] for k in found if k.startswith(removed)}
    if given.keys() & tensors.keys():
        try:
            given = convert(given)
        except ImageVecError:
            raise
        except Exception as error:  # of a library, for weights of another model
            first = str(error).partition("\n")[0]
            raise WeightsError(
                f"the weights do not fit {name!r}: {path.name} cannot be converted ({first})"
            ) from error
    misfits, extra = _load_fitting(module, tensors, given, name)
    counted = [key for key, tensor in tensors.items() if _is_trained(tensor) or key in given]
    fits = f"{len(counted) - len(misfits)} of {len(counted)} fit"
    where = f"keys under {removed!r}" if removed else f"the keys of {path.name}"
    edit = "after removing it" if removed else ""
    if added:
        edit = f"after replacing it with {added!r}" if removed else f"after adding {added!r}"
    report = f"{where}: {fits} {edit}".rstrip()
    modules = {key for key, _ in module.named_modules()}
    _loaded[module] = _Loaded(name, report, tensors, misfits, extra, modules)
    if misfits.keys() >= {key for key, tensor in tensors.items() if _is_trained(tensor)}:
        check_loaded(module, module)
    if edit:
        logger.info("%s: %s", path.name, report)


def _without_wrappers(found: Tensors, tensors: Tensors) -> Tensors:
    """Removes the names of wrappers that the model does not have from the keys of a file."""
    wrappers = _WRAPPERS - {part for key in tensors for part in key.split(".")}
    cleaned: Tensors = {}
    for key, tensor in found.items():
        parts = (part for part in key.split(".") if part not in wrappers)
        cleaned.setdefault(".".join(parts), tensor)
    return cleaned


def _load_fitting(
    module: nn.Module, tensors: Tensors, given: Tensors, name: str
) -> tuple[dict[str, str], Tensors]:
    """Loads the tensors that fit, and sets the others of the module to arbitrary values.

    Returns:
        The reasons why tensors of the module were not loaded, and tensors that it does not have.
    """
    reasons = {
        key: reason
        for key, tensor in given.items()
        if key in tensors and (reason := _why_not(tensor, tensors[key]))
    }
    fitting: Any = OrderedDict((key, given[key]) for key in given if key not in reasons)
    # Without a version, parts convert old keys where there are any. MNASNet needs its own.
    fitting._metadata = {"": {"version": module._version}}
    try:
        missing, unexpected = module.load_state_dict(fitting, strict=False)
    except RuntimeError as error:  # from parts that convert old keys
        first = " ".join(" ".join(str(error).splitlines()[1:4]).split())[:500]
        raise WeightsError(f"the weights do not fit {name!r}: {first}") from error
    loaded = {id(tensor) for key, tensor in tensors.items() if key not in missing}  # maybe tied
    misfits = {
        key: reasons.get(key, f"{_shape(tensor)} is not in the file")
        for key, tensor in tensors.items()
        if _is_trained(tensor) and id(tensor) not in loaded
    }
    with seeded(), torch.no_grad():
        for key in misfits:
            if not is_lazy(tensors[key]):
                tensors[key].uniform_()
    return misfits, {key: given[key] for key in unexpected if key in given}


def check_loaded(model: nn.Module, features: nn.Module) -> None:
    """Checks that a checkpoint contained all that the feature vectors of a model depend on.

    Args:
        model: A module of ``with_weights``, or any other.
        features: The module that computes the vectors, made from ``model``.

    Raises:
        WeightsError: In a part that computes the vectors, tensors are missing, have another shape,
            or are unknown to the model.
    """
    loaded = _loaded.pop(model, None)
    if loaded is None:
        return
    used = {id(tensor) for tensor in features.state_dict(keep_vars=True).values()}
    needed = {key for key, tensor in loaded.tensors.items() if id(tensor) in used}
    needed = needed or set(loaded.tensors)  # of a copy of the module
    start = f"the weights do not fit {loaded.name!r}: {loaded.report}"
    misfits = [f"{key} {reason}" for key, reason in loaded.misfits.items() if key in needed]
    if misfits:
        is_head = all(_HEADS.fullmatch(key.partition(".")[0]) for key in loaded.misfits)
        hint = "; layer='pooled' does not need the classifier"
        is_whole = needed == loaded.tensors.keys()
        raise WeightsError(f"{start}. {_first_of(misfits)}{hint if is_head and is_whole else ''}")
    extra = {
        f"{key} {_shape(tensor)}": _is_beside(key, loaded.modules, needed)
        for key, tensor in loaded.extra.items()
        if _is_trained(tensor)
    }
    unknown = [text for text, is_beside in extra.items() if not is_beside]
    if unknown:
        raise WeightsError(f"{start}, but the model lacks {_first_of(unknown)} of the file")
    ignored = [*extra, *(f"{key} {reason}" for key, reason in loaded.misfits.items())]
    if ignored:
        logger.info("%s: %s. Not needed: %s", loaded.name, loaded.report, _first_of(ignored))


def _is_beside(key: str, modules: set[str], needed: set[str]) -> bool:
    """Returns whether a tensor that the model lacks belongs to no part that computes the vectors.

    It may be a counter, be below a part that is not needed, such as another classifier in place of
    the model's, or below a head or loss that the model does not have.
    """
    *parts, name = key.split(".")
    if name in _COUNTERS:
        return True
    prefixes = ["", *itertools.accumulate(parts, "{}.{}".format)]
    deepest = max((prefix for prefix in prefixes if prefix in modules), key=len)
    if not deepest:
        return _HEADS.fullmatch((*parts, name)[0]) is not None
    return not any(tensor.startswith(f"{deepest}.") for tensor in needed)


def _prefixes(found: Tensors, tensors: Tensors, file: str, adds: bool) -> tuple[str, str]:
    """Returns the prefix to remove from a file's keys, and the one to add, so that most fit.

    Of prefixes with which equally many fit, one of averaged weights is preferred, as in timm, then
    the first.
    """
    votes: Counter[tuple[str, str]] = Counter()
    for key, tensor in found.items():
        if _is_trained(tensor):  # averaged weights may lack counters
            for prefix, rest in _splits(key):
                if rest in tensors and not _why_not(tensor, tensors[rest]):
                    votes[prefix, ""] += 1
    if adds and 2 * max(votes.values(), default=0) < sum(map(_is_trained, tensors.values())):
        votes += _votes_to_add(found, tensors)
    if not votes:
        return "", ""
    most = max(votes.values())
    best = [prefixes for prefixes, count in votes.items() if count == most]
    is_swapped = _SWAPPED in found

    def is_average(prefix: str) -> bool:
        return (_AVERAGED.search(prefix) is not None) is not is_swapped

    removed, added = min(best, key=lambda pair: (not is_average(pair[0]), pair[1]))
    others = [
        repr(prefix)
        for (prefix, _), count in votes.items()
        if prefix != removed and (count == most or (is_average(prefix) and 2 * count >= most))
    ]
    if others:
        is_known = is_average(removed)
        logger.log(
            logging.INFO if is_known else logging.WARNING,
            "%s has several sets of weights: using the keys under %r, not those under %s",
            file,
            removed,
            ", ".join(others),
        )
    return removed, added


def _votes_to_add(found: Tensors, tensors: Tensors) -> Counter[tuple[str, str]]:
    """Counts the keys that fit once a prefix of half the model's keys replaces the file's own."""
    counts = Counter(prefix for key in tensors for prefix, _ in _splits(key) if prefix)
    by_rest: dict[str, list[str]] = defaultdict(list)
    for key in tensors:
        for prefix, rest in _splits(key):
            if 2 * counts[prefix] >= len(tensors):
                by_rest[rest].append(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    for key, tensor in found.items():
        for removed, rest in _splits(key) if _is_trained(tensor) else ():
            for added in by_rest.get(rest, ()):
                if not _why_not(tensor, tensors[added + rest]):
                    votes[removed, added] += 1
    return votes


def _splits(key: str) -> Iterator[tuple[str, str]]:
    """Yields ``("", "a.b")`` and ``("a.", "b")`` for ``"a.b"``."""
    yield "", key
    for dot in re.finditer(r"\.", key):
        yield key[: dot.end()], key[dot.end() :]


def _why_not(tensor: torch.Tensor, target: torch.Tensor) -> str | None:
    """Returns the reason why a tensor cannot be loaded into another, or ``None``."""
    if tensor.is_meta:
        return "is on the meta device in the file, without values"
    if tensor.is_quantized or tensor.layout != torch.strided:
        return f"is {'quantized' if tensor.is_quantized else 'sparse'} in the file"
    kinds = [(t.is_floating_point(), t.is_complex()) for t in (tensor, target)]
    if kinds[0] != kinds[1]:
        return f"is {tensor.dtype} in the file, {target.dtype} in the model"
    if not is_lazy(target) and tensor.shape != target.shape:
        return f"is {_shape(tensor)} in the file, {_shape(target)} in the model"
    return None


def _is_trained(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is not one that the model computes itself: an index or a counter."""
    return tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized


def _shape(tensor: torch.Tensor) -> tuple[int, ...] | str:
    return "of any shape" if is_lazy(tensor) else tuple(tensor.shape)


def _first_of(texts: list[str]) -> str:
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return f"{'; '.join(texts[:3])}{more}"


@contextmanager
def seeded() -> Iterator[None]:
    """Seeds PyTorch's random numbers within the context."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def save_state_dict(model: nn.Module) -> Path:
    """Saves a model's weights as safetensors in the user's cache."""
    from safetensors.torch import save_file

    tensors = {
        name: value.detach().clone().contiguous() for name, value in model.state_dict().items()
    }
    needed_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with cache.temporary_folder(needed_bytes) as folder:
        path = folder / "weights.safetensors"
        save_file(tensors, path)
        return cache.store(path, move=True)


class no_memory(TorchFunctionMode):  # noqa: N801, a context manager
    """Creates the weights of modules on PyTorch's ``meta`` device, where tensors have only a shape.

    ``torch.device("meta")`` would also affect the tensors from which RegNets compute their widths.
    """

    _OF_WEIGHTS = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._OF_WEIGHTS:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


class no_random_init(TorchFunctionMode):  # noqa: N801, a context manager
    """Initialises modules with zeros, because random numbers take most of the build time.

    The values must be set: ``nn.init.trunc_normal_`` redraws until all are in its range.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))
