"""``parameter_groups``: every trained parameter once, what decays, and what comes of it in training."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import fastqat
from fastqat import FakeQuant, QConfig, QSpec, parameter_groups

pytestmark = pytest.mark.usefixtures("one_thread")


class RMSNorm2d(nn.Module):
    """A normalisation that torch does not know, with a weight of three dimensions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.square().mean(1, keepdim=True).add(1e-6).rsqrt() * self.weight


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), RMSNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5)]
    return nn.Sequential(*layers)


def prepared() -> nn.Sequential:
    model = network()
    spec: dict[str, Any] = {"bits": 4, "learn": "scale"}
    fastqat.prepare(model, QConfig(weight=QSpec(axis=0, **spec), activation=QSpec(**spec)))
    fastqat.calibrate(model, [torch.randn(8, 3, 6, 6)], progress=False)
    return model


def names(model: nn.Module, group: dict[str, Any]) -> list[str]:
    found = {id(p): name for name, p in model.named_parameters()}
    return [found[id(p)] for p in group["params"]]


def test_groups_of_a_prepared_network() -> None:
    model = prepared()
    weights, others, quantizers = parameter_groups(model, lr=0.1, weight_decay=0.01, quantizer_lr=1e-3)
    assert names(model, weights) == ["0.weight", "5.weight"]
    assert names(model, others) == ["0.bias", "1.weight", "1.bias", "2.weight", "5.bias"]
    assert sorted(map(id, quantizers["params"])) == sorted(map(id, fastqat.quantizer_parameters(model)))
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in (weights, others, quantizers)] == [
        ("weights", 0.1, 0.01),
        ("biases and norms", 0.1, 0.0),
        ("quantizers", 1e-3, 0.0),
    ]
    assert parameter_groups(model, lr=0.1)[2]["lr"] == 0.1
    everything = [id(p) for group in (weights, others, quantizers) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def test_scale_of_groups_is_no_weight() -> None:
    """It has two dimensions, [C, groups]."""
    quantizer = FakeQuant(bits=4, axis=0, group_size=4, learn="scale")
    quantizer(torch.randn(3, 8))
    (group,) = parameter_groups(quantizer, lr=0.1, weight_decay=0.5)
    assert group["params"][0].dim() == 2 and group["name"] == "quantizers" and group["weight_decay"] == 0


def test_shared_and_frozen() -> None:
    """A tied weight once; what is not trained never, with its scales, as LoRA does it."""
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7), "lora": nn.Linear(4, 2, bias=False)})
    model["head"].weight = model["embed"].weight
    weights, others = parameter_groups(model, lr=0.1)
    assert names(model, weights) == ["embed.weight", "lora.weight"] and names(model, others) == ["head.bias"]
    fastqat.prepare(model, QConfig(QSpec(4, axis=0, learn="scale"), None))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lora.weight")
    (group,) = parameter_groups(model, lr=0.1)
    assert names(model, group) == ["lora.weight"]


def test_as_parametrization() -> None:
    layer = nn.Linear(4, 3)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", FakeQuant(bits=3, axis=0, learn="scale"))
    groups = {g["name"]: names(layer, g) for g in parameter_groups(layer, lr=0.1)}
    assert groups == {
        "weights": ["parametrizations.weight.original"],
        "biases and norms": ["bias"],
        "quantizers": ["parametrizations.weight.0.scale"],
    }


def test_pieces_of_flat_parameters() -> None:
    """FSDP with original parameters shows each as a vector: the name and the kind of layer decide then."""
    layer, norm = nn.Linear(4, 3), nn.LayerNorm(4)
    model = nn.Sequential(layer, norm)
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()
        parameter._fsdp_flattened = True  # type: ignore[attr-defined]
    groups = {g["name"]: names(model, g) for g in parameter_groups(model, lr=0.1)}
    assert groups == {"weights": ["0.weight"], "biases and norms": ["0.bias", "1.weight", "1.bias"]}
    layer.weight._is_flat_param = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"^model: wanted .*use_orig_params=True; got the flat 0\.weight"):
        parameter_groups(model, lr=0.1)


def test_one_step_is_that_of_the_equations() -> None:
    """SGD: p - lr * (g + decay * p), with each group's own numbers."""
    model = prepared()
    kinds = {"0.weight": (0.1, 0.25), "0.bias": (0.1, 0.0), "1.weight": (0.1, 0.0), "2.weight": (0.1, 0.0)}
    parameters = dict(model.named_parameters())
    scale = next(name for name in parameters if name.startswith("0.weight_fake_quant") and name.endswith("scale"))
    kinds[scale] = (1e-3, 0.0)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.25, quantizer_lr=1e-3))
    model(torch.randn(8, 3, 6, 6)).square().mean().backward()
    wanted = {
        name: parameters[name].detach().double()
        - lr * (parameters[name].grad.double() + decay * parameters[name].detach().double())
        for name, (lr, decay) in kinds.items()
    }
    optimizer.step()
    for name, value in wanted.items():
        torch.testing.assert_close(parameters[name].detach().double(), value, rtol=1e-6, atol=1e-8)


def test_learned_scales_train() -> None:
    """A scale ten times too large finds its way back, and with decay alone nothing of a quantizer shrinks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    fastqat.prepare(model, QConfig(QSpec(4, axis=0, learn="scale", grad_scale=1.0), None))
    scale = model[0].weight_fake_quant.scale
    with torch.no_grad():
        model[0].weight_fake_quant.scale.mul_(10)
    start, weight = scale.detach().clone(), model[0].weight.detach().clone()
    x = torch.randn(256, 16)
    target = x @ weight.t()
    groups = parameter_groups(model, lr=0.0, weight_decay=0.5, quantizer_lr=0.02)
    optimizer = torch.optim.AdamW(groups)
    first = last = 0.0
    for step in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        first, last = (loss.item(), 0.0) if step == 0 else (first, loss.item())
    assert last < first / 4 and bool((scale < start).any())
    held = scale.detach().clone()
    still = torch.optim.AdamW(parameter_groups(model, lr=0.1, weight_decay=0.5, quantizer_lr=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = model[0].weight.detach().clone()
    still.step()
    assert torch.equal(scale, held)
    torch.testing.assert_close(model[0].weight.detach(), before * (1 - 0.1 * 0.5))


def test_rates_on_the_device() -> None:
    rate = torch.tensor(0.5)
    assert all(group["lr"] is rate for group in parameter_groups(prepared(), lr=rate))


@pytest.mark.parametrize("name", ["lr", "weight_decay", "quantizer_lr"])
@pytest.mark.parametrize(
    ("value", "kind"), [(-1.0, ValueError), (float("nan"), ValueError), ("fast", TypeError), (True, TypeError)]
)
def test_wrong_rates_are_named(name: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=rf"^{name}: wanted a .*got .*{re.escape(str(value))}"):
        parameter_groups(network(), **{"lr": 0.1, name: value})


def test_wrong_models_are_named() -> None:
    with pytest.raises(ValueError, match="^model: wanted a module with parameters that are trained; got ReLU"):
        parameter_groups(nn.ReLU(), lr=0.1)
    with pytest.raises(ValueError, match=r"^model: wanted parameters of known shape; got none yet for 0\.weight"):
        parameter_groups(nn.Sequential(nn.LazyLinear(3)), lr=0.1)
