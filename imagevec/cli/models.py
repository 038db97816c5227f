"""List the available models."""

from __future__ import annotations

import argparse
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from imagevec.models.source import ModelSource
    from imagevec.spec import Preprocessing, Tokenization

_MAX_OF_LIBRARY = 20  # timm has over a thousand, and each is built to count its features


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--search",
        default="",
        help="only models whose names contain this; includes timm and open_clip, as in 'timm/vit'",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    return {"models": models(options.search)}


def models(search: str = "") -> list[dict[str, Any]]:
    """Returns name, features, input size in pixels, parameters, and whether weights are on disk.

    The input size is the side of a square, or the height and width.
    For libraries whose names have a prefix, such as timm, it returns the first 20 matches of a
    search, and none without a search.
    """
    names = []
    for prefix, found in _found(search.casefold()).items():
        names += found[:_MAX_OF_LIBRARY] if prefix else sorted(found)
    return [row for name in names if (row := _described(name)) is not None]


def _found(search: str) -> dict[str, list[str]]:
    """Returns the matching names, by prefix."""
    from imagevec.models.registry import SOURCES

    prefixes = {source.PREFIX for source in SOURCES if source.PREFIX and search}
    if f"{search}/" in prefixes:
        search += "/"
    asked = {prefix for prefix in prefixes if search.startswith(prefix)} or {"", *prefixes}
    found: dict[str, list[str]] = {prefix: [] for prefix in sorted(asked)}
    for source in SOURCES:
        if source.PREFIX in asked:
            found[source.PREFIX] += source.names(search.removeprefix(source.PREFIX))
    return found


def show(result: dict[str, Any]) -> str:
    rows = result["models"]
    if not rows:
        return "no models found"
    lines = [f"{'model':<48} {'features':>8} {'input':>9} {'parameters':>12}  weights"]
    for row in rows:
        at_hand = "on disk" if row["weights_at_hand"] else "to download"
        size = row["input_size"]
        size = "x".join(map(str, size)) if isinstance(size, tuple) else size
        lines.append(
            f"{row['model']:<48} {row['num_features']:>8,} {size:>9} "
            f"{row['parameters'] / 1e6:>10.1f} M  {at_hand}"
        )
    return "\n".join(lines)


def _described(name: str) -> dict[str, Any] | None:
    """Returns a row of the list, or ``None`` for a library's model that is not supported."""
    from imagevec.errors import OptionError
    from imagevec.models.features import example_input
    from imagevec.models.layers import infer_num_features
    from imagevec.models.registry import find_source

    source = find_source(name)
    try:
        preprocessing = source.preprocessing(None)
    except OptionError:
        return None
    input_size = preprocessing.input_size
    model = _built(source, preprocessing).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    example = functools.partial(example_input, preprocessing)
    feature_model = source.to_features(model, "pooled", False, example)
    device = "meta" if source.infers_shapes else "cpu"
    (num_features,) = infer_num_features(feature_model, example(1).to(device))
    return {
        "model": name,
        "num_features": num_features,
        "input_size": input_size,
        "parameters": parameters,
        "weights_at_hand": source.has_weights(),
    }


def _built(source: ModelSource, preprocessing: Preprocessing | Tokenization) -> nn.Module:
    """Builds the model, without memory for its weights if possible."""
    from imagevec.errors import OptionError
    from imagevec.models.state_dict import no_memory

    if source.infers_shapes:
        try:
            with no_memory():
                return source.build(preprocessing)
        except (RuntimeError, OptionError):  # some models compute with weights while being built
            pass
    return source.build(preprocessing)
