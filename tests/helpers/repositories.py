"""Folders of small models as timm and open_clip save them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.clip import CONFIGS, write_tokenizer

SMALL = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
DATA: dict[str, Any] = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
DATA |= {"crop_pct": 0.8, "interpolation": "bilinear"}


def write_timm(folder: Path, kind: str = "vit", **options: Any) -> Path:
    """Writes a folder as timm saves it."""
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        args = {} if kind == "resnet10t" else SMALL
        name = "resnet10t" if kind == "resnet10t" else "vit_tiny_patch16_224"
        model = timm.create_model(name, num_classes=5, **args)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    options = {"safe_serialization": True, "data_config": DATA, **options}
    timm.models._hub.save_for_hf(model, folder, model_args=args, **options)
    return folder


def edit(folder: Path, name: str = "config.json", **values: Any) -> None:
    """Changes values of a JSON file; ``a__b`` is the value ``b`` of ``a``."""
    content = json.loads((folder / name).read_text())
    for key, value in values.items():
        *parents, last = key.split("__")
        part = content
        for parent in parents:
            part = part[parent]
        part[last] = value
    (folder / name).write_text(json.dumps(content))


def write_clip(folder: Path, kind: str = "tiny-vit", **changes: Any) -> Path:
    """Writes a folder as open_clip's, whose configuration open_clip does not have."""
    open_clip = pytest.importorskip("open_clip")
    config = json.loads(json.dumps(CONFIGS[kind]))
    config["embed_dim"] = 40
    if kind == "tiny-siglip":
        config |= {"embed_dim": 192}
        config["text_cfg"]["hf_tokenizer_name"] = "someone/tokenizer"
    if kind == "tiny-vit" and "text_cfg" in changes:
        config |= {"custom_text": True, "text_cfg": changes["text_cfg"]}
    half = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
    preprocess = {**half, "resize_mode": "squash"}
    folder.mkdir()
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    if "hf_tokenizer_name" in config["text_cfg"]:
        write_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(
            f"local-dir:{readable(folder)}", load_weights=False, pretrained_text=False
        )
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder


def readable(folder: Path) -> Path:
    """Returns a copy whose text tower open_clip finds: it only knows it by path or on the hub."""
    copy = folder.with_name(f"{folder.name}-readable")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    if "hf_model_name" in (folder / "open_clip_config.json").read_text():
        (copy / "config.json").write_text(json.dumps(BERT))
        (folder / "config.json").write_text(json.dumps(BERT))
        edit(copy, "open_clip_config.json", model_cfg__text_cfg__hf_model_name=str(copy))
    return copy


# Like microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224.
BERT = {"model_type": "bert", "vocab_size": 200, "hidden_size": 32, "intermediate_size": 64}
BERT |= {"num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 1}
BERT |= {"max_position_embeddings": 32, "architectures": ["BertForMaskedLM"]}
BERT_TEXT = {
    "hf_model_name": "someone/bert",
    "hf_tokenizer_name": "someone/bert",
    "hf_proj_type": "mlp",
    "hf_pooler_type": "cls_last_hidden_state_pooler",
    "context_length": 16,
}
