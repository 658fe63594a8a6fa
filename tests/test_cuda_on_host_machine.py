"""The machine on which CUDA kernels run without a GPU: right kernels give one result in every order, wrong ones do not.

The kernels are those of cuda_on_host/probes.cu.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from cuda_on_host import build
from cuda_on_host.machine import ORDERS, Machine, Schedule
from torch import Tensor

THREADS = 256
of_orders = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def probes() -> Machine:
    """The library of the probes."""
    if reason := build.why_not():
        pytest.skip(reason)
    return Machine(build.probes())


def call(probes: Machine, name: str, *arguments: Tensor | int) -> str | None:
    """Run a probe; the message of its error, if there is one."""
    function = getattr(probes.library, f"probe_{name}")
    function.restype = ctypes.c_char_p
    message = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments))
    return message and message.decode()


def turned(probes: Machine, left_out: int, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """What a turn by three places gives, and what it should."""
    x, y = torch.arange(THREADS) + 1.0, torch.zeros(THREADS)
    probes.set(schedule)
    assert call(probes, "turn", x, y, 3, left_out) is None
    return y, x.roll(-3)


@of_orders
def test_barriers_hold_all_threads_back(probes: Machine, order: str) -> None:
    for seed in range(5):
        got, want = turned(probes, 0, Schedule(order, seed))
        assert got.equal(want)


@pytest.mark.parametrize("left_out", (1, 2))
@of_orders
def test_a_dropped_barrier_is_seen(probes: Machine, order: str, left_out: int) -> None:
    got, want = turned(probes, left_out, Schedule(order))
    assert not got.equal(want)


def test_random_orders_differ_by_their_seed_alone(probes: Machine) -> None:
    runs = [turned(probes, 2, Schedule("random", seed))[0] for seed in (1, 2, 1)]
    assert runs[0].equal(runs[2]) and not runs[0].equal(runs[1])


def sum_by_the_last(probes: Machine, blocks: int, barrier: bool, schedule: Schedule) -> tuple[int, int]:
    """The sum of 10 blocks' numbers by the block that comes last, and what it should be."""
    x, y = torch.arange(10 * THREADS - 3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    parts, arrived = torch.zeros(10, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    probes.set(schedule)
    assert call(probes, "sum", x, parts, arrived, y, x.numel(), blocks, int(barrier)) is None
    return y.item(), int(x.sum())


@pytest.mark.parametrize("blocks", (1, 3, 10, 17))
@of_orders
def test_the_last_block_finishes(probes: Machine, order: str, blocks: int) -> None:
    for seed, most in enumerate((2**31 - 1, 2, 1)):
        got, want = sum_by_the_last(probes, blocks, True, Schedule(order, seed, most))
        assert got == want


def test_a_ticket_drawn_before_the_block_is_done_is_seen(probes: Machine) -> None:
    """By blocks that take turns: one that ends before the next begins has done all it has to."""
    runs = [sum_by_the_last(probes, 10, False, Schedule("random", seed)) for seed in range(20)]
    assert any(got != want for got, want in runs)


# Lanes that are read by lanes 0 to 31, as CUDA's programming guide defines the functions.
SHUFFLES = {
    ("lane 5", 0, 5, 32): [5] * 32,
    ("lane 5 of each 8", 0, 5, 8): [lane // 8 * 8 + 5 for lane in range(32)],
    ("lane 13 of each 8", 0, 13, 8): [lane // 8 * 8 + 5 for lane in range(32)],
    ("down by 1", 1, 1, 32): [*range(1, 32), 31],
    ("down by 2 of 4", 1, 2, 4): [2, 3, 2, 3, 6, 7, 6, 7, 10, 11, 10, 11, 14, 15, 14, 15]
    + [18, 19, 18, 19, 22, 23, 22, 23, 26, 27, 26, 27, 30, 31, 30, 31],
    ("down by 16", 1, 16, 32): [*range(16, 32), *range(16, 32)],
    ("xor 1", 2, 1, 32): [lane + 1 - lane % 2 * 2 for lane in range(32)],
    ("xor 3 of 4", 2, 3, 4): [lane // 4 * 4 + 3 - lane % 4 for lane in range(32)],
    ("xor 4 of 4: only earlier groups", 2, 4, 4): [lane - 4 if lane // 4 % 2 else lane for lane in range(32)],
}


@pytest.mark.parametrize("shuffle", SHUFFLES, ids=lambda key: key[0])
def test_shuffles(probes: Machine, shuffle: tuple[str, int, int, int]) -> None:
    for order in ORDERS:
        probes.set(Schedule(order))
        y = torch.zeros(32)
        assert call(probes, "shuffle", y, *shuffle[1:]) is None
        assert (y - 100).tolist() == SHUFFLES[shuffle]


@of_orders
def test_exchanges_of_64_bits_ballots_and_half_warps(probes: Machine, order: str) -> None:
    y = torch.zeros(32, dtype=torch.int64)
    probes.set(Schedule(order))
    assert call(probes, "exchanges", y) is None
    want = [2**40 + lane + 1 - lane % 2 * 2 + (15 - lane if lane < 16 else 0) for lane in range(32)]
    want[0] += 0xAAAAAAAA
    assert y.tolist() == want


MISTAKES = {
    0: r"wait for each other in vain: .*thread 0 waits at __syncthreads of probes.cu:[\d:]+, thread 20 has ended",
    1: r"thread 7 has ended, thread 8 waits at __syncthreads",
    2: r"thread 0 waits at __syncthreads of probes.cu:([\d:]+), thread 1 waits at __syncthreads of probes.cu:(?!\1)",
    3: r"thread 0 waits at __shfl_down_sync of probes.cu:[\d:]+, thread 9 has ended, thread 10 waits",
    4: r"__shfl_sync: the mask does not name the thread",
    5: r"__shfl_xor_sync: width 24",
    6: r"an index beyond its array at .*probes.cu",
    7: r"the block has written outside of its shared memory",
    8: r"a null or misaligned pointer at .*probes.cu",
    9: r"a shift by too much",
    10: r"bytes of shared memory",
    12: r"thread 0 waits at __shfl_sync of .*, thread 16 waits at __shfl_sync",
    13: r"__syncwarp: the mask is empty",
    14: r"thread 31: an access to memory that is nobody's",
}


@pytest.mark.parametrize("number", MISTAKES)
@of_orders
def test_mistakes_are_errors(probes: Machine, order: str, number: int) -> None:
    """Each names the kernel and what is wrong, and leaves the machine as it was."""
    probes.set(Schedule(order))
    message = call(probes, "mistake", torch.zeros(48)[1:], number)
    assert message is not None and message.startswith("fastqat: mistake: ")
    assert re.search(MISTAKES[number], message), message
    assert call(probes, "mistake", torch.zeros(48), 99) is None


def test_what_nobody_wrote_is_nan(probes: Machine) -> None:
    """So are shared memory before it is written, and a lane that a mask does not name."""
    y = torch.zeros(32)
    for order in ORDERS:
        probes.set(Schedule(order))
        assert call(probes, "mistake", y, 11) is None
        assert y.isnan().all()
        y.zero_()


@pytest.mark.parametrize(("blocks", "threads"), ((0, 32), (1, 0), (1, 1025), (2**31, 32)))
def test_launches_that_cuda_refuses(probes: Machine, blocks: int, threads: int) -> None:
    before = probes.launches()
    message = call(probes, "launch", ctypes.c_int64(blocks), threads)
    assert message == f"fastqat: nothing: launched with {blocks} blocks of {threads} threads"
    assert probes.launches() == before
