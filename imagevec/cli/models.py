"""``imagevec models``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from imagevec.models.registry import (
    TIMM_PREFIX,
    TorchvisionEntry,
    find_entry,
    infer_num_features,
    list_models,
    to_feature_model,
)

_MAX_TIMM = 20  # it has over a thousand, and each must be built to know its features


def models(search: str = "") -> list[dict[str, Any]]:
    """Name, ``num_features``, ``input_size`` in pixels, parameters, whether weights are at hand.

    Of timm's models no more than the first 20 that match are told.
    """
    wanted = search.removeprefix(TIMM_PREFIX)
    names = [
        name for name in list_models() if wanted in name and not search.startswith(TIMM_PREFIX)
    ]
    if search:
        names += _timm_names(wanted)[:_MAX_TIMM]
    return [_described(name) for name in names]


def show(rows: list[dict[str, Any]]) -> str:
    """A table for a person."""
    if not rows:
        return "no model has such a name"
    lines = [f"{'model':<48} {'features':>8} {'input':>6} {'parameters':>12}  weights"]
    for row in rows:
        at_hand = "here" if row["weights_at_hand"] else "to download"
        lines.append(
            f"{row['model']:<48} {row['num_features']:>8,} {row['input_size']:>6} "
            f"{row['parameters'] / 1e6:>10.1f} M  {at_hand}"
        )
    return "\n".join(lines)


def _described(name: str) -> dict[str, Any]:
    entry = find_entry(name)
    input_size = entry.preprocessing(None).crop_size
    with torch.device("meta"):
        model = entry.build(input_size).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    feature_model = to_feature_model(model, "pooled", normalize=False)
    (num_features,) = infer_num_features(feature_model, input_size)
    return {
        "model": name,
        "num_features": num_features,
        "input_size": input_size,
        "parameters": parameters,
        "weights_at_hand": isinstance(entry, TorchvisionEntry) and _is_at_hand(entry),
    }


def _is_at_hand(entry: TorchvisionEntry) -> bool:
    """Whether the default weights are in torch.hub's folder."""
    name: str = entry.weights_enum.DEFAULT.url.rpartition("/")[2]
    return (Path(torch.hub.get_dir()) / "checkpoints" / name).exists()


def _timm_names(part: str) -> list[str]:
    try:
        import timm
    except ImportError:
        return []
    return [TIMM_PREFIX + name for name in timm.list_models(f"*{part}*")]
