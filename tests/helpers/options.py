"""Invalid options, and the text that the error message must contain."""

from __future__ import annotations

from typing import Any

import torch

WRONG_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"model": "resnet5"}, "'resnet50'"),
    ({"model": "ResNet50"}, "'resnet50'"),
    ({"model": "timm/resnet_18"}, "'timm/resnet18'"),
    ({"model": "timm/resnet18.nope"}, "timm/resnet18"),
    ({"model": 50}, "a zero-argument factory"),
    ({"model": torch.nn.Linear(2, 2)}, "a zero-argument factory"),
    ({"weights": "IMAGENET1K_V9"}, "'IMAGENET1K_V1'"),
    ({"weights": "randon"}, "'random'"),
    ({"weights": None}, "'random'"),
    ({"layer": "poled"}, "'pooled'"),
    ({"layer": "classifer"}, "'classifier'"),
    ({"layer": "features.99"}, "'features.9'"),
    ({"layer": ("pooled", "features.99")}, "'features.9'"),
    ({"layer": ["logits", "poled"]}, "'pooled'"),
    ({"layer": ()}, "('layer3', 'pooled')"),
    ({"layer": []}, "('layer3', 'pooled')"),
    ({"layer": ("pooled", 3)}, "('layer3', 'pooled')"),
    ({"layer": ("pooled", "logits", "pooled")}, "list 'pooled' only once"),
    ({"layer": None}, "layer=None"),
    ({"input_size": 0}, "an integer of at least 1"),
    ({"input_size": "224"}, "an integer of at least 1"),
    ({"input_size": {"height": 64, "width": 64}}, "or two: (height, width)"),
    ({"input_size": "64x48"}, "or two: (height, width)"),
    ({"input_size": (224, 0)}, "an integer of at least 1"),
    ({"input_size": (3, 224, 224)}, "(height, width)"),
    ({"input_size": 8}, "its own size is 224"),
    ({"normalize": "yes"}, "use True or False"),
    ({"precision": "bf16"}, "'bfloat16'"),
    ({"precision": "float61"}, "'float16'"),
    ({"precision": None}, "'float32'"),
    ({"precision": "float16", "device": "cpu"}, "'bfloat16'"),
    ({"engine": "troch"}, "'torch'"),
    ({"engine": None}, "'torch'"),
    ({"device": "cudda"}, "'cuda'"),
    ({"device": "gpu"}, "'cpu'"),
    ({"device": "cuda:one"}, "'cuda:0'"),
    ({"device": 0}, "'cuda:0'"),
    ({"device": None}, "'auto'"),
    ({"batch_size": 0}, "an integer of at least 1"),
    ({"batch_size": -8}, "an integer of at least 1"),
    ({"batch_size": 2.5}, "an integer of at least 1"),
    ({"batch_size": True}, "an integer of at least 1"),
    ({"batch_size": "many"}, "an integer of at least 1"),
    ({"max_pixels": 0}, "an integer of at least 1"),
    ({"max_pixels": None}, "an integer of at least 1"),
    ({"max_bytes": 0}, "an integer of at least 1"),
    ({"formats": ["JPEG", "JPG"]}, "'JPEG'"),
    ({"formats": "PGN"}, "'PNG'"),
    ({"formats": "EPS"}, "formats='EPS'"),
    ({"formats": []}, "JPEG"),
    ({"formats": None}, "JPEG"),
    ({"decode": "exakt"}, "'exact'"),
    ({"decode": None}, "'exact'"),
    ({"on_error": "rise"}, "'raise'"),
    ({"on_error": None}, "'null'"),
    ({"output": "arry"}, "'array'"),
    ({"output": None}, "'struct'"),
    ({"bach_size": 8}, "'batch_size'"),
    ({"modle": "resnet18"}, "'model'"),
]


def option_id(option: object) -> str | None:
    return str(option)[:40] if isinstance(option, dict) else ""
