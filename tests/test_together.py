"""All weights of a model in one call: the results of quantizing them one by one, bit for bit, in every use."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import fastqat
from fastqat import Dampening, Oscillation, QConfig, QSpec

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TRACKED = QSpec(3, axis=0, learn="scale", oscillation=Oscillation(0.1, 0.25), dampening=Dampening(0.3))
SPECS = {
    "plain": QSpec(3, axis=0, learn="scale"),
    "fixed range": QSpec(4),
    "tracked": TRACKED,
    "per tensor": QSpec(
        3, learn="scale", grad_scale="lsq", oscillation=Oscillation(0.1, fastqat.Schedule("constant", 0.25))
    ),
    "six bits": QSpec(6, axis=0, learn="scale", oscillation=Oscillation(0.1, 0.25, max_bits=8)),
    "ewgs": QSpec(3, axis=0, learn="scale", estimator="ewgs"),
    "stochastic": QSpec(3, axis=0, learn="scale", estimator="stochastic", oscillation=Oscillation(0.1)),
    "groups": QSpec(3, axis=0, group_size=3, learn="scale", oscillation=Oscillation(0.1, 0.25)),
}


class Net(nn.Module):
    """A dense, a depth-wise and a transposed convolution, two linear layers, and one that is not used."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.dense = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(6, 3, 2, stride=2)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        if tied:
            self.tied.weight = self.head.weight
        self.unused = nn.Linear(3, 3)
        self.checkpointed = False

    def body(self, x: Tensor) -> Tensor:
        return self.norm(self.up(self.depthwise(self.dense(x).relu())))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.tied(self.head(x.mean((2, 3))))


def network(spec: QSpec, together: int | bool, tied: bool = False) -> Net:
    torch.manual_seed(0)
    net = Net(tied)
    fastqat.prepare(net, QConfig(spec, None))
    if together:
        fastqat.quantize_weights_together(net, bucket_bytes=None if together is True else together)
    return net


def train(net: nn.Module, call: Callable[[Tensor], Tensor] | None = None, steps: int = 12) -> list[Tensor]:
    """A few steps with a kick that makes every third weight oscillate; returns losses, gradients and the state."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.05, momentum=0.5)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = ((net if call is None else call)(X) - 1).square().mean()
        loss.backward()
        learned = (p for n, p in net.named_parameters() if p.requires_grad and "unused" not in n)
        seen += [loss.detach(), *(p.grad.clone() for p in learned)]
        optimizer.step()
        with torch.no_grad():
            for name, p in net.named_parameters():
                if name.endswith("weight") and not name.startswith("norm"):
                    p.view(-1)[::3] += 0.2 * (-1) ** step
    # A layer that is never called does not look at its weight; together with the others it is tracked, and stays put.
    # Batch normalisation that is computed again moves its averages again.
    state = {n: t for n, t in net.state_dict().items() if not n.startswith("unused") and "norm." not in n}
    return [*seen, *state.values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bucket", [True, 1, 300], ids=["one bucket", "a bucket for each", "some buckets"])
@pytest.mark.parametrize("name", SPECS)
def test_equal_to_one_by_one(name: str, bucket: int | bool) -> None:
    alone, together = network(SPECS[name], False), network(SPECS[name], bucket)
    assert equal(train(alone), train(together))
    if SPECS[name].oscillation and SPECS[name].oscillation.freezes:
        frozen = sum(int(m.tracker.counts[2]) for m in together.modules() if getattr(m, "tracker", None) is not None)
        assert frozen > 0, "the test is blind: nothing was frozen"


def test_a_shared_weight_is_quantized_once() -> None:
    """Its gradients meet before the quantizer, not behind it: sums may round differently."""
    spec = replace(TRACKED, dampening=None)  # which is added for each use
    alone, together = network(spec, False, tied=True), network(spec, True, tied=True)
    for net in (alone, together):
        net(X).square().sum().backward()
    for a, b in zip(alone.parameters(), together.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_one_call_for_the_forward_and_one_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer finds its weight done: there are two calls of the multi-tensor ops in a step, and no other."""
    net = network(TRACKED, True)
    with torch.profiler.profile() as profile:
        net(X).sum().backward()
    calls = {e.key: e.count for e in profile.key_averages() if e.key.startswith("fastqat::")}
    assert calls == {"fastqat::multi_tensor_fake_quantize": 1, "fastqat::multi_tensor_fake_quantize_backward": 1}


def test_checkpointing() -> None:
    """A forward pass that is computed again takes the weights that are there, and leaves the same counters."""
    plain, again = network(TRACKED, True), network(TRACKED, True)
    again.checkpointed = True
    assert equal(train(plain), train(again))


def test_autocast() -> None:
    def call(net: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return net(x).float()

        return run

    alone, together = network(TRACKED, False), network(TRACKED, True)
    assert equal(train(alone, call(alone)), train(together, call(together)))


def test_compiled() -> None:
    """One graph, no recompilation, the state of the eager run."""
    torch.compiler.reset()
    eager, net = network(TRACKED, True), network(TRACKED, True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert equal(train(eager), train(net, compiled))
    torch.compiler.reset()


def test_a_layer_called_by_itself_sees_its_weight_of_now() -> None:
    net = network(TRACKED, True).eval()
    net(X)
    with torch.no_grad():
        net.head.weight.neg_()
        alone = copy.deepcopy(net.head)
        x = torch.ones(2, 3)
        assert torch.equal(net.head(x), alone(x))
        expected = torch.nn.functional.linear(x, alone.weight_fake_quant(alone.weight), alone.bias)
        assert torch.equal(net.head(x), expected)


def test_layers_in_evaluation_are_not_tracked() -> None:
    net = network(TRACKED, True)
    net.dense.eval()
    net(X)
    assert int(net.dense.weight_fake_quant.tracker.clock[1]) == -1
    assert int(net.head.weight_fake_quant.tracker.clock[1]) == 0


def test_copies_have_weights_of_their_own() -> None:
    net = network(TRACKED, True)
    other = copy.deepcopy(net)
    train(other)
    assert int(net.head.weight_fake_quant.tracker.clock[1]) == -1
    assert equal(train(net), train(network(TRACKED, True)))


def test_taken_back() -> None:
    net = network(TRACKED, False)
    handle = fastqat.quantize_weights_together(net)
    handle.remove()
    net(X)
    assert net.head.weight_fake_quant.together.value is None
    fastqat.quantize_weights_together(net)  # and given back
    fastqat.remove(fastqat.prepare(network(TRACKED, True), QConfig(TRACKED, None)))(X)


def test_switched_off_and_calibrating() -> None:
    net = network(TRACKED, True)
    with fastqat.fake_quant_enabled(net, False):
        off = net(X)
    torch.manual_seed(0)
    assert torch.equal(off, Net()(X))


@pytest.mark.parametrize("wrong", [0, -1, True])
def test_mistakes(wrong: int) -> None:
    with pytest.raises(ValueError, match="bucket_bytes"):
        fastqat.quantize_weights_together(network(TRACKED, False), bucket_bytes=wrong)
    with pytest.raises(ValueError, match="wanted a prepared model"):
        fastqat.quantize_weights_together(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="that has them|one that has"):
        fastqat.quantize_weights_together(network(TRACKED, True))


def max_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 6, max_norm=0.5), nn.Linear(6, 4))


def plain_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def clamped(net: nn.Module) -> None:
    def clamp(layer: nn.Module, _: object) -> None:
        layer.weight.data.clamp_(-0.2, 0.2)

    net[0].register_forward_pre_hook(clamp)


# What changes a weight after the hook of the model: how the network is made, its input, and what is done to it.
CHANGED: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[nn.Module], object]]] = {
    "max_norm": (max_norm, torch.arange(5), lambda net: None),
    "pruned": (plain_layers, X[0, :, :, :6].flatten(0, 1), lambda net: prune.l1_unstructured(net[0], "weight", 0.3)),
    "spectral norm": (plain_layers, X[0, :, :, :6].flatten(0, 1), lambda net: spectral_norm(net[0])),
    "clamped by a hook": (plain_layers, X[0, :, :, :6].flatten(0, 1), clamped),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CHANGED)
def test_weights_that_change_before_they_are_used(name: str) -> None:
    make, x, change = CHANGED[name]
    seen = []
    for together in (False, True):
        net = fastqat.prepare(make(), QConfig(replace(TRACKED, dampening=None), None))
        if together:
            fastqat.quantize_weights_together(net)
        change(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.5)
        outputs = []
        for _ in range(5):
            optimizer.zero_grad()
            outputs.append(net(x))
            outputs[-1].square().sum().backward()
            optimizer.step()
            fastqat.step(net[0].weight_fake_quant)
        seen.append([*(y.detach() for y in outputs), *net.state_dict().values()])
    assert equal(*seen)


class Parts(nn.Module):
    """Two parts, each of them checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = plain_layers()
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.parts(x)
        for part in self.parts:
            x = checkpoint(part, x, use_reentrant=self.reentrant)
        return x


def parts(together: bool) -> Parts:
    net = fastqat.prepare(Parts(), QConfig(TRACKED, None))
    if together:
        fastqat.quantize_weights_together(net)
    return net


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    net(x).square().sum().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_reentrant_checkpointing() -> None:
    """Each part has a backward pass of its own."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    alone, together = parts(False), parts(True)
    together.reentrant = True
    assert equal(gradients(alone, x), gradients(together, x))


def test_what_is_computed_again_is_not_of_the_forward_before() -> None:
    """Switched off between two forward passes of one step."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    alone, together = parts(False), parts(True)
    together.reentrant = False
    for net in (alone, together):
        net(x)
        fastqat.fake_quant_enabled(net, False)
    assert equal(gradients(alone, x), gradients(together, x))


def test_frozen_layers_stay_out_of_the_graph() -> None:
    """Else a network whose head alone is trained would pay for the gradients of all others."""
    net = parts(True)
    net.parts[0].requires_grad_(False)
    seen = []
    net.parts[0].register_forward_hook(lambda layer, inputs, y: seen.append(y.requires_grad))
    net(torch.ones(2, 6)).sum().backward()
    assert seen == [False] and net.parts[2].weight.grad is not None


def test_layers_that_lost_their_quantizer() -> None:
    net = parts(True)
    fastqat.remove(net.parts[0])
    assert equal(gradients(net, torch.ones(2, 6)), gradients(net, torch.ones(2, 6)))


def test_hooks_of_a_quantizer_run() -> None:
    net, seen = parts(True), []
    net.parts[0].weight_fake_quant.register_full_backward_hook(lambda *_: seen.append(1))
    gradients(net, torch.ones(2, 6))
    assert seen == [1]


def test_evaluation_keeps_no_quantized_weights_and_nothing_keeps_the_model() -> None:
    net = parts(True).eval()
    with torch.no_grad():
        net(torch.ones(2, 6))
    assert net.parts[0].weight_fake_quant.together.value is None
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(net)
        del net
        assert alive() is None
    finally:
        gc.enable()
