"""What is saved of compressed activations: how much less, and what is computed again of what."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compressed import RANGES, assert_same, batches, large_floats, network, prepared, saved, trained
from torch import Tensor, nn

import fastqat
from fastqat.nn.masks import keep_less

pytestmark = pytest.mark.usefixtures("one_thread")


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
