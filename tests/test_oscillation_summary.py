"""What is said of tracked weights: counts against the definition, kinds of layers, places between the codes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastqat
from fastqat import FakeQuant, Oscillation, QConfig, QSpec
from fastqat.oscillation import channels_of, kind_of_layer, latent_codes, quantized_weights

CODES = ((0, 0), (1, 0), (0, 1), (1, 2), (0, 1), (1, 2), (1, 1), (1, 2))  # two weights, step by step
TRACKED = QConfig(QSpec(bits=3, learn="scale", oscillation=Oscillation()), None)


class Two(nn.Module):
    """A linear layer of two weights, and one of 8 bits; codes are those of the weights, as the scale is 1."""

    def __init__(self, oscillation: Oscillation) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(2, 1, bias=False), nn.Linear(1, 1)
        fastqat.prepare(self, QConfig(QSpec(bits=3, signed=True, oscillation=oscillation), None), overrides=EIGHT)
        self.layer.weight_fake_quant.set_grid(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x))


EIGHT = {"last": {"bits": 8}}


def played(oscillation: Oscillation) -> Two:
    """A model whose two weights have gone through the codes above."""
    model = Two(oscillation)
    for step, codes in enumerate(CODES):
        with torch.no_grad():
            model.layer.weight.copy_(torch.tensor([codes], dtype=torch.float32) + 0.25)
        if step:
            fastqat.step(model)
        model(torch.ones(1, 2))
    return model


def frequencies(momentum: float) -> list[float]:
    """f of both weights at the end, from its definition in float64."""
    found = []
    for codes in zip(*CODES, strict=True):
        f, last = 0.0, 0
        for before, now in zip(codes, codes[1:], strict=False):
            way = int(np.sign(now - before))
            f = momentum * (way * last == -1) + (1 - momentum) * f
            last = way or last
        found.append(f)
    return found


def test_counts_of_a_known_trace() -> None:
    low, high = sorted(frequencies(0.1))
    assert low < high
    model = played(Oscillation(momentum=0.1))
    for threshold, share in ((low * 0.999, 1.0), ((low + high) / 2, 0.5), (high * 1.001, 0.0)):
        summary = fastqat.oscillation_summary(model, threshold)
        wanted = {"kind": "linear", "weights": 2, "oscillating": share, "frozen": 0.0}
        wanted |= {"transitions_per_step": 11 / 7, "oscillations": 8}  # counted by hand, in the codes above
        assert summary.pop("layers") == {"layer": wanted}
        assert summary.pop("untracked") == {"last": "8 bits, and no more than 4 are tracked"}
        del wanted["kind"]
        assert summary == {"threshold": threshold, **wanted}


def test_frozen_weights_oscillate_no_longer() -> None:
    """As in the trace of the algorithm with the threshold 0.25: one weight is frozen in step 3, the other in step 6."""
    summary = fastqat.oscillation_summary(played(Oscillation(momentum=0.1, freeze_threshold=0.25)))
    assert (summary["oscillating"], summary["frozen"]) == (0.0, 1.0)


def test_totals_weigh_layers_by_their_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 40), nn.Linear(40, 1))
    fastqat.prepare(model, TRACKED)
    for _ in range(30):
        with torch.no_grad():
            model[0].weight.normal_()  # all of these oscillate, and none of the others
        model(torch.ones(1, 2))
        fastqat.step(model)
    summary = fastqat.oscillation_summary(model)
    first, second = summary["layers"]["0"], summary["layers"]["1"]
    assert first["oscillating"] > 0.5 and second["oscillating"] == second["transitions_per_step"] == 0
    assert summary["weights"] == 120
    assert summary["oscillating"] == pytest.approx(first["oscillating"] * 80 / 120, abs=1e-12)
    assert summary["transitions_per_step"] == first["transitions_per_step"]


def test_why_layers_are_not_tracked() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    fastqat.prepare(model, TRACKED, overrides={"1": {"oscillation": None}, "2": {"bits": 5}})
    summary = fastqat.oscillation_summary(model)
    reasons = ("no training step yet", "its quantizer does not track", "5 bits, and no more than 4 are tracked")
    assert summary["untracked"] == dict(zip("012", reasons, strict=True))
    assert (summary["layers"], summary["weights"], summary["oscillating"]) == ({}, 0, 0.0)
    assert fastqat.oscillation_summary(nn.ReLU())["untracked"] == {}


def counted(method: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
    """A method that counts its calls by its name."""

    def call(*args: Any) -> Any:
        calls[method.__name__] += 1
        return method(*args)

    return call


def test_it_reads_and_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it waits for the device once, whatever the number of layers."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    fastqat.prepare(model, TRACKED)
    model(torch.ones(1, 4))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    waits: Counter[str] = Counter()
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, counted(getattr(Tensor, name), waits))
    fastqat.oscillation_summary(model)
    monkeypatch.undo()
    assert waits == {"tolist": 1}
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)


def test_threshold_that_is_none() -> None:
    for threshold in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="threshold: wanted a number of at least 0; got"):
            fastqat.oscillation_summary(nn.Linear(1, 1), threshold)


@pytest.mark.parametrize(
    ("layer", "kind"),
    (
        (nn.Conv2d(4, 4, 3, groups=4), "depthwise"),
        (nn.Conv1d(4, 8, 3, groups=4), "depthwise"),
        (nn.Conv2d(4, 8, 1), "pointwise"),
        (nn.Conv2d(4, 8, (1, 3)), "convolution"),
        (nn.Conv2d(4, 4, 1, groups=2), "convolution"),
        (nn.Conv2d(1, 4, 3), "convolution"),
        (nn.ConvTranspose2d(4, 4, 2, groups=4), "depthwise"),
        (nn.Linear(2, 2), "linear"),
        (nn.MultiheadAttention(4, 2), "linear"),
        (nn.Embedding(4, 4), "embedding"),
        (nn.BatchNorm1d(4), "other"),
    ),
)
def test_kinds_of_layers(layer: nn.Module, kind: str) -> None:
    assert kind_of_layer(layer) == kind


def test_names_of_weights() -> None:
    """A shared weight has the name of its first layer; of several in one layer each has its own."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    model["b"].weight = model["a"].weight
    fastqat.prepare(model, TRACKED)
    model["own"] = nn.Linear(2, 2)
    parametrize.register_parametrization(model["own"], "weight", FakeQuant(bits=3, oscillation=Oscillation()))
    found = {each.name: each for each in quantized_weights(model)}
    assert list(found) == ["a", "attention.in_proj_weight", "attention.out_proj", "own"]
    assert torch.equal(found["own"].latent(), model["own"].parametrizations.weight.original)
    assert {each.kind for each in found.values()} == {"linear"}


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"axis": 0},
        {"axis": 1},
        {"axis": -1},
        {"axis": 0, "group_size": 6},
        {"symmetric": False},
        {"symmetric": False, "axis": 0},
        {"symmetric": False, "learn": "scale+offset", "axis": 0},
    ),
    ids=str,
)
def test_latent_codes(options: dict[str, Any]) -> None:
    """What is nearest to a code has it; and single values lie where they lie in the whole weight."""
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    quantizer = FakeQuant(bits=3, range="minmax", **options)
    quantized = quantizer(weight)
    latent = latent_codes(weight, quantizer)
    qmin, qmax = quantizer.codes
    channels = channels_of(weight, quantizer)
    assert latent.shape == channels.shape == weight.shape
    scale, shift = quantizer.scale.detach().flatten()[channels].double(), torch.zeros(())
    if quantizer.zero_point is not None:
        shift = quantizer.zero_point.detach().flatten()[channels].round()
    if quantizer.offset is not None:
        shift = -quantizer.offset.detach().flatten()[channels].double() / scale
    assert (latent - (weight.double() / scale + shift)).abs().max() < 1e-5
    assert (scale * (latent.round().clamp(qmin, qmax) - shift) - quantized.detach()).abs().max() < 1e-6
    place = torch.unravel_index(torch.tensor([0, 7, 29, 47]), weight.shape)
    assert torch.equal(latent_codes(weight[place], quantizer, channels[place]), latent[place])
