from __future__ import annotations

from typing import Any

import pytest

from imagevec import (
    ImageVecError,
    OptionError,
    Preprocessing,
    list_models,
    register_model,
)
from imagevec.models.registry import find_source
from imagevec.models.source import ModelSource
from imagevec.options import ENGINES
from imagevec.plan import make_plan
from tests.helpers.factories import Tiny, tiny
from tests.helpers.pipeline import (
    run_python,
)

RANDOM: dict[str, Any] = {"weights": "random", "engine": "torch"}


def test_a_registered_model_is_known_by_its_name():
    register_model("seven", tiny, preprocessing=Preprocessing(resize_size=7, crop_size=7))
    assert "seven" in list_models()
    plan = make_plan(model="seven", **RANDOM)
    assert plan.spec.model == "seven"
    assert plan.spec.preprocessing.input_size == 7
    assert plan.spec.num_features == 8


@pytest.mark.parametrize("name", ["resnet50", "twice", "timm/anything"])
def test_a_name_is_registered_once(name):
    if "twice" not in list_models():
        register_model("twice", tiny)
    with pytest.raises(OptionError, match=f"{name}' is taken"):
        register_model(name, tiny)


def test_what_is_registered_is_a_factory():
    with pytest.raises(ImageVecError, match="function"):
        register_model("live", Tiny())
    with pytest.raises(OptionError, match="a function without arguments"):
        register_model("text", "resnet50")
    assert not {"live", "text"} & set(list_models())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet5", "'resnet50'"),
        ("mobilenetv3_large", "'mobilenet_v3_large'"),
        ("vit_b16", "'vit_b_16'"),
        ("tiny_vt", "'tiny_vit'"),
        ("timm/vit_tiny_patch_16_224", "'timm/vit_tiny_patch16_224'"),
    ],
)
def test_an_unknown_name_lists_the_nearest(name, nearest):
    with pytest.raises(OptionError) as refused:
        find_source(name).check("pooled")
    assert repr(name) in str(refused.value)
    assert nearest in str(refused.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("", {}, "the model name '' is not valid"),
        (7, {}, "the model name 7 is not valid"),
        ("wrong preprocessing", {"preprocessing": {}}, "use an imagevec.Preprocessing"),
    ],
)
def test_a_wrong_registration_is_refused(name, options, message):
    with pytest.raises(OptionError, match=message):
        register_model(name, tiny, **options)
    assert name not in list_models()


def test_sources_are_model_sources():
    for model in ("resnet50", "timm/resnet18", "open_clip/ViT-B-32", "tiny_vit", tiny):
        source = find_source(model)
        assert isinstance(source, ModelSource)
        assert set(source.backends) <= set(ENGINES)


def test_finding_a_source_imports_no_pytorch():
    printed = run_python("""
import sys
from imagevec.models.source import ModelSource
from imagevec.models.registry import find_source
from imagevec.options import ENGINES
print([find_source(name).name for name in ("resnet50", "timm/resnet18", "no model")])
print({"torch", "torchvision", "timm"} & sys.modules.keys())
""")
    assert printed == "['resnet50', 'timm/resnet18', 'no model']\nset()\n"
