"""The toy regression of the oscillation paper: rates in closed form, what leaves them, and what ends them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastqat

pytestmark = pytest.mark.usefixtures("one_thread")


def load_example() -> Any:
    """The script as a module."""
    path = Path(__file__).resolve().parent.parent / "examples" / "toy_regression.py"
    spec = importlib.util.spec_from_file_location("toy_regression", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


toy = load_example()
DISTANCES = np.array([0.05, 0.1, 0.2, 0.3, 0.4])
STEPS = 2000  # one event more or less is .0005


def reversals(codes: list[float]) -> list[int]:
    """For each code but the first: 1 where it changes against the last change."""
    found, last = [], 0.0
    for before, now in zip(codes, codes[1:], strict=False):
        change = np.sign(now - before)
        found.append(int(change * last == -1))
        last = change or last
    return found


def rates(codes: Tensor) -> np.ndarray:
    """Reversals per iteration of each weight."""
    return np.array([np.mean(reversals(column)) for column in codes.T.tolist()])


def assert_amplitude(latent: Tensor, distances: np.ndarray, factor: float, scale: float = 1.0) -> None:
    """Between the extremes lie factor * (s - d) to factor * s, and a step is 2d/s * (s - d) * factor on average.

    The weight falls by the first from just above the threshold, and rises above that by less than factor * d.
    """
    half = latent[len(latent) // 2 :].double()
    extent = (half.amax(0) - half.amin(0)).numpy() / factor
    d = distances * scale
    assert (extent > 0.99 * (scale - d)).all() and (extent < 1.01 * scale).all()
    np.testing.assert_allclose(half.diff(dim=0).abs().mean(0) / factor, 2 * d / scale * (scale - d), rtol=0.02)


def run(distances: np.ndarray, steps: int = STEPS, lr: float = 0.01, **options: Any) -> Any:
    """Train towards these distances from code 0 on a grid of step 1."""
    return toy.train(torch.from_numpy(distances).float(), steps, options, lr=lr)


@pytest.fixture(scope="module")
def straight_through() -> Any:
    """History with the straight-through estimator."""
    return run(DISTANCES)[0]


def test_counting() -> None:
    """First changes do not count, nor do changes in the same direction, also with rests between."""
    codes = torch.tensor([[0.0], [1], [1], [2], [1], [1], [0], [1], [1]])
    assert reversals(codes[:, 0].tolist()) == [0, 0, 0, 1, 0, 0, 1, 0]
    noise = torch.randint(0, 4, (300, 3), generator=torch.Generator().manual_seed(0)).float()
    assert toy.oscillations(noise).T.int().tolist() == [reversals(column) for column in noise.T.tolist()]


def test_rate_is_twice_the_distance(straight_through: Any) -> None:
    """2d/s, and the code is the far one a part d/s of the time."""
    np.testing.assert_allclose(rates(straight_through.code), 2 * DISTANCES, atol=1e-3)
    np.testing.assert_allclose(straight_through.code.double().mean(0), DISTANCES, atol=2e-3)


def test_rate_is_independent_of_the_learning_rate(straight_through: Any) -> None:
    """The amplitude is proportional to it."""
    slow = run(DISTANCES, lr=0.001)[0]
    np.testing.assert_allclose(rates(slow.code), 2 * DISTANCES, atol=1e-3)
    assert_amplitude(slow.latent, DISTANCES, 0.001)
    assert_amplitude(straight_through.latent, DISTANCES, 0.01)


def test_any_grid_and_any_side() -> None:
    """d is the distance from the nearest grid point, in steps; E[x^2] is a factor on the amplitude."""
    parts = np.array([-5.95, -2.1, -0.4, 0.3, 0.9, 3.8, 5.6])
    target = torch.from_numpy(0.25 * parts).float()
    history, _ = toy.train(target, STEPS, {}, lr=0.005, scale=0.25, power=2.0)
    distances = np.abs(parts - np.rint(parts))
    np.testing.assert_allclose(rates(history.code), 2 * distances, atol=1e-3)
    np.testing.assert_allclose(history.code.double().mean(0), parts, atol=2e-3)
    assert_amplitude(history.latent, distances, 0.01, scale=0.25)


@pytest.mark.parametrize(
    ("estimator", "amplitude"),
    # 1 - .2 / 2; lambda / 2; the slopes at the threshold of the sigmoid of a = 1, and of alpha = .2
    (("ewgs", 0.9), ("psg", 0.5), ("sigmoid", 1.02075), ("dsq", 1.373265)),
)
def test_symmetric_estimators_leave_the_rate(estimator: str, amplitude: float) -> None:
    """They change the amplitude by their factor at the threshold, and nothing else."""
    history, _ = run(DISTANCES, estimator=estimator)
    np.testing.assert_allclose(rates(history.code), 2 * DISTANCES, atol=1.5e-3)
    assert_amplitude(history.latent, DISTANCES, 0.01 * amplitude)


@pytest.mark.parametrize(("weight", "rate"), ((0.05, 0.1111), (0.09, 0.0244)))
def test_weak_dampening_slows(weight: float, rate: float) -> None:
    """2 (d - lambda s) / (s - 2 lambda s) at d = .1."""
    history, _ = run(np.array([0.1]), lr=0.001, **toy.dampened(weight))
    np.testing.assert_allclose(rates(history.code), [rate], atol=1e-3)
    assert toy.closed_form(0.1, weight) == pytest.approx(rate, abs=1e-4)


@pytest.mark.parametrize(("weight", "rest"), ((0.11, 0.4545), (0.2, 0.25), (0.5, 0.1)))
def test_strong_dampening_stops(weight: float, rest: float) -> None:
    """With lambda s > d E[x^2] the weight rests at k s + d E[x^2] / (2 lambda)."""
    history, _ = run(np.array([0.1]), steps=500, lr=0.1, **toy.dampened(weight))
    assert abs(history.latent[-1].item() - rest) < 1e-4
    assert not history.code.any() and toy.closed_form(0.1, weight) == 0


def test_strong_dampening_on_another_grid() -> None:
    """The same with s = .5, E[x^2] = 2 around code -3: lambda s > d E[x^2] where 1.2 * .5 > .2."""
    target = torch.tensor([-1.4])
    history, _ = toy.train(target, 300, toy.dampened(1.2), lr=0.05, scale=0.5, power=2.0)
    np.testing.assert_allclose(history.latent[-1], [-1.5 + 0.1 * 2 / 2.4], atol=1e-5)
    assert (history.code == -3).all()


def test_freezing_ends_it_on_the_nearest_code() -> None:
    """All that oscillate rest on the grid point next to their target; nothing moves them any more."""
    parts = np.concatenate([k + DISTANCES * sign for k, sign in ((0, 1), (3, -1), (-5, 1), (-2, -1), (6, 1))])
    history, quantize = run(parts, **toy.freezing(STEPS // 2))
    tracker = quantize.tracker
    assert tracker is not None and tracker.frozen().all()
    assert tracker.codes().tolist() == np.rint(parts).tolist() == tracker.average().tolist()
    assert torch.equal(history.code[-1], torch.from_numpy(np.rint(parts)).float())
    last = history.latent[-STEPS // 4 :]
    assert (history.code[-STEPS // 4 :] == history.code[-1]).all() and (last == last[0]).all()
    counts = [int((history.code.diff(dim=0) != 0).sum()), sum(map(sum, map(reversals, history.code.T.tolist()))), 25]
    assert tracker.counts[:3].tolist() == counts


def test_freezing_on_the_current_code_may_be_wrong() -> None:
    """What the average is for: at the end of an excursion the current code is the far one."""
    schedule = fastqat.schedules.cosine(1.0, 0.05, steps=STEPS // 2)
    options = {"oscillation": fastqat.Oscillation(0.01, schedule, use_average=False)}
    history, quantize = run(DISTANCES, **options)
    assert quantize.tracker is not None and quantize.tracker.frozen().all()
    assert history.code[-1].any()


def test_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints a row per method, and draws."""
    picture = tmp_path / "toy.png"
    monkeypatch.setattr(sys, "argv", ["toy_regression.py", "--steps", "60", "--picture", str(picture)])
    toy.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:16].strip(): line for line in lines}
    assert {"STE, lr 0.01", "EWGS", "PSG", "dampening 0.05", "freezing"} <= set(rows)
    assert rows["STE, lr 0.01"].endswith("(0.800)") and rows["dampening 0.25"].count("(0.000)") == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
