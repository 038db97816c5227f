from __future__ import annotations

import json

import pytest

from imagevec import Preprocessing
from imagevec.cli import main
from imagevec.cli.models import _found, models
from imagevec.models import factory
from imagevec.models.factory import FactorySource
from imagevec.models.registry import SOURCES
from imagevec.models.source import REGISTERED
from tests.helpers.factories import tiny


def test_models_are_listed(capsys):
    assert main(["models", "--search", "resnet18", "--json"]) == 0
    (row, *rest) = json.loads(capsys.readouterr().out)["models"]
    assert (row["model"], row["num_features"], row["input_size"]) == ("resnet18", 512, 224)
    assert row["parameters"] == 11_689_512  # torchvision's own count
    assert row["weights_at_hand"] is False
    assert all("resnet18" in other["model"] for other in rest)
    assert any(other["model"] == "timm/resnet18" for other in rest)


def test_models_as_a_table(capsys):
    assert main(["models", "--search", "squeezenet1_1"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ["squeezenet1_1", "512", "224", "1.2", "M", "to", "download"]
    assert main(["models", "--search", "no such model"]) == 0
    assert capsys.readouterr().out == "no models found\n"


@pytest.mark.parametrize("name", ["regnet_y_400mf", "regnet_x_400mf"])
def test_a_model_that_computes_its_widths_is_described(name):
    (row,) = models(name)
    assert row["num_features"] in (400, 440)


@pytest.mark.parametrize(
    ("name", "num_features"),
    [
        ("timm/vit_tiny_r_s16_p8_224", 192),  # runs its backbone as it is built
        ("timm/vit_small_patch16_rope_mixed_224", 384),  # computes with its weights
    ],
)
def test_a_model_that_computes_as_it_is_built_is_described(name, num_features):
    pytest.importorskip("timm")
    (row,) = models(name)
    assert row["num_features"] == num_features


def test_a_model_that_is_not_supported_is_left_out():
    pytest.importorskip("timm")
    assert models("timm/deepseek_vit_412m") == []


def test_a_model_of_no_square_is_described(monkeypatch, capsys):
    preset = Preprocessing(resize_size=(36, 50), crop_size=(32, 48))
    monkeypatch.setitem(REGISTERED, "wide", FactorySource(tiny, preset, "wide"))
    assert main(["models", "--search", "wide"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("wide "))
    assert line.split()[:3] == ["wide", "8", "32x48"]


def test_case_does_not_matter():
    assert models("SqueezeNet1_1") == models("squeezenet1_1")


def test_the_case_of_a_prefix_does_not_matter():
    pytest.importorskip("timm")
    (row,) = models("TIMM/ViT_tiny_r_s16_P8_224")
    assert row["model"] == "timm/vit_tiny_r_s16_p8_224"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_the_names_of_a_source_are_found_in_any_case(source, monkeypatch):
    monkeypatch.setitem(REGISTERED, "My_ResNet18", FactorySource(tiny, registered_name="My"))
    found = source.names("resnet18")
    assert source.names("RESNET18") == source.names("ResNet18") == found
    assert all("resnet18" in name.casefold() for name in found)
    assert source is not factory or found == ["My_ResNet18"]


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_the_name_of_a_library_finds_its_models(library):
    pytest.importorskip(library)
    (found,) = _found(library).items()
    assert found[0] == f"{library}/" and len(found[1]) > 100
