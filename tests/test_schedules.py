"""Schedules: values from the equations, the device's against the definition, compilation, options and their errors."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastqat
from fastqat import schedules
from fastqat.schedules import Schedule

pytestmark = pytest.mark.usefixtures("one_thread")

CHANGING = {"cosine": schedules.cosine, "linear": schedules.linear, "step": schedules.step}
EXAMPLES = (
    schedules.cosine(0.1, 0.011, steps=1000),
    schedules.cosine(0.0, 0.1, steps=997, begin=0.1),
    schedules.cosine(0.1, 0.005, steps=800, begin=0.3, off_before=True),
    schedules.linear(-3.0, 1e-7, steps=333, begin=0.0),
    schedules.step(0.1, 0.2, steps=10, begin=0.55),
    schedules.constant(0.3),
)


def on_device(schedule: Schedule, step: int) -> float:
    """The value of the tensor form."""
    return schedule.tensor(torch.tensor([step])).item()


@pytest.mark.parametrize(
    ("start", "end", "values"),
    ((0.0, 0.1, (0.0, 0.025, 0.05, 0.075, 0.1)), (0.1, 0.011, (0.1, 0.07775, 0.0555, 0.03325, 0.011))),
)
def test_reference_values(start: float, end: float, values: tuple[float, ...]) -> None:
    """The two quarters before and after the middle of a cosine, at t / T = 1/4, 1/2, 5/8, 3/4 and 1."""
    schedule = schedules.cosine(start, end, steps=1000)
    for step, value in zip((250, 500, 625, 750, 1000), values, strict=True):
        assert schedule(step) == pytest.approx(value, abs=1e-15)
        assert on_device(schedule, step) == np.float32(value)


@pytest.mark.parametrize("kind", CHANGING)
def test_where_it_begins_and_ends(kind: str) -> None:
    """Start until begin * T, which need not be a step, and the end from T on, for good."""
    schedule = CHANGING[kind](2.0, 0.5, steps=10, begin=0.25)
    first = 0.5 if kind == "step" else 2 - 1.5 * {"linear": 0.5 / 7.5, "cosine": (1 - math.cos(math.pi / 15)) / 2}[kind]
    for step, value in ((0, 2.0), (1, 2.0), (2, 2.0), (3, first), (10, 0.5), (11, 0.5), (10**15, 0.5)):
        assert schedule(step) == pytest.approx(value, abs=1e-15)
        assert on_device(schedule, step) == np.float32(value)


def test_middle_of_a_line() -> None:
    """p = 1/2 at t = 625 of 1000; and from the first step where it begins at once."""
    assert schedules.linear(1.0, 3.0, steps=1000)(625) == 2.0
    at_once = schedules.linear(1.0, 3.0, steps=4, begin=0.0)
    assert [at_once(t) for t in range(6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 3.0]


def test_constant() -> None:
    """At once and always; as a threshold that is off before it begins."""
    assert [schedules.constant(0.3)(t) for t in (0, 1, 10**9)] == [0.3] * 3
    late = Schedule("constant", 0.3, steps=8, off_before=True)
    assert [late(t) for t in (0, 1, 2, 3, 8, 9)] == [0.0, 0.0, 0.3, 0.3, 0.3, 0.3]


@pytest.mark.parametrize("make", (schedules.cosine, schedules.linear))
def test_off_before_it_begins(make: Any) -> None:
    """A freezing threshold: 0 before begin * T, then from the start to the end."""
    off = make(0.1, 0.01, steps=1000, off_before=True)
    on = make(0.1, 0.01, steps=1000)
    for step in (0, 1, 249):
        assert off(step) == on_device(off, step) == 0.0
    for step in (250, 251, 700, 1000, 2000):
        assert off(step) == on(step) > 0 and on_device(off, step) == on_device(on, step)
    assert off(250) == pytest.approx(0.1, rel=1e-15)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_the_device_agrees(schedule: Schedule) -> None:
    """Every step within 1 unit in the last place of float32; the shape of the counts, which stay as they are."""
    steps = torch.arange(1100)
    values = schedule.tensor(steps)
    assert values.dtype == torch.float32 and torch.equal(steps, torch.arange(1100))
    expected = np.array([schedule(t) for t in range(1100)])
    assert (np.abs(values.numpy() - expected) <= np.spacing(np.abs(expected).astype(np.float32))).all()
    assert schedule.tensor(steps[:1]).shape == (1,) and schedule.tensor(steps.view(11, 100)).shape == (11, 100)


NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(st.sampled_from(sorted(CHANGING)), NUMBERS, NUMBERS, st.integers(1, 3000), st.floats(0, 0.99))
def test_monotone(kind: str, start: float, end: float, steps: int, begin: float) -> None:
    """From start to end without a step back, in both forms."""
    schedule = CHANGING[kind](start, end, steps=steps, begin=begin)
    values = np.array([schedule(t) for t in range(steps + 2)])
    direction = np.sign(end - start)
    assert (direction * np.diff(values) >= 0).all()
    assert (direction * np.diff(schedule.tensor(torch.arange(steps + 2)).numpy()) >= 0).all()
    assert values[0] == pytest.approx(end if kind == "step" and begin == 0 else start, rel=1e-12, abs=1e-9)
    assert values[-1] == values[-2] == end


@pytest.mark.parametrize("kind", CHANGING)
def test_equal_ends(kind: str) -> None:
    """One value, not one that trembles in its last place."""
    schedule = CHANGING[kind](0.1, 0.1, steps=1000)
    assert {schedule(t) for t in range(1001)} == {0.1}


def test_it_follows_the_steps_of_a_quantizer() -> None:
    """The count that optimizer steps advance is the time of a schedule."""
    quantizer, schedule = fastqat.FakeQuant(4), schedules.linear(0.0, 1.0, steps=4, begin=0.0)
    seen = []
    for _ in range(6):
        seen.append(schedule.tensor(quantizer.step).item())
        fastqat.step(quantizer)
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_compiled_once(schedule: Schedule) -> None:
    """One graph without a break for all steps, with the same values."""
    torch._dynamo.reset()
    graphs: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(lambda count: schedule.tensor(count) * 2, fullgraph=True, backend=backend)
    count = torch.zeros(1, dtype=torch.int64)
    for t in range(0, 1000, 111):
        count.fill_(t)
        assert torch.equal(run(count), schedule.tensor(count) * 2)
    assert len(graphs) == 1


def test_no_value_is_read_back() -> None:
    """All operations run where there are no values at all."""
    count = torch.zeros(1, dtype=torch.int64, device="meta")
    for schedule in EXAMPLES:
        assert schedule.tensor(count).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_cuda_graph(schedule: Schedule) -> None:
    """A replay computes the value of the step that it is at."""
    count = torch.zeros(1, dtype=torch.int64, device="cuda")
    schedule.tensor(count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = schedule.tensor(count)
        count.add_(1)
    for t in range(1005):
        graph.replay()
        assert value.item() == pytest.approx(schedule(t), rel=2**-23, abs=0)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=str)
def test_options_round_trip(schedule: Schedule) -> None:
    """Through JSON and back; equal options are one schedule, and a key of a dict."""
    again = Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))
    assert again == schedule and hash(again) == hash(schedule)
    assert len({s: 0 for s in (*EXAMPLES, again)}) == len(EXAMPLES)


def test_options_as_written() -> None:
    """Only what differs from the defaults is written; the length may come from the training."""
    assert schedules.cosine(1, 0, steps=9).to_dict() == {"kind": "cosine", "start": 1.0, "end": 0.0, "steps": 9}
    assert schedules.constant(0.3).to_dict() == {"kind": "constant", "start": 0.3}
    written = {"kind": "linear", "start": 1, "end": 0}
    assert Schedule.from_dict(written, steps=7) == schedules.linear(1.0, 0.0, steps=7)
    assert Schedule.from_dict({**written, "steps": 3}, steps=7).steps == 3
    assert Schedule.from_dict({"kind": "constant", "start": 0.3}, steps=7)(0) == 0.3


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    (
        ({"kind": "cosin", "start": 1.0}, ValueError, "kind: wanted one of 'cosine', 'linear', 'step', 'constant'"),
        ({"kind": "cosine", "start": 1.0, "steps": 4}, TypeError, "end: wanted a number; got None"),
        ({"kind": "cosine", "start": "1", "end": 0.0, "steps": 4}, TypeError, "start: wanted a number; got '1'"),
        ({"kind": "cosine", "start": True, "end": 0.0, "steps": 4}, TypeError, "start: wanted a number; got True"),
        ({"kind": "linear", "start": 1.0, "end": math.nan, "steps": 4}, ValueError, "end: wanted a finite number"),
        (
            {"kind": "linear", "start": 1.0, "end": 0.0},
            TypeError,
            "steps: wanted the number of all steps, an int; got N",
        ),
        ({"kind": "linear", "start": 1.0, "end": 0.0, "steps": 4.0}, TypeError, "steps: .*; got 4.0"),
        ({"kind": "linear", "start": 1.0, "end": 0.0, "steps": 0}, ValueError, "steps: wanted at least 1; got 0"),
        ({"kind": "step", "start": 1.0, "end": 0.0, "steps": 4, "begin": 1.0}, ValueError, "begin: .*; got 1.0"),
        ({"kind": "step", "start": 1.0, "end": 0.0, "steps": 4, "begin": -0.1}, ValueError, "begin: .*; got -0.1"),
        ({"kind": "step", "start": 1.0, "end": 0.0, "steps": 4, "off_before": 1}, TypeError, "off_before: .*; got 1"),
        ({"kind": "constant", "start": 1.0, "end": 2.0}, ValueError, "end: wanted none for a constant; got 2.0"),
        ({"kind": "constant", "start": 1.0, "off_before": True}, TypeError, "steps: .*; got None"),
        (
            {"kind": "constant", "start": 1.0, "begn": 0.1},
            ValueError,
            "schedule: wanted one of .*'begin'.*; got 'begn'",
        ),
        ({"kind": "constant"}, ValueError, "schedule: wanted the option 'start'; got kind"),
        ({}, ValueError, "schedule: wanted the option 'kind'; got none"),
        ("cosine", TypeError, "schedule: wanted options by name; got 'cosine'"),
    ),
    ids=str,
)
def test_wrong_options(options: Any, kind: type[Exception], message: str) -> None:
    """Each error names the option, what was wanted, and what came."""
    with pytest.raises(kind, match=message):
        Schedule.from_dict(options)


@pytest.mark.parametrize("step", (3, torch.tensor([1.0]), torch.tensor([1], dtype=torch.int32)), ids=str)
def test_wrong_counts(step: Tensor) -> None:
    """The device's form takes counts as quantizers keep them."""
    with pytest.raises(TypeError, match="step: wanted an int64 tensor; got "):
        schedules.constant(1.0).tensor(step)
