"""Frozen codes: the even one at ties, on every backend; never in a float; loaded from files of either form."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import GridCase, device_of
from many_tensors import Weight, quantize
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, Oscillation
from fastqat.nn.tracking import SEAL

pytestmark = pytest.mark.usefixtures("one_thread")
on_all = pytest.mark.parametrize("backend", ("reference", "cpu", "cuda-on-host", "triton", "cuda"), indirect=True)
NAN = float("nan")


def weight_of(
    qmin: int, qmax: int, size: int, momentum: float, backend: str, zero_point: float | None = None
) -> Weight:
    """A tracked weight on a grid of scale 1."""
    zero = None if zero_point is None else torch.tensor([zero_point])
    qrange = torch.tensor([qmin, qmax], dtype=torch.int32)
    case = GridCase("codes", torch.zeros(size), torch.ones(1), zero, None, qrange, None, 0.0)
    return Weight(case, momentum).twin(device_of(backend))


def walk(weight: Weight, rows: list[list[float]], threshold: float = 0.3, first: int = 0) -> list[float]:
    """The outputs of the last of the steps, whose x are the rows."""
    for t, row in enumerate(rows):
        weight.case.x.copy_(torch.tensor(row))
        (y,) = quantize(torch.ops.fastqat.multi_tensor_fake_quantize, [weight], first + t, [threshold])
    return y.tolist()


# lowest and highest code, zero point, pairs of codes, and the even one of each
TIES = (
    (-4, 3, None, ((-4, -3), (-3, -2), (-1, 0), (0, 1), (1, 2), (2, 3)), (-4, -2, 0, 0, 2, 2)),
    (-3, 3, None, ((-3, -2), (-2, -1), (-1, 0), (0, 1), (1, 2), (2, 3)), (-2, -2, 0, 0, 2, 2)),
    (-127, 127, None, ((-127, -126), (-101, -100), (100, 101), (101, 102)), (-126, -100, 100, 102)),
    (-128, 127, None, ((-128, -127), (-101, -100), (100, 101), (126, 127)), (-128, -100, 100, 126)),
    (0, 7, 3.0, ((0, 1), (1, 2), (4, 5), (5, 6)), (0, 2, 4, 6)),
    (-7, 7, 2.0, ((-7, -6), (-2, -1), (3, 4), (6, 7)), (-6, -2, 4, 6)),
)


@on_all
@pytest.mark.parametrize(
    ("qmin", "qmax", "zero", "pairs", "frozen"), TIES, ids=lambda v: str(v) if type(v) is int else ""
)
def test_the_even_code_at_a_tie(backend: str, qmin: int, qmax: int, zero, pairs, frozen) -> None:
    """With m = 1/2, a to b and back freezes at (a + b) / 2; it is the code that is even then, whatever qmin is."""
    weight = weight_of(qmin, qmax, len(pairs), 0.5, backend, zero)
    low, high = ([pair[k] - (zero or 0.0) for pair in pairs] for k in (0, 1))
    assert walk(weight, [low, high, low, low]) == [code - (zero or 0.0) for code in frozen]


@on_all
def test_the_low_bits_of_an_average(backend: str) -> None:
    """201.49999997 is nearest to 201, and 201.50000003 to 202, which no float32 tells from 201.5."""
    for momentum, wanted in ((0.49999997, 201.0), (0.50000003, 202.0)):
        assert walk(weight_of(0, 255, 1, momentum, backend), [[201], [202], [201], [201]]) == [wanted]
    for momentum, wanted in ((0.49999997, 200.0), (0.50000003, 201.0)):
        assert walk(weight_of(0, 255, 1, momentum, backend), [[200], [201], [200], [200]]) == [wanted]


@on_all
def test_where_the_frozen_code_is(backend: str) -> None:
    """In the word from the freeze on; the float has the own index then. A NaN leaves the weight as it is."""
    weight = weight_of(-4, 3, 3, 0.5, backend)
    assert walk(weight, [[-4, 0, 3], [2, 3, 0], [-4, 0, 3]]) == [-4, 0, 3]  # frozen at -1, 1.5 and 1.5, but not yet
    words, _, average, counts, _ = weight.state
    assert [int(word) & 31 for word in words] == [3, 6, 6]  # codes -1, 2 and 2
    assert [int(word) >> 5 for word in words] == [6, 6, 5]  # frozen, and the last direction: down, down, up
    assert average.tolist() == [0, 4, 7] and counts.tolist() == [6, 3, 3, 3, SEAL]
    after = walk(weight, [[-4, NAN, 3]], first=3)
    assert after[0] == -1 and after[1] != after[1] and after[2] == 2
    assert [int(word) for word in words] == [0b100_00011, 0b110_00110, 0b100_00110]
    assert counts.tolist() == [8, 5, 3, 2, SEAL]
    assert walk(weight, [[-4, -4, 3]], first=4) == [-1, 2, 2]
    assert counts.tolist() == [9, 6, 3, 1, SEAL]


def state(words: list[int], dtype: torch.dtype, averages: list[float], counts: list[int]) -> dict[str, Tensor]:
    """A tracked quantizer as a file has it, after five steps."""
    twice, once, often = 1.8271604776382446, 0.790123462677002, 1.3827160596847534
    return {
        "scale": torch.ones(1),
        "step": torch.tensor([5]),
        "qrange": torch.tensor([-4, 3] if dtype == torch.uint8 else [-128, 127], dtype=torch.int32),
        "eps": torch.tensor([1e-8], dtype=torch.float64),
        "tracker.words": torch.tensor(words, dtype=dtype),
        "tracker.scaled_frequency": torch.tensor([twice, twice, once, twice, twice, twice, once, often]),
        "tracker.scaled_average": torch.tensor(averages),
        "tracker.counts": torch.tensor(counts),
        "tracker.clock": torch.tensor([3.1604938271604937, 4.0, 0.5], dtype=torch.float64),
    }


FREE = (0.5925925970077515, -1.7407407760620117, 1.9259259700775146)
OLD = {  # written when a pending weight had its frozen index in the place of its average
    3: state(
        [196, 166, 67, 193, 194, 167, 70, 69], torch.uint8, [5, 5, FREE[0], 2, 5, 4, FREE[1], FREE[2]], [29, 19, 5, 8]
    ),
    8: state(
        [1664, 1410, 639, 1661, 1662, 1411, 642, 641],
        torch.int16,
        [129, 129, FREE[0], 126, 129, 128, FREE[1], FREE[2]],
        [29, 19, 5, 8],
    ),
}


def tracked(bits: int = 3) -> FakeQuant:
    options = Oscillation(0.25, 0.5, max_bits=8)
    return FakeQuant(bits, range="fixed", scale=torch.ones(1), learn="scale", oscillation=options)


@pytest.mark.parametrize("bits", OLD)
def test_older_files(bits: int) -> None:
    """Four counts: the same codes, averages and directions as when they were written, and the same next step."""
    q = tracked(bits)
    q.load_state_dict(copy.deepcopy(OLD[bits]))
    tracker = q.tracker
    assert tracker.codes().tolist() == [1, 1, -1, -2, 1, 0, 2, 1]
    assert tracker.average().tolist() == [1.0, 1.0, -0.8125, -2.0, 1.0, 0.0, 1.44921875, 1.609375]
    assert tracker.direction().tolist() == [-1, 1, -1, -1, -1, 1, -1, -1]
    assert tracker.frozen().tolist() == [True, True, False, True, True, True, False, False]
    assert tracker.counts.tolist() == [29, 19, 5, 8, SEAL]
    y = q(nn.Parameter(torch.tensor([3.0, -1, 0, 0, 3, -4, 3, 3])))
    assert y.tolist() == [1, 1, 0, -2, 1, 0, 3, 3]
    assert tracker.codes().tolist() == [1, 1, 0, -2, 1, 0, 3, 2]
    assert tracker.counts.tolist() == [37, 27, 6, 8, SEAL]
    wanted = [0.68359375, 0.68359375, 0.4375, 0.68359375, 0.68359375, 0.68359375, 0.4375, 0.578125]
    assert tracker.frequency().tolist() == wanted
    assert tracker.average().tolist() == [1.0, 1.0, -0.609375, -2.0, 1.0, 0.0, 1.8369140625, 2.0]


def test_a_file_of_today() -> None:
    """It holds what the file of old becomes, and loads as it is."""
    first, second = tracked(), tracked()
    first.load_state_dict(copy.deepcopy(OLD[3]))
    kept = copy.deepcopy(first.state_dict())
    assert kept["tracker.scaled_average"].tolist() == pytest.approx([4, 6, FREE[0], 1, 2, 7, FREE[1], FREE[2]])
    second.load_state_dict(kept)
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]), name


def test_integers_that_were_averaged_are_refused() -> None:
    """Their sum is still in integers, but not their seal; whatever the decay, in floats and in integers."""
    q = tracked()
    q.load_state_dict(copy.deepcopy(OLD[3]))
    for decay in (0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0):
        made = {"tracker.counts": (decay * q.tracker.counts + (1 - decay) * q.tracker.counts).to(torch.int64)}
        made["half"] = (q.tracker.counts + q.tracker.counts) // 2
        for counts in made.values():
            state = copy.deepcopy(q.state_dict()) | {"tracker.counts": counts}
            with pytest.raises(RuntimeError, match=r"tracker 'tracker', counts: wanted \d+ .*integers were averaged"):
                tracked().load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "dtype"),
    (
        ("scaled_frequency", torch.float16),
        ("scaled_average", torch.bfloat16),
        ("clock", torch.float32),
        ("clock", torch.float16),
        ("counts", torch.float32),
        ("words", torch.float32),
    ),
    ids=str,
)
def test_other_dtypes_are_refused(name: str, dtype: torch.dtype) -> None:
    """A clock in half precision overflows at (1 - m)^-t = 65504; what was counted is no float."""
    q = tracked()
    q.load_state_dict(copy.deepcopy(OLD[3]))
    state = copy.deepcopy(q.state_dict())
    state[f"tracker.{name}"] = state[f"tracker.{name}"].to(dtype)
    with pytest.raises(RuntimeError, match=rf"tracker 'tracker', {name}: wanted torch\..*; got {dtype}"):
        tracked().load_state_dict(state)


def test_the_seal_stays() -> None:
    """Through a new beginning, a copy and a change of the bit-width; a state in double loads."""
    q = tracked()
    q.load_state_dict(copy.deepcopy(OLD[3]))
    q.tracker.reset(3)
    assert q.tracker.counts.tolist() == [0, 0, 0, 0, SEAL]
    q.tracker.reset(8)
    assert q.tracker.counts.tolist() == copy.deepcopy(q).double().tracker.counts.tolist() == [0, 0, 0, 0, SEAL]
    state = {name: t.double() if t.is_floating_point() else t for name, t in OLD[3].items()}
    other = tracked()
    other.load_state_dict(state)
    assert other.tracker.scaled_average.dtype == torch.float32
    assert other.tracker.codes().tolist() == [1, 1, -1, -2, 1, 0, 2, 1]
    assert fastqat.nn.tracking.SEAL % 2 == 1 and fastqat.nn.tracking.SEAL > 2**53
