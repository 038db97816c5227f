"""Tiny folders as ``save_pretrained`` of transformers writes them, with random weights."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.helpers.clip import SENTENCES
from tests.helpers.images import photo

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

SIDE = 32  # of most inputs, in pixels
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
    "image_size": SIDE,
    "patch_size": 8,
}
_PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_SWIN = {"image_size": SIDE, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
_SWIN |= {"window_size": 4}
_DINO = {key: value for key, value in _VIT.items() if key != "intermediate_size"}
_TEXT = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT |= {"intermediate_size": 37, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_TEXT |= {"max_position_embeddings": 40}
_TWO = {"projection_dim": 24, "text_config": _TEXT, "vision_config": _VIT}
_CLIP_TEXT = {**_TEXT, "bos_token_id": 198, "eos_token_id": 199}
_CLIP = {**_TWO, "text_config": _CLIP_TEXT}

_SQUARE = {"size": {"height": SIDE, "width": SIDE}}
_CROP = {"size": {"shortest_edge": SIDE + 3}, "crop_size": {"height": SIDE, "width": SIDE}}
_LARGE = {"size": {"shortest_edge": 130}, "crop_size": {"height": 128, "width": 128}}
_CROP_ONLY = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


class Tiny(NamedTuple):
    """What ``write`` saves: the names of classes of transformers, and their arguments."""

    model: str
    config: str
    options: dict[str, Any]
    processor: str = "ViTImageProcessor"
    processing: dict[str, Any] = _SQUARE


IMAGE_MODELS = {
    "vit": Tiny("ViTModel", "ViTConfig", _VIT),
    "vit-classifier": Tiny("ViTForImageClassification", "ViTConfig", _VIT),
    "vit-masked": Tiny("ViTForMaskedImageModeling", "ViTConfig", {**_VIT, "encoder_stride": 8}),
    "deit-classifier": Tiny(
        "DeiTForImageClassification",
        "DeiTConfig",
        _VIT,
        "DeiTImageProcessor",
        {"size": {"height": 37, "width": 37}, "crop_size": {"height": SIDE, "width": SIDE}},
    ),
    "deit-teacher": Tiny("DeiTForImageClassificationWithTeacher", "DeiTConfig", _VIT),
    "dinov2": Tiny("Dinov2Model", "Dinov2Config", _DINO, "BitImageProcessor", _CROP),
    "dinov2-classifier": Tiny(
        "Dinov2ForImageClassification", "Dinov2Config", _DINO, "BitImageProcessor", _CROP
    ),
    "dinov2-larger": Tiny(  # as on the hub: trained at 518, used at 224
        "Dinov2Model", "Dinov2Config", {**_DINO, "image_size": 56}, "BitImageProcessor", _CROP
    ),
    "dinov2-registers": Tiny(
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**_DINO, "num_register_tokens": 2},
        "BitImageProcessor",
        _CROP,
    ),
    "dinov3": Tiny(
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**_VIT, "num_register_tokens": 2},
        "DINOv3ViTImageProcessor",
    ),
    "dinov3-convnext": Tiny(
        "DINOv3ConvNextModel", "DINOv3ConvNextConfig", _PYRAMID, "DINOv3ViTImageProcessor"
    ),
    "clip": Tiny("CLIPModel", "CLIPConfig", _CLIP, "CLIPImageProcessor", _CROP_ONLY),
    "clip-classifier": Tiny(
        "CLIPForImageClassification", "CLIPConfig", _CLIP, "CLIPImageProcessor", _CROP_ONLY
    ),
    "clip-vision": Tiny(
        "CLIPVisionModel", "CLIPVisionConfig", _VIT, "CLIPImageProcessor", _CROP_ONLY
    ),
    "clip-vision-projection": Tiny(
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**_VIT, "projection_dim": 24},
        "CLIPImageProcessor",
        _CROP_ONLY,
    ),
    "siglip": Tiny("SiglipModel", "SiglipConfig", _TWO, "SiglipImageProcessor"),
    "siglip-vision": Tiny("SiglipVisionModel", "SiglipVisionConfig", _VIT, "SiglipImageProcessor"),
    "siglip-classifier": Tiny(
        "SiglipForImageClassification", "SiglipConfig", _TWO, "SiglipImageProcessor"
    ),
    "altclip": Tiny("AltCLIPModel", "AltCLIPConfig", _TWO, "CLIPImageProcessor", _CROP_ONLY),
    "chinese-clip": Tiny(
        "ChineseCLIPModel", "ChineseCLIPConfig", _TWO, "ChineseCLIPImageProcessor", _CROP_ONLY
    ),
    "blip": Tiny("BlipModel", "BlipConfig", _TWO, "BlipImageProcessor"),
    "metaclip2": Tiny("MetaClip2Model", "MetaClip2Config", _TWO, "CLIPImageProcessor", _CROP_ONLY),
    "aimv2": Tiny("Aimv2Model", "Aimv2Config", _CLIP, "CLIPImageProcessor", _CROP_ONLY),
    "aimv2-vision": Tiny(
        "Aimv2VisionModel", "Aimv2VisionConfig", _VIT, "CLIPImageProcessor", _CROP_ONLY
    ),
    "align": Tiny(
        "AlignModel",
        "AlignConfig",
        {
            "text_config": _TEXT,
            "vision_config": {"image_size": SIDE, "width_coefficient": 0.2, "hidden_dim": 32}
            | {"depth_coefficient": 0.2},
        },
        "EfficientNetImageProcessor",
        {**_SQUARE, "resample": 2},
    ),
    "convnext": Tiny(
        "ConvNextModel",
        "ConvNextConfig",
        _PYRAMID,
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": SIDE}},
    ),
    "convnextv2": Tiny(
        "ConvNextV2Model",
        "ConvNextV2Config",
        _PYRAMID,
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": SIDE}},
    ),
    "convnextv2-large": Tiny(
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        {"hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1]},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 384}},
    ),
    "swin": Tiny("SwinModel", "SwinConfig", _SWIN),
    "swin-classifier": Tiny("SwinForImageClassification", "SwinConfig", _SWIN),
    "swinv2": Tiny("Swinv2Model", "Swinv2Config", _SWIN),
    "beit": Tiny("BeitModel", "BeitConfig", _VIT, "BeitImageProcessor"),
    "beit-classifier": Tiny(
        "BeitForImageClassification",
        "BeitConfig",
        {**_VIT, "use_relative_position_bias": True},
        "BeitImageProcessor",
    ),
    "data2vec-vision": Tiny(
        "Data2VecVisionForImageClassification", "Data2VecVisionConfig", _VIT, "BeitImageProcessor"
    ),
    "resnet": Tiny(
        "ResNetForImageClassification",
        "ResNetConfig",
        {**_PYRAMID, "embedding_size": 8},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": SIDE}, "crop_pct": 0.95},
    ),
    "regnet": Tiny(
        "RegNetModel",
        "RegNetConfig",
        {**_PYRAMID, "embedding_size": 8, "groups_width": 4},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": SIDE}},
    ),
    "hiera": Tiny(
        "HieraModel",
        "HieraConfig",
        {"embed_dim": 8, "image_size": [64, 64], "depths": [1, 1, 1, 1]}
        | {"num_heads": [1, 1, 2, 2], "masked_unit_size": [8, 8]},
        "BitImageProcessor",
        {"size": {"shortest_edge": 70}, "crop_size": {"height": 64, "width": 64}},
    ),
    "mobilevit": Tiny(
        "MobileViTModel",
        "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": 2}
        | {"neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]},
        "MobileViTImageProcessor",
        {"size": {"shortest_edge": 70}, "crop_size": {"height": 64, "width": 64}}
        | {"do_flip_channel_order": False},
    ),
    "mobilevitv2": Tiny(
        "MobileViTV2Model",
        "MobileViTV2Config",
        {"image_size": 64, "width_multiplier": 0.25},
        "MobileViTImageProcessor",
        {"size": {"shortest_edge": 70}, "crop_size": {"height": 64, "width": 64}}
        | {"do_flip_channel_order": False},
    ),
    "mobilenet-v1": Tiny(
        "MobileNetV1Model",
        "MobileNetV1Config",
        {"depth_multiplier": 0.25, "image_size": SIDE},
        "MobileNetV1ImageProcessor",
        _CROP,
    ),
    "mobilenet-v2": Tiny(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"depth_multiplier": 0.25, "image_size": SIDE},
        "MobileNetV2ImageProcessor",
        _CROP,
    ),
    "efficientnet": Tiny(
        "EfficientNetModel",
        "EfficientNetConfig",
        {"image_size": SIDE, "width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256},
        "EfficientNetImageProcessor",
        {**_SQUARE, "resample": 2},
    ),
    "poolformer": Tiny(
        "PoolFormerModel", "PoolFormerConfig", _PYRAMID, "PoolFormerImageProcessor", _CROP_ONLY
    ),
    "levit": Tiny(
        "LevitForImageClassification",
        "LevitConfig",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 3]}
        | {"depths": [1, 1, 1], "key_dim": [8, 8, 8]},
        "LevitImageProcessor",
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
    ),
    "pvt": Tiny(
        "PvtModel",
        "PvtConfig",
        {**_PYRAMID, "image_size": 64, "num_attention_heads": [1, 2, 3, 4]},
        "PvtImageProcessor",
        {"size": {"height": 64, "width": 64}},
    ),
    "pvt-v2": Tiny(
        "PvtV2Model",
        "PvtV2Config",
        {**_PYRAMID, "image_size": 64, "num_attention_heads": [1, 2, 3, 4]},
        "PvtImageProcessor",
        {"size": {"height": 64, "width": 64}},
    ),
    "cvt": Tiny(
        "CvtModel",
        "CvtConfig",
        {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}
        | {"drop_path_rate": [0.0, 0.0, 0.0]},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": SIDE}},
    ),
    "swiftformer": Tiny(
        "SwiftFormerModel",
        "SwiftFormerConfig",
        {"depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16], "image_size": 64},
        processing={"size": {"height": 64, "width": 64}},
    ),
    "focalnet": Tiny(
        "FocalNetModel",
        "FocalNetConfig",
        {"image_size": SIDE, "patch_size": 2, "embed_dim": 8, "hidden_sizes": [8, 16]}
        | {"depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]},
        "BitImageProcessor",
        _CROP,
    ),
    "segformer": Tiny(
        "SegformerForImageClassification",
        "SegformerConfig",
        {**_PYRAMID, "num_attention_heads": [1, 2, 3, 4]},
        "SegformerImageProcessor",
        {"size": {"height": 64, "width": 64}},
    ),
    "vit-msn": Tiny("ViTMSNModel", "ViTMSNConfig", _VIT),
    "ijepa": Tiny("IJepaModel", "IJepaConfig", _VIT),
    "mlcd": Tiny("MLCDVisionModel", "MLCDVisionConfig", _VIT, "CLIPImageProcessor", _CROP_ONLY),
    "pixio": Tiny(
        "PixioModel", "PixioConfig", {**_DINO, "n_cls_tokens": 2}, "BitImageProcessor", _CROP
    ),
    "bit": Tiny(
        "BitModel",
        "BitConfig",
        {**_PYRAMID, "embedding_size": 8, "num_groups": 4},
        "BitImageProcessor",
        _LARGE,
    ),
}


def write(name: str, folder: Path) -> Path:
    """Saves a model and its image processor, deterministically."""
    import transformers

    tiny = IMAGE_MODELS[name]
    settings = getattr(transformers, tiny.config)(**tiny.options)
    size: Any = tiny.processing.get("crop_size") or tiny.processing["size"]
    side = size.get("height") or size["shortest_edge"]
    model = random_model(getattr(transformers, tiny.model), settings, side)
    model.save_pretrained(folder)
    processor = getattr(transformers, tiny.processor)(**tiny.processing)
    processor.save_pretrained(folder)
    return folder


def random_model(kind: Any, settings: Any, side: int) -> Any:
    """Builds a model whose random weights are large enough for vectors that differ."""
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = kind(settings)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.5 / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        norms = [x for x in model.modules() if isinstance(x, torch.nn.BatchNorm2d)]
        if norms:  # they get the statistics of photos, as after training
            for norm in norms:
                norm.momentum = 1.0
            encode = getattr(model, "get_image_features", model)
            model.train()
            photos = [np.array(photo(side, side, seed=seed), np.float32) for seed in range(16)]
            encode(pixel_values=torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2) / 128 - 1)
    return model.eval()


def write_tokenizer(model_type: str, folder: Path, length: int) -> None:
    """Saves a tokenizer of 200 tokens or fewer, as models of this type have it."""
    import transformers
    from tokenizers import (
        Regex,
        Tokenizer,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    if model_type in ("clip", "aimv2"):
        template = transformers.CLIPTokenizer().backend_tokenizer
        tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
        tokenizer.normalizer = template.normalizer
        tokenizer.pre_tokenizer = template.pre_tokenizer
        trainer = trainers.BpeTrainer(
            vocab_size=198,
            end_of_word_suffix="</w>",
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())[:60],
            show_progress=False,
        )
        tokenizer.train_from_iterator(SENTENCES, trainer)
        trained = json.loads(tokenizer.to_str())["model"]
        vocab = {**trained["vocab"], "<|startoftext|>": 198, "<|endoftext|>": 199}
        merges: Any = [tuple(pair) for pair in trained["merges"]]
        made: Any = transformers.CLIPTokenizer(vocab, merges, model_max_length=length)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        trainer = trainers.BpeTrainer(vocab_size=199, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(SENTENCES, trainer)
        start, pad, names = "<s> ", "<pad>", ["input_ids", "attention_mask"]
        if model_type == "siglip":  # as its tokenizer.json: the end is also the padding
            punctuation = normalizers.Replace(Regex(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"), "")
            space = normalizers.Replace(Regex(r"\s+"), " ")
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Lowercase(), punctuation, space, normalizers.Strip()]
            )
            start, pad, names = "", "</s>", ["input_ids"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start}$A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=pad,
            eos_token="</s>",
            unk_token="<unk>",
            model_max_length=length,
            model_input_names=names,
        )
    made.save_pretrained(folder)
