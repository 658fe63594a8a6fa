"""Oscillation tracking through FakeQuant: what advances its time and what does not, its state, its options."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastqat
from fastqat import Dampening, FakeQuant, Oscillation, QConfig, QSpec, Schedule
from fastqat.nn.tracking import SEAL

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
TRACKED = QSpec(3, axis=0, learn="scale", oscillation=Oscillation(0.1, 0.25))
STATE = ("words", "scaled_frequency", "scaled_average", "counts", "clock")
Make = Callable[[], nn.Module]


def prepared(spec: QSpec = TRACKED) -> nn.Module:
    """Two linear layers around a batch normalisation, prepared."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    return fastqat.prepare(net, QConfig(spec, None))


def quantizers(net: nn.Module) -> list[FakeQuant]:
    return [m for m in net.modules() if isinstance(m, FakeQuant)]


def state(net: nn.Module) -> list[Tensor]:
    """The tracking state of all quantizers, and their steps."""
    return [t.clone() for q in quantizers(net) for t in (*(getattr(q.tracker, name) for name in STATE), q.step)]


def kick(net: nn.Module, step: int) -> None:
    """Move some weights forth and back by more than a step of the grid, as an optimizer would."""
    with torch.no_grad():
        for q, weight in zip(quantizers(net), weights(net), strict=True):
            weight.view(-1)[:: 2 + step % 3] += 1.2 * (-1) ** step * float(q.scale.mean())


def weights(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.dim() == 2]


def run(
    net: nn.Module,
    steps: int = 14,
    *,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, 0.0),
    forward: Callable[[nn.Module], Tensor] = lambda net: net(X).sum(),
    beside: Callable[[nn.Module], object] = lambda net: None,
) -> list[Tensor]:
    """Train with kicks in the place of gradients (rate 0); `beside` runs before and after the forward of each step."""
    optimizer = make_optimizer([p for p in net.parameters() if p.requires_grad])
    for step in range(steps):
        optimizer.zero_grad()
        beside(net)
        forward(net).backward()
        beside(net)
        optimizer.step()
        kick(net, step)
    return state(net)


@pytest.fixture(scope="module")
def plain() -> list[Tensor]:
    torch.set_num_threads(1)
    result = run(prepared())
    counts = sum(result[3::6])
    assert counts[0] > 100 and counts[1] > 50 and counts[2] > 5, "the test is blind: too little happens"
    return result


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def evaluate(net: nn.Module) -> None:
    net.eval()
    with torch.no_grad():
        net(X)
    net.train()


def measure_in_training_mode(net: nn.Module) -> None:
    with torch.no_grad():
        net(X)


def read_weights(net: nn.Module) -> None:
    for q, weight in zip(quantizers(net), weights(net), strict=True):
        q(weight)
        q(weight)


BESIDE = {
    "evaluation": evaluate,
    "forward without gradients": measure_in_training_mode,
    "reads of the weights": read_weights,
    "BN re-estimation": lambda net: fastqat.reestimate_bn(net, [X, X + 1], 2),
    "gradients thrown away": lambda net: net(X).square().sum().backward(),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_does_not_advance(name: str, plain: list[Tensor]) -> None:
    """The counters are those of the plain run, whatever runs beside the training."""
    assert same(run(prepared(), beside=BESIDE[name]), plain)


def accumulated(net: nn.Module) -> Tensor:
    for part in X[:6].chunk(3):
        net(part).sum().backward()
    return net(X[6:]).sum()


FORWARDS = {
    "accumulation": accumulated,
    "checkpointing": lambda net: checkpoint(net, X, use_reentrant=False).sum(),
    "reentrant checkpointing": lambda net: checkpoint(net, X.clone().requires_grad_(), use_reentrant=True).sum(),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_one_step_whatever_the_forwards(name: str, plain: list[Tensor]) -> None:
    assert same(run(prepared(), forward=FORWARDS[name]), plain)


def two_optimizers(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer of the weights that steps another one, of the scales, with it."""
    scales = [p for p in parameters if p.dim() == 1]
    other = torch.optim.Adam(scales, 0.0)
    optimizer = torch.optim.SGD([p for p in parameters if p.dim() != 1], 0.0)
    optimizer.register_step_post_hook(lambda *_: other.step())
    return optimizer


OPTIMIZERS = {
    "foreach": lambda p: torch.optim.SGD(p, 0.0, foreach=True),
    "fused": lambda p: torch.optim.SGD(p, 0.0, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 0.0, weight_decay=0.0, fused=True),
    "for loop": lambda p: torch.optim.Adam(p, 0.0, foreach=False),
    "two optimizers": two_optimizers,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_whatever_the_optimizer(name: str, plain: list[Tensor]) -> None:
    assert same(run(prepared(), make_optimizer=OPTIMIZERS[name]), plain)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_compiled(checkpointed: bool, plain: list[Tensor]) -> None:
    """One graph that is not compiled anew from step to step, with the counters of the eager run."""
    torch.compiler.reset()

    def call(net: nn.Module, x: Tensor) -> Tensor:
        return (checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)).sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert same(run(prepared(), forward=lambda net: compiled(net, X)), plain)
    torch.compiler.reset()


def test_parametrization(plain: list[Tensor]) -> None:
    """The quantizer of a parametrized weight, which is read twice in a forward."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    for layer in (net[0], net[3]):
        options = dict(learn="scale", oscillation=TRACKED.oscillation)
        parametrize.register_parametrization(layer, "weight", FakeQuant(3, axis=0, **options))

    def forward(net: nn.Module) -> Tensor:
        return net(X).sum() + net[0].weight.sum() + net[3].weight.sum()

    assert same(run(net, forward=forward), plain)


def test_frozen_weights() -> None:
    """A frozen weight has its code whatever its latent value is, no gradient, and g * code goes to the scale."""
    q = FakeQuant(3, range="fixed", scale=torch.ones(1), learn="scale", oscillation=Oscillation(0.1, 0.15))
    w = nn.Parameter(torch.tensor([0.0, 2.0]))
    optimizer = torch.optim.SGD([w, q.scale], 0.0)
    for value in (0.0, 1.0, 0.0, 1.0, 0.0, 1.0):
        with torch.no_grad():
            w[0] = value
        w.grad = q.scale.grad = None
        y = q(w)
        y.backward(torch.tensor([3.0, 5.0]))
        optimizer.step()
    assert q.tracker.frozen().tolist() == [True, False]
    assert y.tolist() == [0.0, 2.0] and w.grad.tolist() == [0.0, 5.0]
    assert q.scale.grad.item() == 3 * 0 + 5 * (2 - 2)
    with torch.no_grad():
        w[0] = -3.0
        q.scale.fill_(2.0)
    q.scale.grad = None
    q.tracker.words[0] = 0b1000_0101  # frozen at code 5 - 4 = 1
    y = q(w)
    y.backward(torch.tensor([3.0, 5.0]))
    assert y.tolist() == [2.0, 2.0]
    assert q.scale.grad.item() == pytest.approx(3 * 1 + 5 * (1 - 1))
    assert q.eval()(w).tolist() == [2.0, 2.0]


def test_saved_and_resumed_half_way(plain: list[Tensor]) -> None:
    """Through a file's worth of state_dict, into a model that has tracked something else."""
    first = prepared()
    optimizer_state = []

    def keep(net: nn.Module, steps: range) -> list[Tensor]:
        optimizer = torch.optim.SGD(net.parameters(), 0.0)
        for step in steps:
            net(X).sum().backward()
            optimizer.step()
            kick(net, step)
        optimizer_state.append(optimizer.state_dict())
        return state(net)

    keep(first, range(7))
    second = prepared()
    keep(second, range(3))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert same(keep(second, range(7, 14)), plain)
    fresh = prepared()
    fresh.load_state_dict(copy.deepcopy(first.state_dict()))
    assert same(keep(fresh, range(7, 14)), plain)


def test_a_long_run_resumed_half_way() -> None:
    """4,000 weights, 6,000 steps: what a file held after the first half goes on like the run that was not stopped."""

    def quantizer() -> FakeQuant:
        options = Oscillation(0.01, Schedule("cosine", 0.1, 0.02, steps=6000, off_before=True))
        return FakeQuant(3, range="fixed", scale=torch.full((1,), 0.1), oscillation=options)

    generator = torch.Generator().manual_seed(5)
    middle = torch.randint(-3, 3, (4000,), generator=generator) + torch.rand(4000, generator=generator)

    def go(q: FakeQuant, steps: range) -> Tensor:
        weight, total = nn.Parameter(torch.zeros(4000)), torch.zeros(4000, dtype=torch.float64)
        for step in steps:
            noise = torch.rand(4000, generator=torch.Generator().manual_seed(step)) - 0.5
            weight.data = (middle + noise * (step % 7 == 0)) * 0.1
            total += q(weight).detach()
            fastqat.step(q)
        return total

    whole, half = quantizer(), quantizer()
    go(whole, range(3000))
    go(half, range(3000))
    file = io.BytesIO()
    torch.save(half.state_dict(), file)
    file.seek(0)
    resumed = quantizer()
    resumed.load_state_dict(torch.load(file))
    assert torch.equal(go(whole, range(3000, 6000)), go(resumed, range(3000, 6000)))
    assert same(state(whole), state(resumed))
    assert 100 < int(whole.tracker.counts[2]) < 3900, "the test is blind: nothing, or all, was frozen"


def test_state_is_small() -> None:
    """At most 9 bytes a weight up to 5 bits, 10 above, and some numbers for each tensor."""
    for bits, wanted in ((3, 9), (5, 9), (6, 10), (8, 10)):
        net = nn.Linear(256, 256, bias=False)
        options = Oscillation(max_bits=8)
        fastqat.prepare(net, QConfig(QSpec(bits, oscillation=options), None))
        buffers = sum(b.numel() * b.element_size() for b in net.weight_fake_quant.tracker.buffers())
        assert wanted * 256 * 256 <= buffers <= wanted * 256 * 256 + 64


def test_dtype_device_and_strides_of_the_model() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3))
    fastqat.prepare(net, QConfig(TRACKED, None))
    x = torch.randn(2, 4, 5, 5)
    net(x).sum().backward()
    before = net[0].weight_fake_quant.tracker.codes()
    net.to(memory_format=torch.channels_last).bfloat16()
    tracker = net[0].weight_fake_quant.tracker
    assert tracker.scaled_frequency.dtype == torch.float32 and tracker.clock.dtype == torch.float64
    net(x.bfloat16()).sum().backward()
    assert torch.equal(tracker.codes(), before)
    assert tracker.words.stride() == net[0].weight.stride()


def test_bits_reset_it_with_a_warning() -> None:
    net = prepared()
    run(net, 3)
    q = quantizers(net)[0]
    with pytest.warns(UserWarning, match="3 becomes 2.*reset"):
        q.bits = 2
    assert not q.tracker.has_tracked
    net(X)
    assert q.tracker.counts.tolist() == [0, 0, 0, 0, SEAL]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q.bits = 2
    with pytest.warns(UserWarning):
        q.bits = 5  # above max_bits
    assert q.tracker is None


def test_first_and_last_layer_are_not_tracked() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    fastqat.prepare(net, QConfig(TRACKED, None), first_last_bits=8)
    assert [q.tracker is not None for q in quantizers(net)] == [False, True, False]


def test_threshold_follows_a_schedule_on_the_device() -> None:
    """Off, then on at half of the steps: nothing is frozen before, and averages begin there."""
    schedule = Schedule("step", 0.0, 0.25, steps=14, begin=0.5)
    net = prepared(QSpec(3, axis=0, learn="scale", oscillation=Oscillation(0.1, schedule)))
    run(net, 7)
    assert all(int(q.tracker.counts[2]) == 0 for q in quantizers(net))
    run(net, 7)
    assert any(int(q.tracker.counts[2]) > 0 for q in quantizers(net))


def options_errors() -> Iterator[tuple[str, Callable[[], object], type[Exception], str]]:
    yield "momentum 0", lambda: Oscillation(0.0), ValueError, r"momentum: wanted a number in \(0, 1\); got 0.0"
    yield "momentum 1", lambda: Oscillation(1.0), ValueError, r"momentum: wanted a number in \(0, 1\); got 1.0"
    yield "momentum text", lambda: Oscillation("x"), TypeError, "momentum: wanted a number"
    yield "threshold 2", lambda: Oscillation(0.1, 2.0), ValueError, "freeze_threshold: wanted values from 0 to 1; got 2"
    yield "threshold text", lambda: Oscillation(0.1, "x"), TypeError, "freeze_threshold: wanted a number or a Schedule"
    yield "bits 9", lambda: Oscillation(max_bits=9), ValueError, "bits: wanted 1 to 8; got 9"
    yield "aggregate", lambda: Dampening(1.0, "max"), ValueError, "aggregate: wanted one of 'sum', 'mean'"
    yield "dampening below 0", lambda: Dampening(-1.0), ValueError, "weight: wanted values that are not negative"
    yield "not options", lambda: FakeQuant(3, oscillation=0.1), TypeError, r"oscillation: wanted fastqat.Oscillation"
    both = dict(estimator="stochastic", oscillation=Oscillation(0.01, 0.1))
    yield "stochastic", lambda: QSpec(3, **both), ValueError, "estimator='stochastic' with freeze_threshold=0.1"
    yield "estimator", lambda: QSpec(3, estimator="stee"), ValueError, "estimator: wanted one of 'ste'"
    strength = dict(estimator="ste", estimator_strength=1.0)
    yield "strength", lambda: QSpec(3, **strength), ValueError, "estimator_strength: wanted none for estimator='ste'"
    activation = lambda: QConfig(None, TRACKED)  # noqa: E731
    yield "activation", activation, ValueError, "activation: wanted a QSpec without oscillation"


@pytest.mark.parametrize(("call", "kind", "message"), [c[1:] for c in options_errors()], ids=lambda c: None)
def test_mistakes(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_threshold_that_is_too_low_warns() -> None:
    with pytest.warns(UserWarning, match="freeze_threshold 0.015 is below 2 x momentum = 0.02"):
        Oscillation(0.01, 0.015)
    with pytest.warns(UserWarning, match="0.011"):
        Oscillation(0.01, Schedule("cosine", 0.1, 0.011, steps=10))


def test_a_state_of_another_shape_is_refused() -> None:
    """Both sides are named, and the model stays as it was."""
    net = prepared()
    run(net, 2)
    other = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    fastqat.prepare(other, QConfig(TRACKED, None))
    saved = copy.deepcopy(net.state_dict())
    saved["0.weight_fake_quant.tracker.words"] = saved["0.weight_fake_quant.tracker.words"][:4]
    with pytest.raises(
        RuntimeError, match=r"tracker '0.weight_fake_quant.tracker', words: wanted \[5, 6\]; got \[4, 6\]"
    ):
        other.load_state_dict(saved)
    del saved["0.weight_fake_quant.tracker.words"]
    with pytest.raises(RuntimeError, match="wanted all of words, .* or none; got none of words"):
        other.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"wanted a weight of shape \[5, 6\].*; got shape \[1, 6\]"):
        quantizers(net)[0].tracker.prepare(torch.zeros(1, 6), -4)


def test_a_network_that_was_not_tracked_loads() -> None:
    net, untracked = prepared(), prepared(QSpec(3, axis=0, learn="scale"))
    run(net, 2)
    net.load_state_dict(untracked.state_dict())
    assert not any(q.tracker.has_tracked for q in quantizers(net))
    net(X)


def test_before_the_first_weight() -> None:
    q = FakeQuant(3, oscillation=Oscillation())
    for method in ("codes", "frequency", "average", "frozen", "direction"):
        with pytest.raises(RuntimeError, match="wanted a weight that was tracked"):
            getattr(q.tracker, method)()


def test_dampening_is_the_gradient_of_its_loss() -> None:
    """Folded into the backward pass: the reference case of the paper's loss (kernel_mean, lambda 1)."""
    w = nn.Parameter(torch.tensor([[0.12, 0.26, -0.9], [0.04, -0.33, 0.51]]))
    wanted = {"kernel_mean": 1 / 3, "mean": 1 / 6, "sum": 1.0}
    for aggregate, factor in wanted.items():
        dampening = Dampening(1.0, aggregate)
        q = FakeQuant(2, range="fixed", scale=torch.tensor([0.25]), learn="scale", dampening=dampening)
        w.grad = None
        q(w).backward(torch.zeros(2, 3))
        expected = torch.tensor([[0.24, 0.0, 0.0], [0.08, -0.16, 0.0]]) * factor
        torch.testing.assert_close(w.grad, expected, rtol=1e-6, atol=1e-7)
        assert q.scale.grad.item() == 0.0


def assigned(net: nn.Module) -> nn.Module:
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    return net


def untracked(net: nn.Module) -> nn.Module:
    net.load_state_dict(prepared(QSpec(3, axis=0, learn="scale")).state_dict())
    return net


def changed_twice(net: nn.Module) -> nn.Module:
    for q in quantizers(net):
        q.bits, q.bits = 2, 3
    return net


ANEW: dict[str, Make] = {
    "copy": lambda: copy.deepcopy(prepared()),
    "assigned": lambda: assigned(prepared()),
    "untracked": lambda: untracked(prepared()),
    "bits": lambda: changed_twice(prepared()),
    "dynamic shapes": prepared,
}


@pytest.mark.parametrize("name", ANEW)
def test_compiled_anew(name: str, plain: list[Tensor]) -> None:
    """Copies, Parameters that a checkpoint replaced, a state that was forgotten, other bits: tracked as ever."""
    torch.compiler.reset()
    net = ANEW[name]()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True if "dynamic" in name else None)
    assert same(run(net, forward=lambda net: compiled(X).sum()), plain)
    torch.compiler.reset()


def test_a_weight_that_compiled_code_sees_first() -> None:
    """In training that is no graph, and runs eagerly where it may; in evaluation nothing is frozen."""
    w = nn.Parameter(torch.tensor([0.6, 2.2]))
    for training, whole in ((True, False), (False, True), (True, True)):
        torch.compiler.reset()
        q = FakeQuant(3, range="fixed", scale=torch.ones(1), oscillation=Oscillation()).train(training)
        compiled = torch.compile(q, fullgraph=whole, backend="aot_eager")
        if training and whole:
            with pytest.raises(Exception, match="wanted a tracked weight that was seen before compilation"):
                compiled(w)
        else:
            assert compiled(w).tolist() == [1.0, 2.0] and q.tracker.is_materialized is training
    torch.compiler.reset()


def test_groups_that_are_no_view_compile() -> None:
    torch.compiler.reset()
    seen = []
    for compiled in (False, True):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(4, 6))
        q = FakeQuant(3, axis=1, group_size=2, learn="scale", oscillation=Oscillation(0.1, 0.25))
        q(w)
        call = torch.compile(q, fullgraph=True, backend="aot_eager") if compiled else q
        optimizer = torch.optim.SGD([w, q.scale], 0.0)
        for step in range(10):
            call(w).sum().backward()
            optimizer.step()
            with torch.no_grad():
                w[::2] += 0.9 * (-1) ** step
        seen.append([q.tracker.codes(), q.tracker.frequency(), q.tracker.average(), q.tracker.counts])
    assert same(*seen) and int(seen[0][3][2]) > 0
    torch.compiler.reset()


@pytest.mark.parametrize("bits", [(3, 8), (8, 3), (3, 6), (6, 3)])
def test_a_checkpoint_of_other_bits(bits: tuple[int, int]) -> None:
    """Of a model whose quantizers were, or were not, of too many bits to be tracked."""
    most = 6 if 6 in bits else 4
    specs = [QSpec(b, axis=0, learn="scale", oscillation=Oscillation(0.1, 0.25, max_bits=most)) for b in bits]
    saved, loaded = (prepared(spec) for spec in specs)
    for net in (saved, loaded):
        optimizer = torch.optim.SGD(net.parameters(), 0.0)
        for step in range(4):
            net(X).sum().backward()
            optimizer.step()
            kick(net, step)
    with pytest.warns(UserWarning, match=f"the checkpoint has {bits[0]} bits, and the model had {bits[1]}"):
        loaded.load_state_dict(saved.state_dict())
    for a, b in zip(quantizers(saved), quantizers(loaded), strict=True):
        assert a.bits == b.bits and (a.tracker is None) == (b.tracker is None)
        if a.tracker is not None:
            assert torch.equal(a.tracker.codes(), b.tracker.codes()) and same(*([*q.tracker.buffers()] for q in (a, b)))


def test_codes_of_a_loaded_state() -> None:
    q, w = FakeQuant(3, oscillation=Oscillation()), torch.tensor([-1.0, 0.4, 2.0])
    q(w)
    fresh = FakeQuant(3, oscillation=Oscillation())
    fresh.load_state_dict(q.state_dict())
    assert torch.equal(fresh.tracker.codes(), q.tracker.codes())


def test_shared_weights_in_a_file_that_keeps_them_once(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")

    def tied() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        net[2].weight = net[0].weight
        return fastqat.prepare(net, QConfig(TRACKED, None))

    net, other = tied(), tied()
    for _ in range(3):
        net(X).sum().backward()
        fastqat.step(net)
        with torch.no_grad():
            net[0].weight.neg_()
    safetensors.save_model(net, str(tmp_path / "model.safetensors"))
    missing, unexpected = safetensors.load_model(other, tmp_path / "model.safetensors")
    assert not missing and not unexpected
    assert same(state(net), state(other)) and int(state(net)[3][0]) > 0


def test_the_state_is_made_where_the_quantizer_is() -> None:
    q, moved = (FakeQuant(3, oscillation=Oscillation()) for _ in range(2))
    q(torch.ones(4))
    moved.to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: to copy to the meta device is a no-op
        moved.tracker.load_state_dict(q.tracker.state_dict())
    assert moved.tracker.words.device.type == "meta"


def test_dampening_of_one_number() -> None:
    w = nn.Parameter(torch.tensor(0.23))
    FakeQuant(3, range="fixed", scale=torch.tensor([0.2]), dampening=Dampening(1.0))(w).backward()
    torch.testing.assert_close(w.grad, torch.tensor(1 + 2 * (0.23 - 0.2)))


@pytest.mark.parametrize("backend", ("reference", "cpu"), indirect=True)
@pytest.mark.parametrize(
    "options",
    (
        {"oscillation": Oscillation(momentum=0.1, freeze_threshold=0.15)},
        {"dampening": Dampening(1.0)},
        {"estimator": "ewgs"},
        {"estimator": "dsq"},
        {"estimator": "psg"},
        {"estimator": "stochastic"},
    ),
    ids=lambda options: "-".join(map(str, options.values()))[:12],
)
def test_a_weight_of_no_dimension(backend: str, options: dict) -> None:
    """One number without a dimension is quantized, tracked and frozen as one in a tensor of [1]."""
    runs = []
    for shape in ((), (1,)):
        w = nn.Parameter(torch.zeros(shape))
        q, seen = FakeQuant(3, range="fixed", scale=torch.tensor([0.2]), **options), []
        for i in range(8):
            with torch.no_grad():
                w.fill_(0.37 if i % 2 else 0.23)
            y = q(w)
            assert y.shape == shape
            (grad,) = torch.autograd.grad(y.sum(), w)
            seen += [y.item(), grad.item()]
            fastqat.step(q)
        runs.append(seen)
    assert runs[0] == runs[1]
    if "oscillation" in options:
        assert runs[0][-1] == 0.0  # frozen by now


def test_a_step_that_is_set_back(plain: list[Tensor]) -> None:
    """Tracking goes on from there at once, and does not stand still until the step has caught up."""
    net = prepared()
    run(net, 6)
    for q in quantizers(net):
        q.step.fill_(2)
    before = [int(q.tracker.counts[0]) for q in quantizers(net)]
    kick(net, 6)
    net(X)
    assert all(int(q.tracker.counts[0]) > n for q, n in zip(quantizers(net), before, strict=True))
    assert all(int(q.tracker.clock[1]) == 2 for q in quantizers(net))


def test_data_parallel_training_sends_no_state_round() -> None:
    """The names that DistributedDataParallel asks for, until the model is as it was."""
    net = prepared()
    names = set(net._ddp_params_and_buffers_to_ignore)
    assert names == {name for name, _ in net.named_buffers() if ".tracker." in name} and len(names) == 10
    fastqat.remove(net)
    assert not hasattr(net, "_ddp_params_and_buffers_to_ignore")
