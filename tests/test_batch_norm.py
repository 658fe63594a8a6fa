"""``reestimate_bn``: the averages against float64, what it leaves alone, what it names, and other processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_distributed import free_port, in_two_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastqat
from fastqat import QConfig, QSpec, reestimate_bn
from fastqat.batch_norm import reestimated
from fastqat.train.distributed import SyncBatchNorm

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0, offset: float = 0.0) -> Tensor:
    """Normal numbers around an offset."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset


def statistics(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of each channel in float64."""
    rows = x.double().numpy().swapaxes(0, 1).reshape(x.shape[1], -1)
    return rows.mean(1), rows.var(1, ddof=1)


def assert_statistics(layer: nn.Module, mean: np.ndarray, var: np.ndarray, rtol: float) -> None:
    """The layer's running statistics; rtol=0 asks for equal bits after rounding to float32."""
    np.testing.assert_allclose(layer.running_mean.numpy(), mean.astype(np.float32), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(layer.running_var.numpy(), var.astype(np.float32), rtol=rtol)


class Net(nn.Module):
    """Two layers of batch normalisation, dropout, and quantized convolutions whose activations' range follows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images).mean((2, 3))


def prepared() -> nn.Module:
    """A quantized Net that has made a step of training."""
    net = fastqat.prepare(Net(), QConfig(QSpec(3, 0, learn="scale"), QSpec(4, range="running_minmax")))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    net(batches()[0]).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return net


def batches(count: int = 3) -> list[Tensor]:
    """Images whose mean and variance change from batch to batch."""
    return [random(6, 3, 8, 8, seed=k, offset=k) * (k + 1) for k in range(count)]


def state(model: nn.Module) -> dict[str, Any]:
    """All that a run may change, except where the averages go."""
    values = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(("running_mean", "running_var"))}
    for name, m in model.named_modules():
        hooks = [len(h) for h in (m._forward_pre_hooks, m._forward_hooks, m._forward_pre_hooks_with_kwargs)]
        values[f"{name} plain"] = [m.training, getattr(m, "momentum", 0), getattr(m, "track_running_stats", 0), *hooks]
    values["gradients"] = [p.grad is None for p in model.parameters()]
    return values


def averages(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics."""
    return {k: v.clone() for k, v in model.state_dict().items() if k.endswith(("running_mean", "running_var"))}


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Equal to the bit."""
    assert one.keys() == two.keys()
    return all(torch.equal(v, two[k]) if isinstance(v, Tensor) else v == two[k] for k, v in one.items())


@pytest.mark.parametrize(
    ("layer", "shape"),
    (
        (nn.BatchNorm1d(3), (70_000, 3)),
        (nn.BatchNorm1d(3), (7, 3, 500)),
        (nn.BatchNorm2d(3), (61, 3, 40, 41)),  # more than is float64 at a time
        (nn.BatchNorm3d(3, affine=False), (5, 3, 4, 6, 7)),
        (nn.SyncBatchNorm(3), (8, 3, 20, 20)),
        (nn.BatchNorm2d(3, momentum=None), (1, 3, 20, 20)),
    ),
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "x".join(map(str, v)),
)
@pytest.mark.parametrize("layout", ("contiguous", "channels last"))
def test_one_batch(layer: nn.Module, shape: tuple[int, ...], layout: str) -> None:
    """The statistics of the batch, each rounded once from float64; torch's sums are in float32 for some layouts."""
    x = random(*shape, offset=5.0) * torch.tensor([1.0, 0.01, 300.0]).view([-1] + [1] * (len(shape) - 2))
    x = x if layout == "contiguous" else x.movedim(1, -1).contiguous().movedim(-1, 1)
    layer = copy.deepcopy(layer)
    layer.running_mean.fill_(torch.nan)  # nothing of the old values is left
    assert reestimate_bn(layer, [x]) == 1
    assert_statistics(layer, *statistics(x), rtol=0)


def test_a_constant_channel() -> None:
    """Has a variance of exactly 0."""
    layer = nn.BatchNorm1d(2)
    reestimate_bn(layer, [torch.full((1000, 2), 3.3)])
    assert layer.running_mean.tolist() == [np.float32(3.3)] * 2 and layer.running_var.tolist() == [0.0, 0.0]


def test_several_batches() -> None:
    """Means of the batches' means and variances, whatever their sizes: not the variance of all data."""
    layer = nn.BatchNorm2d(3)
    data = [random(size, 3, 5, 5, seed=size, offset=10 * size) for size in (2, 3, 9)]
    reestimate_bn(layer, data)
    means, variances = zip(*map(statistics, data), strict=True)
    assert_statistics(layer, np.mean(means, 0), np.mean(variances, 0), rtol=0)
    assert bool((layer.running_var < 2).all()) and statistics(torch.cat(data))[1].min() > 500


def test_a_layer_sees_normalised_batches() -> None:
    """A later layer sees what the earlier one makes with the statistics of the batch, as in training."""
    net = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU(), nn.BatchNorm1d(2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([2.0, -1.0]))
        net[0].bias.copy_(torch.tensor([0.5, 1.0]))
    data = [random(50, 2, seed=k, offset=30.0 * k) * (k + 1) for k in range(3)]
    reestimate_bn(net, data)
    later = []
    for x in data:
        wide = x.double().numpy()
        normal = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
        later.append(np.maximum(normal * [2, -1] + [0.5, 1], 0))
    assert_statistics(
        net[2], np.mean([y.mean(0) for y in later], 0), np.mean([y.var(0, ddof=1) for y in later], 0), 1e-5
    )


def test_against_a_loop() -> None:
    """A quantized network with dropout, against momentum 1 and an average by hand."""
    net = prepared()
    loop = copy.deepcopy(net).eval()
    norms = [m for m in loop.modules() if isinstance(m, nn.BatchNorm2d)]
    gathered: list[list[Tensor]] = [[] for _ in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    for x in batches():
        loop(x)
        for norm, seen in zip(norms, gathered, strict=True):
            seen.append(torch.stack([norm.running_mean, norm.running_var]).double())
    assert reestimate_bn(net, batches()) == 2
    for norm, seen in zip((net.body[1], net.body[5]), gathered, strict=True):
        assert_statistics(norm, *torch.stack(seen).mean(0).numpy(), rtol=1e-5)


def test_what_it_leaves_alone() -> None:
    """Quantizers, their time and range, dropout's random numbers, modes, momentum, counts, hooks: all but averages."""
    net = prepared().train()
    net.body[1].eval()
    net.body[5].momentum, net.body[5].track_running_stats = None, False
    before, old, memory = state(net), averages(net), net.body[1].running_mean.data_ptr()
    random_numbers = torch.get_rng_state()
    reestimate_bn(net, batches())
    assert same(state(net), before) and torch.equal(torch.get_rng_state(), random_numbers)
    assert not any(torch.equal(v, old[k]) for k, v in averages(net).items())
    assert net.body[1].running_mean.data_ptr() == memory
    assert [q.step.item() for q in net.modules() if isinstance(q, fastqat.FakeQuant)] == [1] * 4


def test_number_of_batches() -> None:
    """No more are taken than asked for, nor fetched; fewer do."""
    layer, endless = nn.BatchNorm1d(2), iter([random(4, 2, seed=k) for k in range(9)])
    reestimate_bn(layer, endless, num_batches=2)
    means = [statistics(random(4, 2, seed=k))[0] for k in range(9)]
    np.testing.assert_allclose(layer.running_mean.numpy(), np.mean(means[:2], 0), rtol=1e-6)
    reestimate_bn(layer, endless)
    np.testing.assert_allclose(layer.running_mean.numpy(), np.mean(means[2:], 0), rtol=1e-6)


def test_fifty_batches() -> None:
    """That many by default."""
    layer, taken = nn.BatchNorm1d(2), []
    reestimate_bn(layer, (taken.append(k) or random(4, 2, seed=k) for k in range(60)))
    assert taken == list(range(50))


class Odd(nn.Module):
    """One layer called twice for a batch, and one that is called for some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.rare = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

    def forward(self, x: Tensor, *, rare: bool = False) -> Tensor:
        self.twice(input=x + 2)
        return self.rare(x) if rare else self.twice(4 * x)


def test_layers_that_are_called_twice_or_seldom() -> None:
    """Each averages over its own calls; mappings are keyword arguments."""
    net, x = Odd(), random(5, 2)
    reestimate_bn(net, [{"x": x, "rare": True}, {"x": 3 * x}])
    calls = [statistics(y) for y in (x + 2, 3 * x + 2, 12 * x)]
    assert_statistics(net.twice, *np.mean(calls, 0), rtol=1e-6)
    assert_statistics(net.rare, *statistics(x), rtol=0)


def test_every_kind_of_batch() -> None:
    """The kinds that calibrate takes."""
    nets = [nn.BatchNorm1d(2) for _ in range(3)]
    x = random(5, 2)
    reestimate_bn(nets[0], [(x, torch.zeros(5)), [2 * x]])
    reestimate_bn(nets[1], [{"input": x}, {"input": 2 * x}])
    reestimate_bn(nets[2], [1, 2], forward=lambda net, factor: net(factor * x))
    for net in nets:
        assert_statistics(net, *np.mean([statistics(x), statistics(2 * x)], 0), rtol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    """Sums are wide; the buffers keep their dtype."""
    layer = nn.BatchNorm1d(2).to(dtype)
    x = random(3000, 2, offset=3.0).to(dtype)
    reestimate_bn(layer, [x, x])
    mean, var = (torch.from_numpy(v).to(dtype) for v in statistics(x))
    assert torch.equal(layer.running_mean, mean) and torch.equal(layer.running_var, var)


def test_an_empty_batch() -> None:
    """Counts for nothing."""
    layer, x = nn.BatchNorm1d(2), random(5, 2)
    reestimate_bn(layer, [x[:0], x])
    assert_statistics(layer, *statistics(x), rtol=0)


class Without(nn.Module):
    """Refuses to be run."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(children)

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


@pytest.mark.parametrize("children", ((nn.GroupNorm(1, 2),), (nn.BatchNorm1d(2, track_running_stats=False),)))
def test_nothing_to_reestimate(children: tuple[nn.Module, ...]) -> None:
    """A warning says so; layers without running statistics use those of the batch anyway."""
    with pytest.warns(UserWarning, match="Without has no batch normalisation with running statistics") as warned:
        assert reestimate_bn(Without(*children), [random(3, 2)]) == 0
    assert warned[0].filename == __file__


def interrupted() -> Iterator[Tensor]:
    """A batch, then an error of the user's own."""
    yield batches()[0]
    raise KeyError("the disk is gone")


WRONG = {
    "no batch": ([], ValueError, r"batches: .*got 0 batches, in which these saw none: body\.1, body\.5"),
    "one element": (
        [batches()[0], random(1, 3, 5, 5)],
        ValueError,
        r"one element per channel for body\.5; got one, in",
    ),
    "not finite": ([batches()[0], batches()[1] * torch.nan], ValueError, r"finite statistics; got others in body\.1, "),
    "the user's error": (interrupted(), KeyError, "the disk is gone"),
    "wrong input": ([batches()[0], random(2, 4, 8, 8)], RuntimeError, "channels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_change_nothing(case: str) -> None:
    """Each names the layer, and leaves everything as it was."""
    data, kind, message = WRONG[case]
    net = prepared()
    before, old = state(net), averages(net)
    with pytest.raises(kind, match=message):
        reestimate_bn(net, data)
    assert same(state(net), before) and same(averages(net), old)


def test_a_layer_that_saw_nothing() -> None:
    """Is named, and the other keeps its statistics."""
    net = Odd()
    with pytest.raises(ValueError, match=r"got 2 batches, in which these saw none: rare$"):
        reestimate_bn(net, [random(3, 2)] * 2)
    assert net.twice.running_mean.tolist() == [0, 0]


def test_models_that_are_not_ready() -> None:
    """Layers of unknown channels, and quantizers without a range: both are named."""
    lazy = nn.Sequential(nn.LazyBatchNorm1d())
    for use in (reestimate_bn, lambda *a: reestimated(*a).__enter__()):
        with pytest.raises(ValueError, match="model: wanted batch normalisation of known channels; got none yet for 0"):
            use(lazy, [random(3, 2)])
    lazy(random(3, 2))
    assert reestimate_bn(lazy, [random(3, 2)]) == 1
    net = nn.Sequential(fastqat.FakeQuant(4), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"model: wanted quantizers with ranges; got none for 0: fastqat\.calibrate"):
        reestimate_bn(net, [random(3, 2)])
    assert not net[0].initialized
    net[0].fake_quant_enabled = False  # passes everything through
    assert reestimate_bn(net, [random(3, 2)]) == 1


@pytest.mark.parametrize(("value", "kind"), ((0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)))
def test_wrong_numbers(value: object, kind: type[Exception]) -> None:
    """Named, before anything runs."""
    with pytest.raises(kind, match="num_batches: wanted"):
        reestimate_bn(Without(nn.BatchNorm1d(2)), [random(3, 2)], value)


@pytest.mark.parametrize("end", ("as planned", "by an exception"))
def test_reestimated(end: str) -> None:
    """Inside, evaluation with the new statistics; afterwards nothing is left of it, even of training inside."""
    net, twin = prepared(), prepared()
    reestimate_bn(twin, batches(), 2)
    before, old = state(net), averages(net)
    expected = twin.eval()(batches()[2])

    def use() -> None:
        with reestimated(net, batches(), 2) as count:
            assert count == 2 and not net.training and not same(averages(net), old)
            assert torch.equal(net(batches()[2]), expected)
            for norm in (net.body[1], net.body[5]):
                norm.train()(random(2, norm.num_features, 2, 2))
            if end == "by an exception":
                raise KeyError("inside")

    if end == "by an exception":
        with pytest.raises(KeyError, match="inside"):
            use()
    else:
        use()
    assert same(averages(net), old) and same(state(net), before)


@pytest.mark.parametrize("compile_", (torch.compile, lambda net, **options: net.body.compile(**options) or net))
def test_compiled(compile_: Callable[..., nn.Module]) -> None:
    """A model compiled before, as a whole or in part: same statistics, and its code is used again afterwards."""
    torch._dynamo.reset()
    compiled: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    plain = prepared().eval()
    net = compile_(copy.deepcopy(plain), backend=backend)
    before = net(batches()[0])
    graphs = len(compiled)
    assert graphs > 0
    reestimate_bn(net, batches()), reestimate_bn(plain, batches())
    assert all(map(torch.equal, averages(net).values(), averages(plain).values()))
    after = net(batches()[0])
    assert len(compiled) == graphs
    assert torch.equal(after, plain(batches()[0])) and not torch.equal(after, before)


def _two_processes() -> None:
    """Batches of its own in each process, then slices of common ones, then an error that both must see."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = [random(4, 3, 2, 2, seed=k, offset=k) for k in range(5)]
    mine = own[:1] if rank == 0 else own[1:]  # one, and four
    plain = DistributedDataParallel(nn.BatchNorm2d(3))
    plain.module.num_batches_tracked += rank  # what differs is not evened out
    assert reestimate_bn(plain, mine) == 1
    assert_statistics(plain.module, *np.mean([statistics(x) for x in own], 0), rtol=1e-6)
    assert plain.module.num_batches_tracked.item() == rank

    net = nn.Sequential(SyncBatchNorm(3), nn.ReLU(), SyncBatchNorm(3))
    sizes = (1, 0) if rank == 0 else (3, 4)  # of the slices of two batches; one of them is empty
    reestimate_bn(net, [x[:n] if rank == 0 else x[-n:] for x, n in zip(own, sizes, strict=False)])
    whole = nn.Sequential(nn.BatchNorm2d(3, momentum=1.0), nn.ReLU(), nn.BatchNorm2d(3, momentum=1.0)).double()
    seen = []
    for x in own[:2]:
        whole(x.double())
        seen.append(np.stack([[bn.running_mean.numpy(), bn.running_var.numpy()] for bn in whole[::2]]))
    for bn, (mean, var) in zip(net[::2], np.mean(seen, 0), strict=True):
        assert_statistics(bn, mean, var, rtol=1e-5)
    both = [torch.empty(2, 2, 3) for _ in range(2)]
    dist.all_gather(both, torch.stack([torch.stack([bn.running_mean, bn.running_var]) for bn in net[::2]]))
    assert torch.equal(*both), "equal to the bit"

    with pytest.raises(ValueError, match="got 0 batches, in which these saw none"):
        reestimate_bn(nn.Sequential(nn.BatchNorm2d(3)), [])
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes() -> None:
    """The average over the batches of both, and one batch in two slices, one of them empty."""
    in_two_processes(_two_processes, port=free_port())
