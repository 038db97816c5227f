"""Small open_clip models, one of each kind, and a tokenizer like SigLIP's."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TRANSFORMER = {"width": 64, "layers": 2, "patch_size": 32, "image_size": 64}
TEXT = {"width": 64, "heads": 2, "layers": 2}
SENTENCES = [
    "a photo of a red shoe",
    "Grüße, a small dog!",
    "zwei Katzen 🐱 und 3.5 Hunde",
    "dress",
]

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-vit": {"embed_dim": 32, "vision_cfg": TRANSFORMER, "text_cfg": TEXT},
    "tiny-resnet": {
        "embed_dim": 32,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64},
        "text_cfg": TEXT,
    },
    "tiny-siglip": {
        "embed_dim": 192,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **TEXT,
            "context_length": 12,
            "hf_tokenizer_name": "",  # set by the fixture
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    },
    "tiny-mobile": {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 256,
            "timm_model_name": "fastvit_t8",
            "timm_pool": "avg",
            "timm_proj": None,
        },
        "text_cfg": {**TEXT, "no_causal_mask": True},
    },
    "tiny-coca": {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": {
            **TRANSFORMER,
            "attentional_pool": True,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "context_length": 76, "attn_pooler_heads": 2},
    },
}

TINY = [f"open_clip/{name}" for name in CONFIGS]


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer as on the hub: words, with ``</s>`` as end and padding, as in T5."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="</s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Returns open_clip with the small models registered."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    write_tokenizer(folder / "tokenizer")
    (folder / "configs").mkdir()
    for name, config in CONFIGS.items():
        if "hf_tokenizer_name" in config["text_cfg"]:
            text_cfg = {**config["text_cfg"], "hf_tokenizer_name": str(folder / "tokenizer")}
            config = {**config, "text_cfg": text_cfg}
        (folder / "configs" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "configs")
    yield open_clip


@functools.cache
def built(open_clip: Any, name: str) -> Any:
    """Builds imagevec's model for ``weights="random"`` with open_clip."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return open_clip.create_model(name.removeprefix("open_clip/"), pretrained_text=False).eval()


def encoded(open_clip: Any, name: str, texts: list[str]) -> Any:
    """Returns the result of open_clip's ``encode_text``: float32 ``(N, D)``."""
    import torch

    tokens = open_clip.get_tokenizer(name.removeprefix("open_clip/"))(texts)
    with torch.inference_mode():
        return built(open_clip, name).encode_text(tokens).numpy()
