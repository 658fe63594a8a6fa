"""Weights that begin at zero: their range grows with them until they have settled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, QConfig, QSpec

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, RANK = 16, 4


def adapter(spec: QSpec | None, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """B of a LoRA adapter, zero, on a fixed A; and the B that is wanted."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False))
    net[0].requires_grad_(False)
    nn.init.zeros_(net[1].weight)
    wanted = torch.randn(WIDTH, RANK)
    if spec is not None:
        fastqat.prepare(net, QConfig(spec, None), overrides={"0": None})
    return net, wanted


def train(net: nn.Module, wanted: Tensor, steps: int, lr: float = 0.02) -> float:
    """Adam towards the wanted B; the loss in evaluation."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for _ in range(steps):
        loss = loss_of(net, wanted, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(loss_of(net.eval(), wanted, generator, 256))


def loss_of(net: Any, wanted: Tensor, generator: torch.Generator, rows: int = 32) -> Tensor:
    x = torch.randn(rows, WIDTH, generator=generator)
    return (net(x) - net[0](x) @ wanted.T).square().mean()


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_it_learns_as_with_min_max(bits: int) -> None:
    """At most twice the loss of a range that follows its weight for good; a frozen range had up to 2000 times."""
    minmax = train(*adapter(QSpec(bits, 0, range="minmax")), 300)
    options: tuple[dict[str, Any], ...] = ({}, {"learn": "scale", "grad_scale": "lsq"})
    for more in options if bits == 3 else options[:1]:
        assert train(*adapter(QSpec(bits, 0, **more)), 300) <= 2 * minmax, more


@pytest.mark.parametrize("axis", (None, 0))
@pytest.mark.parametrize("symmetric", (True, False))
def test_the_range_is_that_of_the_weight(axis: int | None, symmetric: bool) -> None:
    """Scale and zero point from the equations of min-max, whatever an optimizer does to a learned scale."""
    learn = "scale" if symmetric else "scale+zero_point"
    fq = FakeQuant(4, axis, channels=None if axis is None else 3, symmetric=symmetric, learn=learn)
    weight = nn.Parameter(torch.zeros(3, 8))
    optimizer = torch.optim.SGD([weight, *fq.parameters()], lr=1.0)
    assert torch.equal(fq(weight), torch.zeros(3, 8)) and not fq.initialized
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        weight.grad = -torch.randn(3, 8, generator=generator)
        optimizer.step()
        fq(weight).square().sum().backward()
        w = weight.detach().double()
        low, high = (w.amin(), w.amax()) if axis is None else (w.amin(1), w.amax(1))
        low, high = low.clamp(max=0).view(-1), high.clamp(min=0).view(-1)
        scale = torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15
        torch.testing.assert_close(fq.scale.double(), scale, rtol=1e-6, atol=0)
        if not symmetric:
            torch.testing.assert_close(fq.zero_point.double(), -low / scale, rtol=1e-5, atol=1e-5)
        assert fq.growing and fq.codes == ((-8, 7) if symmetric else (0, 15)), step


def test_a_first_update_decides_no_sign() -> None:
    """All of it is positive, and the weight is negative later."""
    fq, weight = FakeQuant(8), nn.Parameter(torch.zeros(4))
    fq(weight)
    with torch.no_grad():
        weight.add_(0.1)
        fq(weight)
        weight.copy_(torch.tensor([-1.0, 0.5, 0.25, 0.0]))
    assert fq(weight)[0] == -1


def test_evaluation_and_recomputation_move_nothing() -> None:
    """A range grows in training; the same weight gives the same values again, to every backward pass."""
    fq, weight = FakeQuant(4, 0, learn="scale"), nn.Parameter(torch.zeros(2, 4))
    fq(weight)
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.7, 0.1, -0.3, 0.2], [0.07, 0.01, -0.03, 0.02]]))
    first = fq(weight)
    second = fq(weight)
    assert torch.equal(first, second)
    (first.sum() + second.sum()).backward()  # both saved a scale that nobody has changed since
    with torch.no_grad():
        weight.mul_(3)
        before = fq.scale.clone()
        fq.eval()(weight)
        assert torch.equal(fq.scale, before)
        fq.train()(weight)
        torch.testing.assert_close(fq.scale, 3 * before)


def settled(extents: list[float], steps: int) -> list[int]:
    """Train a weight by hand, whose channels widen as told; the step at which each has stopped growing."""
    fq, weight = FakeQuant(4, 0), nn.Parameter(torch.zeros(len(extents), 2))
    fq(weight)
    stops = [0] * len(extents)
    for step in range(1, steps + 1):
        with torch.no_grad():
            weight.copy_(torch.tensor(extents)[:, None] * torch.tensor([step**0.5, -min(step, 100) / 1e3]))
            weight[1] = min(step, 100) * extents[1]
        fq(weight)
        fastqat.step(fq)
        still_growing: Any = fq.growth
        for channel, still in enumerate(still_growing.growing.tolist()):
            stops[channel] = stops[channel] or (0 if still else step)
        if not fq.growing:
            break
    return stops


def test_a_channel_settles() -> None:
    """With 256 steps where the second hundred added nothing; never with the root of time; zeros are waited for."""
    assert settled([1.0, 1.0, 0.0], 1100) == [0, 256, 1024]


def test_a_settled_range_stays() -> None:
    """Or is learned: the weight may go on, and its quantizer takes no more passes over it."""
    fq, weight = FakeQuant(4), nn.Parameter(torch.zeros(4))
    fq(weight)
    with torch.no_grad():
        weight.fill_(0.7)
    for _ in range(256):
        fq(weight)
        fastqat.step(fq)
    assert not fq.growing
    with torch.no_grad():
        weight.mul_(5)
        fq(weight)
    torch.testing.assert_close(fq.scale, torch.tensor([0.1]))


def test_channels_of_zeros_beside_others() -> None:
    """They alone grow; what others have was estimated, and stays."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        layer.weight[1] = 0
    fastqat.prepare(layer, QConfig(QSpec(4, 0), None))
    quantizer = layer.weight_fake_quant
    estimated = quantizer.scale.detach().clone()
    assert quantizer.growing and quantizer.growth.growing.tolist() == [0, 1, 0]
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.weight[1] = torch.linspace(-0.07, 0.07, 8)
        layer(torch.ones(1, 8))
    assert torch.equal(quantizer.scale[[0, 2]], estimated[[0, 2]])
    torch.testing.assert_close(quantizer.scale[1], torch.tensor(0.01))


def test_an_activation_of_zeros_does_not_grow() -> None:
    """Its range is set by the first batch that says something."""
    fq = FakeQuant(4, signed=True)
    fq(torch.zeros(3))
    fq(torch.tensor([0.7, -0.1]))
    before = fq.scale.clone()
    fq(torch.tensor([70.0]))
    assert torch.equal(fq.scale, before) and not fq.growing


@pytest.mark.parametrize("way", ("state_dict", "deepcopy"))
def test_it_goes_on_from_a_checkpoint(way: str) -> None:
    """In the middle of growing: the same scales and weights, step for step, and the same end of it."""
    net, wanted = adapter(QSpec(3, 0))
    train(net, wanted, 200)
    if way == "deepcopy":
        other = copy.deepcopy(net)
    else:
        other, _ = adapter(QSpec(3, 0), seed=5)
        other.load_state_dict(net.state_dict())
    for resumed in (net, other):
        train(resumed, wanted, 100)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    assert net[1].weight_fake_quant.growing == other[1].weight_fake_quant.growing
    assert int(other[1].weight_fake_quant.growth.steps) == 299  # the first step is from zero


def test_other_checkpoints() -> None:
    """One whose range grows not ends the growing; one in float begins with the weight that it has."""
    grown, _ = adapter(None)
    nn.init.normal_(grown[1].weight)
    float_dict = copy.deepcopy(grown.state_dict())
    fastqat.prepare(grown, QConfig(QSpec(3, 0), None), overrides={"0": None})
    net, wanted = adapter(QSpec(3, 0))
    train(net, wanted, 3)
    assert net[1].weight_fake_quant.growing
    net.load_state_dict(grown.state_dict())
    assert not net[1].weight_fake_quant.growing and torch.equal(net(torch.eye(16)), grown(torch.eye(16)))
    fresh, _ = adapter(QSpec(3, 0))
    with pytest.warns(UserWarning, match="no state for the quantizers"):
        fresh.load_state_dict(float_dict)
    fresh(torch.eye(16))
    assert not fresh[1].weight_fake_quant.growing
    assert torch.equal(fresh[1].weight_fake_quant.scale, grown[1].weight_fake_quant.scale)


def test_together_and_compiled() -> None:
    """The same values as layer by layer."""
    results = []
    for way in ("alone", "together", "compiled"):
        net, wanted = adapter(QSpec(4, 0, learn="scale"))
        train(net, wanted, 3)  # a range must be there before compilation
        run: Any = net
        if way == "together":
            fastqat.quantize_weights_together(net)
        elif way == "compiled":
            run = torch.compile(net, backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net.train()
        for _ in range(4):
            optimizer.zero_grad()
            (run(torch.eye(16)) - wanted @ torch.ones(RANK)).square().sum().backward()
            optimizer.step()
        results.append((net[1].weight.detach().clone(), net[1].weight_fake_quant.scale.detach().clone()))
    for weight, scale in results[1:]:
        assert torch.equal(scale, results[0][1]) and torch.equal(weight, results[0][0])


def test_a_range_by_hand_ends_it() -> None:
    """It is the user's."""
    net, wanted = adapter(QSpec(4, 0))
    train(net, wanted, 3)
    quantizer = net[1].weight_fake_quant
    quantizer.set_grid(torch.full((WIDTH,), 0.5))
    train(net, wanted, 2)
    assert quantizer.scale.tolist() == [0.5] * WIDTH and not quantizer.growing


@pytest.mark.parametrize("use_buffers", (False, True))
def test_averages_of_models(use_buffers: bool) -> None:
    """In evaluation a copy has the average of the scales, and writes nothing over it."""
    net, wanted = adapter(QSpec(4, 0))
    train(net, wanted, 3)
    averaged = torch.optim.swa_utils.AveragedModel(net, use_buffers=use_buffers)
    scales = []
    for _ in range(2):
        averaged.update_parameters(net.train())
        scales.append(net[1].weight_fake_quant.scale.detach().clone())
        train(net, wanted, 3)
    averaged.eval()(torch.eye(WIDTH))
    quantizer: Any = averaged.module[1].weight_fake_quant
    torch.testing.assert_close(quantizer.scale.detach(), (scales[0] + scales[1]) / 2)


def test_a_first_evaluation_in_inference_mode() -> None:
    """It sets the range; training goes on with it."""
    net, wanted = adapter(QSpec(4, 0))
    net(torch.eye(WIDTH))
    with torch.no_grad():
        net[1].weight.fill_(0.07)
    with torch.inference_mode():
        net.eval()(torch.eye(WIDTH))
    with torch.no_grad():
        net[1].weight.mul_(2)
    net.train()(torch.eye(WIDTH)).sum().backward()
    torch.testing.assert_close(net[1].weight_fake_quant.scale, torch.full((WIDTH,), 0.02))
    with torch.inference_mode():
        net(torch.eye(WIDTH))


def test_another_bit_width() -> None:
    """The range stays that of the weight, also while one is only tried."""
    fq, weight = FakeQuant(4), nn.Parameter(torch.zeros(4))
    fq(weight)
    with torch.no_grad():
        weight.copy_(torch.tensor([0.7, -0.1, 0.2, 0.3]))
    fq(weight)
    grid = fq.grid_at(2)
    fq.write_grid(grid)
    assert fq(weight)[0] == 0.7 and fq.bits == 4
    fq.bits = 3
    fq(weight)
    torch.testing.assert_close(fq.scale, torch.tensor([0.7 / 3]))


@pytest.mark.usefixtures("process_group")
def test_sharded() -> None:
    """FSDP2 keeps a part of each scale between forward passes: what a forward has written is put into that."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, wanted = adapter(QSpec(4, 0, learn="scale"))
    sharded: Any = copy.deepcopy(plain)
    fully_shard(sharded[1], mesh=init_device_mesh("cpu", (1,)))
    for net in (plain, sharded):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(net, wanted, torch.Generator().manual_seed(2)).backward()
            optimizer.step()
            fastqat.step(net)
    scale = sharded[1].weight_fake_quant.scale.full_tensor()
    assert torch.equal(scale, plain[1].weight_fake_quant.scale)
    assert torch.equal(sharded.eval()(torch.eye(WIDTH)), plain.eval()(torch.eye(WIDTH)))


def test_looks_are_few() -> None:
    """The host looks at the device, where it keeps what it saw, at powers of two alone."""
    fq, weight = FakeQuant(4), nn.Parameter(torch.zeros(4))
    fq(weight)
    looks, seen = [], 0.0
    for step in range(1, 600):
        with torch.no_grad():
            weight.fill_(float(step))
        fq(weight)
        fastqat.step(fq)
        growth: Any = fq.growth
        if float(growth.reference) != seen:
            looks.append(step)
            seen = float(growth.reference)
    assert looks == [128, 256, 512]
