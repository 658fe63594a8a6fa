"""What a quantizer keeps: through copies, changes of dtype, and checkpoints whole, absent or broken."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import fastqat
from fastqat import FakeQuant

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "lsq": {"axis": 0, "learn": "scale", "grad_scale": "lsq"},
    "lsq+": {"axis": 1, "learn": "scale+offset", "bits": 2},
    "affine_groups": {"axis": 0, "group_size": 3, "symmetric": False, "learn": "scale+zero_point"},
    "running": {"axis": 1, "range": "running_minmax", "bits": 8},
    "unsigned": {"range": "minmax"},
    "restricted": {"restricted": True, "range": "percentile", "bits": 3},
}
of_kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def used(options: dict[str, Any]) -> FakeQuant:
    """A quantizer that has seen data, with time passed."""
    fq = FakeQuant(**{"bits": 4, **options})
    fq(X.abs())
    fq(2 * X.abs())
    fastqat.step(fq)
    return fq


def through_file(fq: FakeQuant) -> FakeQuant:
    """torch.save and torch.load of the module."""
    buffer = io.BytesIO()
    torch.save(fq, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def same(a: FakeQuant, b: FakeQuant) -> bool:
    """Equal state, codes and outputs, to the bit."""
    states = (a.state_dict(), b.state_dict())
    equal = states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    told = (a.bits, a.codes, a.eps, a.initialized) == (b.bits, b.codes, b.eps, b.initialized)
    return equal and told and torch.equal(a.eval()(X), b.eval()(X))


@of_kinds
@pytest.mark.parametrize(
    "clone", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file), ids=("deepcopy", "pickle", "file")
)
def test_copies(options: dict[str, Any], clone: Callable) -> None:
    """Equal at first, and of their own from then on."""
    fq = used(options)
    twin = clone(fq)
    assert twin.training and same(fq, twin)
    with torch.no_grad():
        twin.scale.mul_(2)
    twin.bits = 5
    assert not torch.equal(fq.scale, twin.scale) and fq.bits != 5 and fq.qrange.tolist() == list(fq.codes)


@of_kinds
@pytest.mark.parametrize(
    "change",
    (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to("cpu", torch.float16)),
    ids=("half", "bfloat16", "double", "to"),
)
def test_dtype_of_the_model(options: dict[str, Any], change: Callable) -> None:
    """A model that changes its dtype changes no bit of a quantizer; a bfloat16 x is quantized by float32 values."""
    fq = used(options)
    net = nn.Sequential(nn.Linear(6, 6), copy.deepcopy(fq))
    change(net)
    assert net[0].weight.dtype != torch.float32 and same(net[1], fq)
    lazy = change(FakeQuant(4, axis=0))
    lazy(X.bfloat16())
    assert lazy.scale.dtype == torch.float32


@of_kinds
def test_reload_into_a_fresh_module(options: dict[str, Any]) -> None:
    """Bits, sign, shapes, eps, time and range come from the checkpoint."""
    fq = used({**options, "eps": 1e-5})
    fresh = FakeQuant(**{**options, "bits": 6})
    with pytest.warns(UserWarning, match=f"has {fq.bits} bits, and the model had 6"):
        fresh.load_state_dict(fq.state_dict())
    assert fresh.initialized and not is_lazy(fresh.scale) and fresh.step.item() == 1
    assert fresh.bits == options.get("bits", 4) and same(fq, fresh)
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in fq.parameters()]
    x = 3 * X.abs()
    fq.train(), fresh.train()
    assert torch.equal(fq(x), fresh(x)) and same(fq, fresh)  # and it goes on from there


def test_the_floor_of_the_scale_is_kept() -> None:
    """eps comes from the checkpoint, and is what a scale below it counts as."""
    fq, fresh = used({"learn": "scale", "signed": True, "eps": 0.25}), FakeQuant(4)
    with torch.no_grad():
        fq.scale.fill_(-3)
    fresh.load_state_dict(fq.state_dict())
    for quantizer in (fq, fresh):
        assert quantizer(torch.tensor([-9.0, 0.3, 9.0])).tolist() == [-2.0, 0.25, 1.75]


def model() -> nn.Sequential:
    """Three quantizers among layers."""
    return nn.Sequential(nn.Linear(6, 6), FakeQuant(4), nn.Linear(6, 6), FakeQuant(4, axis=1), FakeQuant(4, axis=0))


def test_a_float_checkpoint_loads_strictly() -> None:
    """All keys of all quantizers missing: one warning for the model, and quantizers that wait for data."""
    net = model()
    net(X)
    plain = {k: v for k, v in net.state_dict().items() if k.split(".")[1] in ("weight", "bias")}
    for target in (model(), net):
        for _ in range(2):  # a second load warns again
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                target.load_state_dict(plain)
            assert len(caught) == 1 and "uninitialized" in str(caught[0].message)
        assert not any(m.initialized for m in target if isinstance(m, FakeQuant))
        target(7 * X)
        assert all(m.initialized for m in target if isinstance(m, FakeQuant))


def test_an_uninitialized_quantizer_saves_that_it_is() -> None:
    """The keys of one with a range, and NaN for a scale, which leaves another one uninitialized."""
    net, used_net = model(), model()
    used_net(X)
    state = net.state_dict()
    assert state.keys() == used_net.state_dict().keys() and state["1.scale"].isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        used_net.load_state_dict(state)
    assert not any(m.initialized for m in used_net if isinstance(m, FakeQuant))
    used_net(7 * X)
    net.load_state_dict(used_net.state_dict())
    assert all(m.initialized for m in net if isinstance(m, FakeQuant)) and torch.equal(net(X), used_net(X))


def test_a_fixed_range_needs_no_checkpoint() -> None:
    """The user gave it: no warning, and it stays."""
    fq = FakeQuant(4, range="fixed", scale=torch.tensor([0.5]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fq.load_state_dict({})
    assert fq.initialized and fq.scale.item() == 0.5


@pytest.mark.parametrize("fresh", (False, True))
@pytest.mark.parametrize("key", ("scale", "qrange", "step", "eps"))
def test_a_missing_key_is_an_error(key: str, fresh: bool) -> None:
    """The message names the quantizer and what it lacks; strict or not."""
    net = model()
    net(X)
    state = net.state_dict()
    del state[f"3.{key}"]
    target = model() if fresh else net
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=rf"quantizer '3': .*got a checkpoint without {key}"):
            target.load_state_dict(state, strict=strict)
    assert target[3].initialized != fresh


@pytest.mark.parametrize(
    "saved, loading",
    (
        ({"signed": False}, {"signed": True}),
        ({"restricted": True}, {}),
        ({"signed": True}, {"restricted": True}),
        ({"symmetric": False}, {}),
        ({}, {"symmetric": False}),
        ({"axis": 0}, {}),
        ({"range": "minmax"}, {}),
    ),
    ids=str,
)
def test_a_checkpoint_of_another_quantizer(saved: dict[str, Any], loading: dict[str, Any]) -> None:
    """Other codes, another grid or another granularity do not load."""
    fq, other = FakeQuant(4, **saved), FakeQuant(4, **loading)
    fq(X)
    with pytest.raises(RuntimeError, match=r"quantizer ''|size mismatch for scale|Unexpected key"):
        other.load_state_dict(fq.state_dict())


def test_state_moves_with_the_model() -> None:
    """Every tensor of a quantizer follows `.to(device)`, lazy ones included."""
    for fq in (used(KINDS["running"]), FakeQuant(4, axis=0)):
        fq.to("meta")
        tensors: list[Tensor] = [*fq.parameters(), *fq.buffers()]
        assert len(tensors) >= 3 and all(t.device.type == "meta" for t in tensors)
