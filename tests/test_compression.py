"""Saved activations in fewer bytes: the same training bit for bit, and how much less is saved."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastqat
from fastqat.nn.masks import keep_less

RANGES: dict[str, dict[str, Any]] = {
    "lsq": {"learn": "scale", "grad_scale": "lsq"},
    "lsq+": {"learn": "scale+offset"},
    "fixed": {},
    "pact": {"learn": "scale", "estimator": "pact", "signed": False},
    "running_minmax": {"range": "running_minmax", "symmetric": False},
    "in_hindsight": {"range": "in_hindsight"},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    """A residual block, whose shortcut is added in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=2, dilation=2), nn.BatchNorm2d(6)
        self.relu1, self.relu2 = nn.ReLU6(inplace), nn.ReLU(inplace)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.inplace:
            y += x
            return self.relu2(y)
        return self.relu2(y + x)


def network(inplace: bool = False, count: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace)
    blocks = [Block(inplace) for _ in range(count)]
    tail = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*stem, *blocks, *tail)


def prepared(model: nn.Module, batch: Tensor, **options: Any) -> nn.Module:
    """The model at W4A4, with ranges that are set."""
    weight, activation = fastqat.QSpec(bits=4, axis=0, learn="scale"), fastqat.QSpec(**{"bits": 4, **options})
    fastqat.prepare(model, fastqat.QConfig(weight, activation))
    model.train()(batch)
    return model


def trained(
    model: nn.Module, batches: list[Tensor], run: Callable[[Tensor], Tensor] | None = None, dtype: Any = None
) -> dict[str, Tensor]:
    """State after one step of SGD per batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in batches:
        context = torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext()
        with context:
            y = (run or model)(batch)
        optimizer.zero_grad()
        F.cross_entropy(y.float(), torch.arange(len(batch))).backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal values, key by key."""
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 3, 9, 9, generator=generator) for _ in range(count)]


@contextlib.contextmanager
def saved() -> Iterator[list[Tensor]]:
    """What autograd saves meanwhile, each storage once."""
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.detach()
        return t

    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield tensors
    tensors += found.values()


def size(tensors: list[Tensor]) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


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


def large_floats(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of the floating tensors of four dimensions that a forward saves, but for weights."""
    with saved() as kept:
        model(x)
    return sorted(tuple(t.shape) for t in kept if t.is_floating_point() and t.dim() == 4 and t.shape[0] == len(x))


@pytest.mark.parametrize("kind", RANGES)
def test_what_is_saved(kind: str) -> None:
    """Of floating tensors nothing but the inputs of BN; of the rest the codes, and one or two bits of each element."""
    torch.manual_seed(0)
    relus = nn.ReLU(), nn.ReLU6()
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), relus[0], nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), relus[1]
    x = batches(1)[0].requires_grad_()
    model = prepared(nn.Sequential(*layers, nn.Conv2d(4, 2, 3)), x, **RANGES[kind])
    inputs_of_bn = [(3, 4, 5, 5), (3, 6, 7, 7)]
    inputs = [(3, 3, 9, 9), (3, 6, 7, 7), (3, 4, 5, 5)]
    assert len(large_floats(model, x)) >= len(inputs_of_bn) + len(inputs)
    done = fastqat.compress_saved_activations(model)
    learned = kind.startswith("lsq")  # which needs the first input, for there is nothing to compute it of
    assert large_floats(model, x) == sorted([*inputs_of_bn, *([(3, 3, 9, 9)] if learned else [])])
    with saved() as kept:
        model(x)
    numels = [torch.Size(shape).numel() for shape in inputs]
    codes = sum(-(-n * 4 // 8) for n in numels)
    bits = sum(-(-n // 8) for n in (*numels[1:], *([] if learned else numels), *(numels if kind == "pact" else [])))
    assert sum(t.numel() for t in kept if t.dtype == torch.uint8) == codes + bits
    done.remove()
    assert len(large_floats(model, x)) >= len(inputs_of_bn) + len(inputs)


@pytest.mark.parametrize("kind", ("lsq", "fixed"))
def test_with_fused_activations(kind: str) -> None:
    """A quantizer that computes the ReLU in front of it takes the result of BN, which is computed again for it."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(294, 5)
    layers = *layers[:3], nn.Conv2d(6, 6, 1), *layers[3:]
    spec = fastqat.QSpec(**{"bits": 4, **RANGES[kind]})
    plain = fastqat.prepare(nn.Sequential(*layers), fastqat.QConfig(fastqat.QSpec(), spec), fuse_activations=True)
    plain(batches(1)[0])
    less = copy.deepcopy(plain)
    assert fastqat.compress_saved_activations(less).masked == ()
    # Of BN its input; what float training would keep of the ReLU is the input of the 1 x 1 convolution.
    assert large_floats(less, batches(1)[0]).count((3, 6, 7, 7)) == 1
    assert large_floats(plain, batches(1)[0]).count((3, 6, 7, 7)) == 2 + (kind == "lsq")
    assert_same(trained(less, batches(2)), trained(plain, batches(2)))


def test_residual_blocks_keep_every_third_sum() -> None:
    """What a learned range needs behind a residual connection is computed of the operands of the sum."""
    for inplace in (False, True):
        plain = prepared(network(inplace, 5), *batches(1), learn="scale")
        less = copy.deepcopy(plain)
        fastqat.compress_saved_activations(less)
        # The inputs of eleven BN, and the third of the five sums.
        assert large_floats(less, batches(1)[0]).count((3, 6, 4, 4)) == 11 + 1
        plain(batches(1)[0])
        assert_same(trained(less, batches(2)), trained(plain, batches(2)))


@pytest.mark.parametrize("change", ("result", "input", "bias", "operand"))
def test_what_was_changed_in_place_is_not_computed_again(change: str) -> None:
    """A recipe holds while its tensors and its result are what they were; else the tensor itself is kept."""

    class Changed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.relu, self.conv = nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(x * 1.0)
            with torch.no_grad():
                if change == "result":
                    y.mul_(2)
                elif change == "bias":
                    self.bn.bias.add_(0.5)
                elif change == "input":
                    x.mul_(0.5)
            if change == "input":
                y = F.batch_norm(x, None, None, training=True) + y
            if change == "operand":
                other = self.relu(x - 0.1)
                with torch.no_grad():
                    y.add_(1)
                return self.conv(y + other)  # both are still there
            return self.conv(y)

    x = batches(1)[0]
    plain = prepared(Changed(), x.clone().requires_grad_() * 1.0, learn="scale")
    less = copy.deepcopy(plain)
    fastqat.compress_saved_activations(less)
    leaf = [x.clone().requires_grad_() for _ in range(2)]
    for model, value in zip((plain, less), leaf, strict=True):
        model.zero_grad()
        model(value * 1.0).square().sum().backward()
    assert torch.equal(leaf[0].grad, leaf[1].grad)
    assert_same(*({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (less, plain)))


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("module", (nn.ReLU, nn.ReLU6))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_masks_are_those_of_torch(module: Any, inplace: bool, dtype: torch.dtype) -> None:
    """At the corners, for NaN (of ReLU: torch's ReLU6 is of two minds), for gradients and inputs of other strides."""
    nan, inf = float("nan") if module is nn.ReLU else 2.0, float("inf")
    corners = [nan, inf, -inf, -1.0, -0.0, 0.0, 1e-30, 3.0, 5.97, 6.0, 7.0]
    x = torch.tensor([*corners, *torch.randn(19).tolist()], dtype=dtype).view(5, 6)
    gradients = torch.randn(5, 6).to(dtype), torch.randn(6, 5).to(dtype).t(), torch.ones((), dtype=dtype).expand(5, 6)
    for value in (x, x.t().clone().t(), x[:, :1].expand(5, 6)):
        for g in gradients:
            found = []
            for relu in (module(inplace), module(inplace)):
                if found:
                    assert keep_less(relu)
                leaf = value.clone().as_strided(value.shape, value.clone().stride()).requires_grad_()
                y = relu(leaf * 1)
                made = torch.autograd.grad(y, leaf, g)[0]
                found.append((y, made))
            (y, dx), (wanted, wanted_dx) = found[1], found[0]
            assert type(y.grad_fn).__name__ == "_MaskedReLUBackward"
            assert torch.equal(y.nan_to_num(-9), wanted.nan_to_num(-9))
            assert torch.equal(dx, wanted_dx) and dx.stride() == wanted_dx.stride()


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


def test_data_parallel(tmp_path: Any) -> None:
    """Within DistributedDataParallel."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = prepared(network(), *batches(1), learn="scale")
        less = copy.deepcopy(plain)
        fastqat.compress_saved_activations(less)
        states = [trained(m, batches(2), nn.parallel.DistributedDataParallel(m)) for m in (plain, less)]
        assert_same(states[1], states[0])
    finally:
        torch.distributed.destroy_process_group()
