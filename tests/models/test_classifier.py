from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from imagevec.models.classifier import find_classifier

Head = Callable[[Any, torch.Tensor], Any]


class Net(nn.Module):
    """Computes 6 features of ``(N, 3, 8, 8)``, and returns what a head makes of them."""

    def __init__(self, head: Head, **layers: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.early = layers.pop("early", nn.Identity())
        self.body = nn.Conv2d(3, 6, kernel_size=3, stride=2)
        self.fc = layers.pop("fc", nn.Linear(6, 5))
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, images: torch.Tensor) -> Any:
        return self.head(self, self.body(images).relu().mean((2, 3)))


class Tanh(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).tanh()


class Named(nn.Linear):
    pass


def materialised() -> nn.Module:
    layer = nn.LazyLinear(5)
    layer(torch.zeros(1, 6))
    return layer


def keeps_features(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.kept = x.detach().clone()
    return net.fc(x)


def masks_a_class(net: Any, x: torch.Tensor) -> torch.Tensor:
    logits = net.fc(x)
    logits[:, 0] = -1e9
    return logits


def adds_in_place(net: Any, x: torch.Tensor) -> torch.Tensor:
    logits = net.fc(x)
    logits += x[:, :5]
    return logits


def adds_through_an_alias(net: Any, x: torch.Tensor) -> torch.Tensor:
    logits = net.fc(x)
    logits.view(-1).mul_(2)
    return logits


def ignores_a_head(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.extra(x)
    return net.fc(x)


def casts(net: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net.fc(x).float()


def in_a_list(net: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([head(x) for head in [net.fc]], dim=1)


CLASSIFIERS: dict[str, tuple[Head, dict[str, Any]]] = {
    "linear": (lambda net, x: net.fc(x), {}),
    "keyword": (lambda net, x: net.fc(input=x), {}),
    "forward": (lambda net, x: net.fc.forward(x), {}),
    "no_bias": (lambda net, x: net.fc(x), {"fc": nn.Linear(6, 5, bias=False)}),
    "subclass": (lambda net, x: net.fc(x), {"fc": Named(6, 5)}),
    "lazy": (lambda net, x: net.fc(x), {"fc": materialised()}),
    "weight_norm": (
        lambda net, x: net.fc(x),
        {"fc": parametrizations.weight_norm(nn.Linear(6, 5))},
    ),
    "spectral_norm": (
        lambda net, x: net.fc(x),
        {"fc": parametrizations.spectral_norm(nn.Linear(6, 5))},
    ),
    "registered_first": (lambda net, x: net.fc(x), {"early": nn.Linear(6, 5)}),
    "softmax": (lambda net, x: F.softmax(net.fc(x), dim=1), {}),
    "softmax_of_a_type": (lambda net, x: net.fc(x).softmax(-1, dtype=torch.float32), {}),
    "log_softmax": (lambda net, x: nn.LogSoftmax(1)(net.fc(x)), {}),
    "sigmoid": (lambda net, x: net.fc(x).sigmoid(), {}),
    "sigmoid_": (lambda net, x: net.fc(x).sigmoid_(), {}),
    "log_sigmoid": (lambda net, x: F.logsigmoid(net.fc(x)), {}),
    "expit": (lambda net, x: torch.special.expit(net.fc(x)), {}),
    "copies": (lambda net, x: net.fc(x).contiguous().clone().detach().float(), {}),
    "double": (lambda net, x: net.fc(x).double().softmax(1), {}),
    "type_as": (lambda net, x: net.fc(x).type_as(x), {}),
    "view": (lambda net, x: net.fc(x).view(-1, 5), {}),
    "view_as": (
        lambda net, x: net.fc(x).view(-1, 5, 1).view_as(torch.zeros(len(x), 5, device=x.device)),
        {},
    ),
    "dropout": (lambda net, x: nn.Dropout()(net.fc(x)) if net.training else net.fc(x), {}),
    "dropout_of_eval": (lambda net, x: F.dropout(net.fc(x), training=net.training), {}),
    "unsqueezed": (lambda net, x: net.fc(x[:, None])[:, 0], {}),
    "squeeze": (lambda net, x: net.fc(x[:, None, None]).squeeze(2).squeeze(1), {}),
    "one_of_a_list": (in_a_list, {}),
    "convolution": (
        lambda net, x: net.fc(x[..., None, None]).flatten(1),
        {"fc": nn.Conv2d(6, 5, 1)},
    ),
    "convolution_indexed": (
        lambda net, x: net.fc(x[..., None, None])[:, :, 0, 0],
        {"fc": nn.Conv2d(6, 5, 1)},
    ),
    "kept_features": (keeps_features, {}),
    "autocast": (casts, {}),
    "dropout_before": (lambda net, x: net.fc(F.dropout(x, training=net.training)), {}),
    "hidden_layer": (
        lambda net, x: net.fc(net.hidden(x).relu()),
        {"hidden": nn.Linear(6, 6)},
    ),
}

NONE: dict[str, tuple[Head, dict[str, Any]]] = {
    "features": (lambda net, x: x, {}),
    "tanh": (lambda net, x: net.fc(x).tanh(), {}),
    "relu": (lambda net, x: net.fc(x).relu(), {}),
    "relu_": (lambda net, x: net.fc(x).relu_(), {}),
    "normalize": (lambda net, x: F.normalize(net.fc(x)), {}),
    "scale": (lambda net, x: net.fc(x) * 10, {}),
    "batch_norm": (lambda net, x: net.norm(net.fc(x)), {"norm": nn.BatchNorm1d(5)}),
    "tanh_in_a_subclass": (lambda net, x: net.fc(x), {"fc": Tanh(6, 5)}),
    "residual": (lambda net, x: net.fc(x) + x[:, :5], {}),
    "residual_in_place": (adds_in_place, {}),
    "masked_class": (masks_a_class, {}),
    "written_through_an_alias": (adds_through_an_alias, {}),
    "gate": (lambda net, x: x * net.fc(x).sigmoid(), {"fc": nn.Linear(6, 6)}),
    "slice": (lambda net, x: net.fc(x)[:, :3], {}),
    "two_heads": (
        lambda net, x: torch.cat([net.fc(x), net.extra(x)], dim=1),
        {"extra": nn.Linear(6, 5)},
    ),
    "mean_of_heads": (
        lambda net, x: (net.fc(x) + net.extra(x)) / 2,
        {"extra": nn.Linear(6, 5)},
    ),
    "ignored_head": (ignores_a_head, {"extra": nn.Linear(6, 5)}),
    "branch": (lambda net, x: net.fc(x) if x.sum() > -1 else net.fc(-x), {}),
    "twice": (lambda net, x: net.fc(net.fc(x).relu()), {"fc": nn.Linear(6, 6)}),
    "twice_on_two_inputs": (lambda net, x: [net.fc(-x), net.fc(x)][1], {}),
    "functional": (lambda net, x: F.linear(x, net.fc.weight, net.fc.bias), {}),
    "bilinear": (lambda net, x: net.fc(x, x), {"fc": nn.Bilinear(6, 6, 5)}),
    "attention": (
        lambda net, x: net.fc(x[:, None], x[:, None], x[:, None])[0][:, 0],
        {"fc": nn.MultiheadAttention(6, 2, batch_first=True)},
    ),
    "maps": (
        lambda net, x: net.fc(x[..., None, None].repeat(1, 1, 2, 2)),
        {"fc": nn.Conv2d(6, 5, 1)},
    ),
    "flat_maps": (
        lambda net, x: net.fc(x[..., None, None].repeat(1, 1, 2, 2)).flatten(1),
        {"fc": nn.Conv2d(6, 5, 1)},
    ),
    "pooled_maps": (
        lambda net, x: net.fc(x[..., None, None].repeat(1, 1, 2, 2)).mean((2, 3)),
        {"fc": nn.Conv2d(6, 5, 1)},
    ),
    "larger_convolution": (
        lambda net, x: net.fc(x[..., None, None].repeat(1, 1, 3, 3)).flatten(1),
        {"fc": nn.Conv2d(6, 5, 3)},
    ),
    "mean_of_tokens": (lambda net, x: net.fc(x[:, None].repeat(1, 4, 1)).mean(1), {}),
    "random": (lambda net, x: F.dropout(net.fc(x)), {}),
    "class_numbers": (lambda net, x: net.fc(x).argmax(1, keepdim=True), {}),
    "tuple": (lambda net, x: (net.fc(x), x), {}),
    "dictionary": (lambda net, x: {"logits": net.fc(x)}, {}),
    "not_registered": (lambda net, x: net.others[0](x), {"others": [nn.Linear(6, 5)]}),
    "numpy": (lambda net, x: torch.from_numpy(net.fc(x).numpy()), {}),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_the_classifier_computes_the_output(case):
    head, layers = CLASSIFIERS[case]
    assert find_classifier(Net(head, **layers).eval(), torch.randn(1, 3, 8, 8)) == "fc"


@pytest.mark.parametrize("case", NONE)
def test_no_classifier_if_the_output_is_not_its_output(case):
    head, layers = NONE[case]
    assert find_classifier(Net(head, **layers).eval(), torch.randn(1, 3, 8, 8)) is None


@pytest.mark.parametrize("case", sorted({*CLASSIFIERS, *NONE} - {"branch", "numpy"}))
def test_shapes_are_enough_to_find_the_classifier(case):
    head, layers = {**CLASSIFIERS, **NONE}[case]
    net: Any = Net(head, **layers).eval().to("meta")
    expected = "fc" if case in CLASSIFIERS else None
    if case == "not_registered":
        net.others[0].to("meta")
    assert find_classifier(net, torch.zeros(1, 3, 8, 8, device="meta")) == expected


def test_values_pass_sparse_tensors_which_have_no_storage():
    def head(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.fc(torch.sparse.mm(torch.eye(6).to_sparse(), x.T).T)

    assert find_classifier(Net(head).eval(), torch.randn(1, 3, 8, 8)) == "fc"


def test_a_sequence_ends_in_its_classifier():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5), nn.LogSoftmax(1))
    assert find_classifier(model.eval(), torch.randn(1, 3, 8, 8)) == "2"


def test_a_graph_calls_its_classifier():
    model = fx.symbolic_trace(Net(lambda net, x: net.fc(x)).eval())
    assert find_classifier(model, torch.randn(1, 3, 8, 8)) == "fc"


def test_compiled_parts_run_eagerly():
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("since PyTorch 2.6")
    compiled: Any = torch.compile(nn.Linear(6, 6), fullgraph=True, backend="eager")
    model = Net(lambda net, x: net.fc(net.hidden(x)), hidden=compiled).eval()
    assert find_classifier(model, torch.randn(1, 3, 8, 8)) == "fc"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_model_has_no_layers_to_drop():
    model = torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)))
    assert find_classifier(model.eval(), torch.randn(1, 3, 8, 8)) is None


def test_models_are_left_as_they_were():
    model = Net(lambda net, x: net.fc(x)).eval()
    own = model.fc.forward
    model.fc.forward = lambda x: own(x)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert find_classifier(model, torch.randn(1, 3, 8, 8)) == "fc"
    assert {name: vars(module) for name, module in model.named_modules()} == before


def test_models_that_fail_are_left_as_they_were():
    model = Net(lambda net, x: net.fc(x.T)).eval()
    before = dict(vars(model.fc))
    with pytest.raises(RuntimeError):
        find_classifier(model, torch.randn(2, 3, 8, 8))
    assert vars(model.fc) == before
