"""What tells two modules apart."""

from __future__ import annotations

import functools
import importlib
import shutil
import sys

import torch
from torch import nn

from imagevec.models.content import content_digest
from tests.helpers.factories import Tiny, tiny_vit


def built(factory) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return factory()


def digest(factory, change=lambda model: None) -> str:
    model = built(factory)
    change(model)
    return content_digest(model)


def test_the_same_code_and_tensors_are_the_same_model():
    assert digest(Tiny) == digest(Tiny)
    assert digest(tiny_vit) == digest(tiny_vit)


def test_whatever_changes_the_output_changes_the_digest():
    def double_a_weight(model):
        model.fc.weight.data[0, 0] *= 2

    def add_an_attribute(model):
        model.scale = 2.0

    def replace_a_module(model):
        model.fc = nn.Identity()

    changes = [double_a_weight, add_an_attribute, replace_a_module, lambda model: None]
    assert len({digest(Tiny, change) for change in changes}) == len(changes)


def test_code_counts_and_its_name_does_not():
    def variant(scale):
        class Net(Tiny):
            def forward(self, images):
                return super().forward(images) * scale

        return Net

    def other():
        class Net(Tiny):
            def forward(self, images):
                return super().forward(images) + 1

        return Net

    digests = [digest(variant(1)), digest(variant(2)), digest(other())]
    assert len(set(digests)) == 3
    assert digest(variant(1)) == digests[0]


def test_a_function_that_is_used_counts():
    def net(function):
        class Net(Tiny):
            def forward(self, images):
                return function(super().forward(images))

        return Net

    digests = {digest(net(f)) for f in (lambda x: x, lambda x: -x, torch.relu)}
    assert len(digests) == 3
    assert digest(net(functools.partial(max, 1))) != digest(net(functools.partial(max, 2)))


def test_what_cannot_be_looked_into_is_never_the_same():
    def lock(model):
        model.stream = open(__file__)  # noqa: SIM115
        model.stream.close()

    assert digest(Tiny, lock) != digest(Tiny, lock)


def test_a_tensor_that_has_no_plain_memory_is_never_the_same():
    def sparse(model):
        model.register_buffer("sparse", torch.eye(3).to_sparse())

    assert digest(Tiny, sparse) != digest(Tiny, sparse)


def test_names_of_own_modules_are_looked_up(tmp_path, monkeypatch):
    """As in ``import settings`` beside a notebook, which then sets ``settings.scale``."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "settings.py").write_text("scale = 1\nother = 1\n")
    (tmp_path / "own" / "net.py").write_text(
        "import own.settings\n"
        "from tests.helpers.factories import Tiny\n"
        "class Net(Tiny):\n"
        "    def forward(self, images):\n"
        "        return super().forward(images) * own.settings.scale\n"
    )
    importlib.invalidate_caches()
    net, settings = importlib.import_module("own.net"), importlib.import_module("own.settings")
    first = digest(net.Net)
    monkeypatch.setattr(settings, "other", 2)
    assert digest(net.Net) == first
    monkeypatch.setattr(settings, "scale", 2)
    assert digest(net.Net) != first


def test_a_library_without_a_version_is_known_by_its_code(tmp_path, monkeypatch):
    tmp_path = tmp_path / "site-packages"
    tmp_path.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for operation in ("+", "-"):
        (tmp_path / "unversioned.py").write_text(
            "from tests.helpers.factories import Tiny\n"
            "class Net(Tiny):\n"
            f"    def forward(self, images): return super().forward(images) {operation} 1\n"
        )
        importlib.invalidate_caches()
        sys.modules.pop("unversioned", None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        digests.append(digest(importlib.import_module("unversioned").Net))
    assert digests[0] != digests[1]
