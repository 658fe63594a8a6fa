"""Activations and gradients with one scale at 64 M elements, against a copy and torch.compile: float32, and bfloat16.

The in-hindsight forward pass, whose range the step before has seen; the gradient quantizer, with its extremes, noise
and count; PACT forward and backward. Tensors go round, so that none is found in the cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_timing import DEVICE, SHRINK, Call, Record, attempts, rounds_of, sets_past_cache, take_turns
from torch import Tensor

from fastqat.one_tensor import Grid, Options, fake_quantize_tensor

NUMEL, QMAX, STEPS = 2**26 // SHRINK, 7, 1e-3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ops = torch.ops.fastqat


class State:
    """What an activation and a gradient keep from step to step, on the device."""

    def __init__(self) -> None:
        with torch.device(DEVICE):
            self.range = [torch.tensor([v]) for v in (-1.0, 1.0, torch.inf, -torch.inf)]
            self.scale, self.zero_point, self.limit = (torch.tensor([v]) for v in (0.3, 0.0, 1.0))
            self.low, self.high, self.gamma = (torch.tensor([v]) for v in (-1.0, 1.0, 0.8))
            self.beyond, self.seen, self.observed, self.step = (torch.tensor([v]) for v in (0, 0, -1, 0))
            self.codes, self.gradient_codes = (torch.tensor(q, dtype=torch.int32) for q in ((0, 15), (-QMAX, QMAX)))
            self.none, self.no_bits = torch.empty(0), torch.empty(0, dtype=torch.uint8)
            self.no_count = torch.empty(0, dtype=torch.int64)
        self.inside = torch.empty((NUMEL + 7) // 8, dtype=torch.uint8, device=DEVICE)

    def in_hindsight(self, x: Tensor, _: Tensor, y: Tensor) -> None:
        """y by the range of the step before; the extremes of x; a bit of each element for its gradient."""
        self.step += 1
        state = (*self.range, self.observed, self.scale, self.zero_point)
        ops.advance_range(self.codes, self.step, False, 0.9, *state)
        call = (self.scale, self.zero_point, None, self.codes, 0.0, 0.0, True, 0, -1, self.no_count, self.none, 0)
        bits = (self.inside, self.no_bits, self.no_bits)
        ops.fake_quantize_tensor(x, *call, *self.range[2:], self.no_count, *bits, y)

    def gradient(self, g: Tensor, _: Tensor, y: Tensor) -> None:
        """y by stochastic rounding in an interval that follows the extremes of g; how many lie beyond it."""
        self.step += 1
        ops.minmax_out(g, None, self.low, self.high)
        state = (self.gamma, self.beyond, self.seen, self.observed, self.limit, self.scale)
        constants = (g.numel(), 1e-3, STEPS, STEPS)
        ops.advance_interval(self.low, self.high, self.gradient_codes, self.step, False, *constants, *state)
        call = (self.scale, None, None, self.gradient_codes, 1e-8, 0.0, True, 0, 1, self.step, self.limit, 0)
        ops.fake_quantize_tensor(g, *call, self.none, self.none, self.beyond, *[self.no_bits] * 3, y)

    def pact(self, x: Tensor, scale: Tensor) -> Tensor:
        """PACT with 4 bits, by bits alone."""
        grid = Grid(scale, None, None, self.codes)
        return fake_quantize_tensor(x, grid, None, Options(1e-8, pact=True))[0]

    def eager_gradient(self, g: Tensor, _: Tensor, y: Tensor) -> Tensor:
        """The same in plain torch: noise, clip, round (LBT, section 4)."""
        limit = self.gamma * g.abs().max()
        scale = 2 * limit / (2 * QMAX)
        u = torch.clamp((g + limit) / scale + (torch.rand_like(g) - 0.5), 0, 2 * QMAX).round()
        y.copy_(u * scale - limit)
        return (g.abs() > limit).sum()


def plain_pact(x: Tensor, scale: Tensor) -> Tensor:
    """PACT with 4 bits in plain torch, by autograd."""
    clipped = torch.minimum(torch.relu(x), scale * 15)
    return clipped + ((clipped / scale).round() * scale - clipped).detach()


def training(function: Callable[[Tensor, Tensor], Tensor], sets: list[tuple[Tensor, ...]]) -> Call:
    """Forward and backward pass: gradients of x and of the scale."""
    scale = torch.tensor([0.2], device=DEVICE, requires_grad=True)

    def run(x: Tensor, g: Tensor, _: Tensor) -> object:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(function(leaf, scale), (leaf, scale), g)

    return rounds_of(run, sets)


def measure(record: Record, rounds: int) -> None:
    """All of them in both dtypes."""
    for name, dtype in DTYPES.items():
        torch.manual_seed(0)
        size = torch.empty(0, dtype=dtype).element_size()
        sets = [
            tuple(torch.randn(NUMEL, device=DEVICE).to(dtype) for _ in range(3))
            for _ in range(max(2, sets_past_cache(3 * size * NUMEL)))
        ]
        state = State()
        makers: dict[str, Callable[[], Call]] = {
            "copy": lambda s=sets: rounds_of(lambda x, g, y: y.copy_(x), s),
            "in-hindsight": lambda s=sets, q=state: rounds_of(q.in_hindsight, s),
            "gradient": lambda s=sets, q=state: rounds_of(q.gradient, s),
            "gradient, eager": lambda s=sets, q=state: rounds_of(q.eager_gradient, s),
            "gradient, compiled": lambda s=sets, q=state: rounds_of(torch.compile(q.eager_gradient), s),
            "PACT": lambda s=sets, q=state: training(q.pact, s),
            "PACT, compiled": lambda s=sets: training(torch.compile(plain_pact), s),
        }
        found = take_turns(attempts(makers), rounds)
        record.add({f"activations, {kind}, {name}": seconds for kind, seconds in found.items()})
        for first, second, relation, bound in (
            ("in-hindsight", "copy", "<=", 1.15),
            ("gradient", "copy", "<=", 2.2),
            ("gradient, eager", "gradient", ">=", 10.0),
            ("gradient, compiled", "gradient", ">=", 1.0),
            ("PACT, compiled", "PACT", ">=", 1.3),
        ):
            value = record.ratio(f"activations, {first}, {name}", f"activations, {second}, {name}")
            record.goal(f"64 M, {name}: {first} / {second}", value, relation, bound)
