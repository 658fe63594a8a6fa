"""range_search where its candidates are many, and its channels too short or too long for one way of summing.

The C++ backend brings elements into bins where candidates are the same for all channels but for a factor, and quantizes
them with each candidate elsewhere; the tensors of SHARED are large enough for the first.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import device_of, random
from oracle import assert_results

import fastqat  # noqa: F401  (registers the ops)

BACKENDS = ("reference", "cpu", "cuda-on-host", "cuda")
NAMES = ("errors",)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(("shape", "axis"), [((9000,), None), ((12, 9), 0), ((530, 3), 1), ((5, 3, 40), 1)], ids=str)
def test_many_candidates(backend: str, shape: tuple[int, ...], axis: int | None) -> None:
    """131 candidates, one of them NaN, each with the error that it has alone; NaN and Inf in x count in none."""
    x = random(shape, 1)
    x.view(-1)[[5, 7]] = torch.tensor([torch.inf, torch.nan])
    channels = 1 if axis is None else shape[axis]
    scales, zeros = random((131, channels), 2).abs() * 0.3 + 0.01, random((131, channels), 3) * 4 + 7
    scales[64] = torch.nan
    arguments = (x, scales, zeros, torch.tensor([0, 15], dtype=torch.int32), axis)
    there = [a.to(device_of(backend)) if isinstance(a, torch.Tensor) else a for a in arguments]
    errors = torch.ops.fastqat.range_search(*there)
    assert_results(NAMES, (errors.cpu(),), oracle.range_search(*arguments), arguments, f"shape {shape} axis {axis}")


SHARED = [((40_000,), None, 4), ((9, 4_608), 0, 4), ((40, 30, 33), 1, 3), ((2_000, 7), 1, 2), ((70_003,), None, 5)]


def on_lattice(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiples of half a scale: levels and borders of a candidate."""
    return (x / scale * 4).round() * scale / 2


DATA = {
    "normal": lambda x, scale: x,
    "levels and borders": on_lattice,
    "levels": lambda x, scale: (x / scale * 2).round() * scale,
    "constant": lambda x, scale: torch.full_like(x, 0.3),
    "zeros": lambda x, scale: torch.zeros_like(x),
    "positive": lambda x, scale: x.abs(),
    "outlier": lambda x, scale: x.index_fill(-1, torch.tensor([1]), 3e4),
    "not finite": lambda x, scale: x.index_fill(-1, torch.tensor([0, 2]), torch.nan).index_fill(
        -1, torch.tensor([3]), -torch.inf
    ),
    "huge": lambda x, scale: x.index_fill(-1, torch.tensor([1]), 3e18),
}


def shared_candidates(channels: int, bits: int, affine: bool, spacing: str) -> tuple:
    """Scales of 60 candidates that differ from channel to channel by a factor, zero points, and the code range."""
    fractions = {
        "even": torch.arange(1, 61) / 60,
        "uneven": 0.3 + random((60,), 4).abs(),
        "many alike": torch.linspace(1, 1.00001, 60),
    }[spacing]
    scales = fractions[:, None] * (random((channels,), 5).abs() + 0.5) * 3 / 2**bits
    zeros = (torch.arange(60.0) % 2**bits)[:, None].expand(60, channels).contiguous() if affine else None
    qmin = 0 if affine else -(2 ** (bits - 1))
    return scales, zeros, torch.tensor([qmin, qmin + 2**bits - 1], dtype=torch.int32)


def check_shared(backend: str, x: torch.Tensor, candidates: tuple, axis: int | None) -> None:
    arguments = (x, *candidates, axis)
    there = [a.to(device_of(backend)) if isinstance(a, torch.Tensor) else a for a in arguments]
    errors = torch.ops.fastqat.range_search(*there)
    assert_results(NAMES, (errors.cpu(),), oracle.range_search(*arguments), arguments, f"{tuple(x.shape)} axis {axis}")


@pytest.mark.parametrize("backend", ("cpu", "cuda"), indirect=True)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("shape", "axis", "bits"), SHARED, ids=str)
def test_shared_candidates(backend: str, shape: tuple[int, ...], axis: int | None, bits: int, data: str) -> None:
    """Candidates of one factor to a channel: evenly spaced and not, symmetric and affine, on data of all kinds."""
    channels = 1 if axis is None else shape[axis]
    for number, spacing in enumerate(("even", "uneven", "many alike")):
        candidates = shared_candidates(channels, bits, number % 2 == 1, spacing)
        scale = candidates[0][40, 0]
        check_shared(backend, DATA[data](random(shape, 1), scale), candidates, axis)


@pytest.mark.parametrize("backend", ("cpu", "cuda"), indirect=True)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_candidates_that_one_channel_does_not_share(backend: str, dtype: torch.dtype) -> None:
    """A channel in the middle with other ratios, one with NaN, and one with a scale that no quotient is quick for."""
    scales, zeros, qrange = shared_candidates(12, 4, True, "even")
    scales[30:, 5] *= 1.01
    scales[7, 6], scales[:, 7], zeros[3, 8] = torch.nan, 1e-14, 9.0
    check_shared(backend, random((12, 4_000), 1).to(dtype), (scales, zeros, qrange), 0)


@pytest.mark.parametrize("bits", (1, 6, 8))
@pytest.mark.parametrize("backend", ("cpu", "cuda"), indirect=True)
def test_few_and_many_levels(backend: str, bits: int) -> None:
    """One border to a candidate, and hundreds."""
    scales, zeros, qrange = shared_candidates(1, bits, True, "uneven")
    check_shared(backend, random((600_000,), 1), (scales, zeros, qrange), None)


@pytest.mark.parametrize("backend", ("cpu", "cuda"), indirect=True)
def test_levels_all_but_hit(backend: str) -> None:
    """A candidate, the first, whose error is 1e-14 of the sum of squares: nothing of a difference would be left."""
    scales = 2.0**-3 * torch.cat([torch.ones(1), 0.3 + random((59,), 4).abs()])[:, None]
    x = (random((40_000,), 1) * 3).round().clamp(-8, 7) * 2.0**-3
    x += torch.where(x != 0, 2.0**-25, 0) * random((40_000,), 2)
    check_shared(backend, x, (scales, None, torch.tensor([-8, 7], dtype=torch.int32)), None)


@pytest.mark.parametrize("backend", ("cpu",), indirect=True)
def test_errors_to_the_last_digit(backend: str) -> None:
    """float64 throughout: at 4 bits the errors are those of float64, rounded."""
    x, (scales, _, qrange) = random((9, 4_608), 1), shared_candidates(9, 4, False, "even")
    errors = torch.ops.fastqat.range_search(x, scales, None, qrange, 0)
    wide, s = x.double(), scales.double()[:, :, None]
    level = (wide / s).round().clamp(-8, 7)
    assert torch.equal(errors, (level * s - wide).square().sum(2).float())


def test_bins_have_the_same_bits_for_any_number_of_threads() -> None:
    """A channel that is cut into pieces."""
    x, candidates = random((200_003,), 1), shared_candidates(1, 4, False, "even")
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(torch.ops.fastqat.range_search(x, *candidates, None))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
