"""Saved activations in fewer bytes: the same training bit for bit, layer by layer and as a whole."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compressed import RANGES, assert_same, batches, network, prepared, saved, size, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastqat

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", RANGES)
def test_50_steps_are_bit_identical(kind: str) -> None:
    """Weights, scales, statistics of BN: conv + BN + ReLU with residuals, in place, depth-wise, dilated, transposed."""
    inplace = kind in ("lsq+", "fixed")
    count = 50 if kind in ("lsq", "fixed", "pact", "running_minmax") else 5
    plain = prepared(network(inplace), *batches(1), **RANGES[kind])
    less = copy.deepcopy(plain)
    done = fastqat.compress_saved_activations(less)
    assert len(done.compressed) == 7 and len(done.masked) == 6 and done.left_alone == {}
    before = plain.state_dict()["0.weight"].clone()
    wanted = trained(plain, batches(count))
    assert_same(trained(less, batches(count)), wanted)
    assert not torch.equal(wanted["0.weight"], before)


@pytest.mark.parametrize("kind", ("lsq", "fixed"))
@pytest.mark.parametrize("options", ({"masks": False}, {"activations": False}), ids=("codes", "masks"))
def test_each_half_alone(kind: str, options: dict[str, bool]) -> None:
    """Codes without masks, and masks without codes."""
    plain = prepared(network(), *batches(1), **RANGES[kind])
    less = copy.deepcopy(plain)
    done = fastqat.compress_saved_activations(less, **options)
    assert bool(done.compressed) == options.get("activations", True) and bool(done.masked) == options.get("masks", True)
    assert_same(trained(less, batches(2)), trained(plain, batches(2)))


LAYERS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda bias: nn.Linear(6, 5, bias), (7, 6)),
    "linear-3d": (lambda bias: nn.Linear(6, 5, bias), (3, 4, 6)),
    "linear-1d": (lambda bias: nn.Linear(6, 5, bias), (6,)),
    "linear-to-one": (lambda bias: nn.Linear(6, 1, bias), (7, 6)),
    "conv1d": (lambda bias: nn.Conv1d(4, 6, 3, stride=2, padding=1, bias=bias), (2, 4, 9)),
    "conv2d-same": (lambda bias: nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=bias), (2, 4, 7, 7)),
    "conv2d-valid": (lambda bias: nn.Conv2d(4, 6, (1, 3), padding="valid", bias=bias), (2, 4, 7, 7)),
    "conv2d-groups": (lambda bias: nn.Conv2d(4, 6, 3, (1, 2), groups=2, dilation=2, bias=bias), (2, 4, 9, 9)),
    "conv2d-unbatched": (lambda bias: nn.Conv2d(4, 6, 3, bias=bias), (4, 7, 7)),
    "conv3d": (lambda bias: nn.Conv3d(2, 4, 2, bias=bias), (2, 2, 4, 4, 4)),
    "transposed1d": (lambda bias: nn.ConvTranspose1d(4, 6, 3, 2, output_padding=1, bias=bias), (2, 4, 5)),
    "transposed2d": (lambda bias: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, bias=bias), (2, 4, 5, 5)),
    "transposed3d": (lambda bias: nn.ConvTranspose3d(2, 4, 2, bias=bias), (2, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("bias", (True, False), ids=("bias", "no-bias"))
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_torch(name: str, bias: bool) -> None:
    """Values and strides, of strided inputs too, with and without autocast, for gradients of any strides."""
    make, shape = LAYERS[name]
    torch.manual_seed(2)
    x = torch.randn(shape)
    turned = x.transpose(0, 1).clone().transpose(0, 1) if x.dim() in (2, 3) else x
    if x.dim() == 4:
        turned = x.contiguous(memory_format=torch.channels_last)
    plain = prepared(nn.Sequential(make(bias)), x, learn="scale")
    less = copy.deepcopy(plain)
    assert fastqat.compress_saved_activations(less).compressed == ("0",)
    for value in (x, turned):
        for dtype in (None, torch.bfloat16):
            for loss in (lambda y: y.float().square().sum(), lambda y: y.float().mean()):
                found = [_gradients(model, value, dtype, loss) for model in (plain, less)]
                for got, wanted in zip(*found, strict=True):
                    assert got.stride() == wanted.stride() and torch.equal(got, wanted)


def _gradients(model: nn.Module, x: Tensor, dtype: Any, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Of every parameter and of x, whose strides stay; and the result."""
    model.zero_grad()
    x = torch.empty_strided(x.shape, x.stride()).copy_(x).requires_grad_()
    with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
        y = model(x)
    loss(y).backward()
    return [y.detach(), *(p.grad for p in (*model.parameters(), x) if p.grad is not None)]


@pytest.mark.parametrize("frozen", ("input", "weight"))
@pytest.mark.parametrize("name", ("linear", "linear-3d", "conv2d-groups"))
def test_what_needs_no_gradient_gets_none(name: str, frozen: str) -> None:
    """A first layer, whose input has no gradient, and a weight that is not trained, which keeps no codes."""
    make, shape = LAYERS[name]
    plain = prepared(nn.Sequential(make(True)), torch.randn(shape))
    less = copy.deepcopy(plain)
    fastqat.compress_saved_activations(less)
    x = torch.randn(shape).transpose(0, 1).clone().transpose(0, 1)
    found = []
    for model in (plain, less):
        if frozen == "weight":
            for p in (model[0].weight, model[0].weight_fake_quant.scale):
                p.requires_grad_(False)
        value = x.clone().requires_grad_(frozen == "weight")
        with saved() as kept:
            y = model(value)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in (*model.parameters(), value) if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(got, wanted) for got, wanted in zip(*found, strict=True))
    if frozen == "weight":
        assert not any(t.numel() == x.numel() // 2 for t in kept if t.dtype == torch.uint8)


@pytest.mark.parametrize("kind", ("lsq", "in_hindsight"))
def test_autocast(kind: str) -> None:
    """The bf16 copy that autocast makes for the layer is what the codes give back."""
    plain = prepared(network(), *batches(1), **RANGES[kind])
    less = copy.deepcopy(plain)
    fastqat.compress_saved_activations(less)
    wanted = trained(plain, batches(3), dtype=torch.bfloat16)
    assert_same(trained(less, batches(3), dtype=torch.bfloat16), wanted)


@pytest.mark.parametrize("kind", ("lsq", "running_minmax"))
@pytest.mark.parametrize("reentrant", (True, False))
def test_activation_checkpointing(kind: str, reentrant: bool) -> None:
    """The recomputed forward saves the same; marks of what came before the checkpoint are no part of it."""
    plain = prepared(network(), *batches(1), **RANGES[kind])
    less = copy.deepcopy(plain)
    fastqat.compress_saved_activations(less)
    states = []
    for model in (plain, less):
        parts = model[:3], model[3:5], model[5:]
        run = lambda x, p=parts: p[2](checkpoint(p[1], p[0](x), use_reentrant=reentrant))  # noqa: E731
        states.append(trained(model, batches(3), run))
    assert_same(states[1], states[0])


@pytest.mark.parametrize("kind", ("lsq", "fixed"))
def test_compiled(kind: str) -> None:
    """One graph; codes are what it saves of the inputs of its layers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(294, 5)
    plain = prepared(nn.Sequential(*layers), *batches(1), **RANGES[kind])
    less = copy.deepcopy(plain)
    fastqat.compress_saved_activations(less)
    states, bytes_saved = [], []
    for model in (plain, less):
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        states.append(trained(model, batches(2), run))
        with saved() as kept:
            run(batches(1)[0])
        bytes_saved.append(size(kept))
    assert_same(states[1], states[0])
    assert bytes_saved[1] < 0.9 * bytes_saved[0]


def test_copies_keep_codes() -> None:
    """A deep copy and a pickled one train the same, and save as little."""
    model = prepared(network(), *batches(1), learn="scale")
    fastqat.compress_saved_activations(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with saved() as kept:
        model(batches(1)[0])
    wanted = trained(model, batches(2))
    for other in copies:
        with saved() as kept_by_copy:
            other(batches(1)[0])
        assert size(kept_by_copy) == size(kept)
    fresh = prepared(network(), *batches(1), learn="scale")
    fresh(batches(1)[0])
    assert_same(trained(fresh, batches(2)), wanted)
    for other in copies:
        assert_same(trained(other, batches(2)), wanted)


def test_left_alone() -> None:
    """What keeps its input says why."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 8)
            self.attention = nn.MultiheadAttention(8, 2)
            self.mirror = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
            self.lopsided = nn.Conv2d(2, 2, 2, padding="same")
            self.by_channel, self.at_output, self.bare, self.float = (nn.Linear(8, 8) for _ in range(4))
            self.good = nn.Linear(8, 8)

    spec, config = fastqat.QSpec(bits=4), fastqat.QConfig(activation=fastqat.QSpec(bits=4, axis=1))
    overrides = {
        "by_channel": config,
        "at_output": fastqat.QConfig(spec, spec, activation_on="output"),
        "bare": fastqat.QConfig(spec, None),
        "float": None,
    }
    model = fastqat.prepare(Several(), fastqat.QConfig(spec, spec), overrides=overrides)
    done = fastqat.compress_saved_activations(model)
    assert done.compressed == ("attention.out_proj", "good")
    words = {"table": "indices", "attention": "one quantizer", "mirror": "reflect", "lopsided": "same"}
    words |= {"by_channel": "channel", "at_output": "output", "bare": "not quantized", "float": ""}
    assert done.left_alone.keys() == words.keys()
    assert all(word in done.left_alone[name] and done.left_alone[name] for name, word in words.items())


def test_undone_by_remove() -> None:
    """Classes, attributes and what is saved are those of before, by either of the two."""
    plain = prepared(network(), *batches(1), learn="scale")
    for undo in (lambda model, done: done.remove(), lambda model, done: fastqat.remove(model)):
        model = copy.deepcopy(plain)
        undo(model, fastqat.compress_saved_activations(model))
        wanted = network() if not any(isinstance(m, fastqat.FakeQuant) for m in model.modules()) else plain
        assert [type(m) for m in model.modules()] == [type(m) for m in wanted.modules()]
        assert not any("saves_codes" in vars(m) for m in model.modules())


def test_evaluation_and_switched_off_quantizers() -> None:
    """Evaluation gives the same, saves nothing and changes nothing; quantizers that are off leave a float network."""
    plain = prepared(network(), *batches(1), learn="scale")
    less = copy.deepcopy(plain)
    fastqat.compress_saved_activations(less)
    x = batches(1)[0]
    before = copy.deepcopy(less.state_dict())
    with torch.no_grad():
        assert torch.equal(less.eval()(x), plain.eval()(x))
    assert_same(less.state_dict(), before)
    for model in (plain, less):
        model.zero_grad()
        with fastqat.fake_quant_enabled(model, False):
            model.train()(x).square().sum().backward()
    assert_same(*({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (less, plain)))
    with fastqat.fake_quant_enabled(less, False), saved() as kept:
        less(x)
    assert any(t.is_floating_point() and t.shape == x.shape for t in kept)


def test_frozen_batch_norm() -> None:
    """BN in evaluation mode within training: computed again with its running statistics."""
    plain = prepared(network(), *batches(1), learn="scale")
    less = copy.deepcopy(plain)
    fastqat.compress_saved_activations(less)
    for model in (plain, less):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    assert_same(trained(less, batches(2)), trained(plain, batches(2)))


@pytest.mark.parametrize("hook", (lambda m, x, y: y * 3, lambda m, x, y: [y.mul_(3)].clear()), ids=("new", "in place"))
def test_a_hook_that_changes_the_result_is_heard(hook: Any) -> None:
    """What the layer multiplies is then not what the codes are of: the layer keeps it as it is."""
    plain = prepared(nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4), learn="scale")
    less = copy.deepcopy(plain)
    fastqat.compress_saved_activations(less)
    x, found = torch.randn(5, 4), []
    for model in (plain, less):
        model[0].activation_fake_quant.register_forward_hook(hook)
        model(x).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0])


def test_no_second_derivative() -> None:
    """create_graph=True is refused with a reason, wherever something was left out."""
    model = prepared(nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4), learn="scale")
    fastqat.compress_saved_activations(model)
    with pytest.raises(NotImplementedError, match="compress_saved_activations: wanted .* create_graph"):
        torch.autograd.grad(model(torch.randn(5, 4)).square().sum(), model[0].weight, create_graph=True)


def test_transforms_of_torch_func() -> None:
    """They see the layers of torch, for they know no rule for these."""
    plain = prepared(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(5, 4), range="mse")
    less = copy.deepcopy(plain)
    fastqat.compress_saved_activations(less)
    x = torch.randn(5, 4)
    wanted, got = (torch.func.grad(lambda v, m=m: m(v).square().sum())(x) for m in (plain, less))
    assert torch.equal(got, wanted)


def test_wrong_arguments() -> None:
    """A model without quantized layers, and nothing asked for."""
    with pytest.raises(ValueError, match="model: wanted one that fastqat.prepare prepared"):
        fastqat.compress_saved_activations(nn.Linear(2, 2))
    model = prepared(nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4))
    with pytest.raises(ValueError, match="activations, masks: wanted at least one"):
        fastqat.compress_saved_activations(model, activations=False, masks=False)


@pytest.mark.usefixtures("process_group")
def test_data_parallel() -> None:
    """Within DistributedDataParallel."""
    plain = prepared(network(), *batches(1), learn="scale")
    less = copy.deepcopy(plain)
    fastqat.compress_saved_activations(less)
    states = [trained(m, batches(2), nn.parallel.DistributedDataParallel(m)) for m in (plain, less)]
    assert_same(states[1], states[0])
