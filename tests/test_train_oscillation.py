"""Runs that track, freeze, dampen, or estimate gradients otherwise: what the options mean, and what comes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_runs import TIMES
from test_distributed import free_port, in_two_processes, state_of_both, train_all
from torch import Tensor

import fastqat
from fastqat import cli
from fastqat.train.config import Config
from fastqat.train.extras import import_extra
from fastqat.train.optimization import Updates
from fastqat.train.quantization import quantizers
from fastqat.train.run import evaluate
from fastqat.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")
TINY = Config(model="resume_networks:Dropped", limit_train=96, batch_size=32, fp32_epochs=1, epochs=4, momentum=0.5)
TINY = replace(TINY, calibration_batches=1, device="cpu", threads=1, range="minmax", first_last_bits=0, lr=0.3)
FROZEN = {"track_oscillations": True, "oscillation_momentum": 0.05, "freeze_threshold": 0.1}


def rows(folder: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def run(folder: str, config: Config = TINY, **options: Any) -> Trainer:
    trainer = Trainer(replace(config, out=Path(folder), **options))
    trainer.run()
    return trainer


def weight_quantizers(model: torch.nn.Module) -> dict[str, Any]:
    return {k.removesuffix("_fake_quant"): q for k, q in model.named_modules() if k.endswith("weight_fake_quant")}


def test_options_reach_the_quantizers() -> None:
    """At the parts of the training and with the values of the released code, by hand."""
    options = {"freeze_threshold": 0.011, "freeze_threshold_start": 0.1, "oscillation_momentum": 0.001}
    config = Config(track_oscillations=True, dampening=0.1, dampening_aggregate="sum", **options)
    weight = quantizers(config, 800).weight
    assert weight is not None and weight.oscillation is not None and weight.dampening is not None
    threshold, pull = weight.oscillation.freeze_threshold, weight.dampening.weight
    assert isinstance(threshold, fastqat.Schedule) and isinstance(pull, fastqat.Schedule)
    steps = (0, 199, 200, 400, 500, 600, 800)
    assert [threshold(t) for t in steps] == pytest.approx([0, 0, 0.1, 0.07775, 0.0555, 0.03325, 0.011])
    assert [pull(t) for t in steps] == pytest.approx([0, 0, 0, 0.025, 0.05, 0.075, 0.1])
    assert (weight.oscillation.momentum, weight.oscillation.use_average, weight.dampening.aggregate) == (
        0.001,
        True,
        "sum",
    )
    later = quantizers(replace(config, freeze_begin=0.5, dampening_begin=0.75, freeze_to="current"), 800).weight
    assert later.oscillation.freeze_threshold(399) == 0 != later.oscillation.freeze_threshold(400)
    assert later.dampening.weight(600) == 0 != later.dampening.weight(601) and not later.oscillation.use_average
    constant = quantizers(replace(config, freeze_threshold_start=None), 800).weight
    assert constant.oscillation.freeze_threshold == 0.011
    assert quantizers(Config(track_oscillations=True), 800).weight.oscillation.freeze_threshold is None
    assert quantizers(Config(), 800).weight.oscillation is None is quantizers(Config(), 800).weight.dampening
    both = quantizers(Config(estimator="ewgs", estimator_strength=0.3, activation_estimator="pact"), 1)
    assert (both.weight.estimator, both.weight.estimator_strength) == ("ewgs", 0.3)
    assert (both.activation.estimator, both.activation.ste_mask) == ("pact", "unrounded")


def test_the_bits_of_the_weights_are_tracked_whatever_they_are() -> None:
    assert quantizers(Config(track_oscillations=True, bits_weight=8), 1).weight.oscillation.max_bits == 8
    assert quantizers(Config(track_oscillations=True, bits_weight=3), 1).weight.oscillation.max_bits == 4


MISTAKES = {
    "untracked": ("--freeze-threshold 0.1", "wanted track_oscillations beside it: what oscillates is frozen; got"),
    "no end": (
        "--track-oscillations --freeze-threshold-start 0.1",
        "got freeze_threshold_start 0.1, freeze_threshold 0",
    ),
    "momentum": (
        "--track-oscillations --oscillation-momentum 0",
        "oscillation_momentum: wanted a number between 0 and 1",
    ),
    "begin": ("--dampening 0.1 --dampening-begin 1", "dampening_begin: wanted a part of QAT below 1; got 1"),
    "stochastic": (
        "--track-oscillations --freeze-threshold 0.1 --estimator stochastic",
        "got estimator='stochastic' with freeze_threshold=0.1",
    ),
    "large": ("--track-oscillations --freeze-threshold 2", "freeze_threshold: wanted values from 0 to 1; got 2.0"),
    "strength": ("--estimator-strength 0.1", "estimator_strength: wanted none for estimator='ste'; got 0.1"),
    "dsq": ("--estimator dsq --estimator-strength 1", "wanted a number in (0, 1) for estimator='dsq'; got 1.0"),
    "nothing": ("--activation-estimator pact --bits-activation 0", "wanted bits_activation beside it; got"),
    "unknown": ("--estimator egws", "wanted one of ste, ewgs, sigmoid, dsq, psg, pact, stochastic; got 'egws'"),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(argv: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["train", *argv.split(), "--out", "run"])
    except SystemExit as stop:  # argparse
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error.splitlines()[-1] and "Traceback" not in error
    assert list(Path().iterdir()) == []


@pytest.mark.filterwarnings("default::UserWarning")
def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A threshold that one oscillation passes is a warning with both numbers, and the run goes on."""
    options = "--limit-train 32 --fp32-epochs 1 --epochs 1 --model resume_networks:Dropped --device cpu --range minmax"
    options += " --track-oscillations --freeze-threshold 0.015 --oscillation-momentum 0.01 --out run"
    assert cli.main(["train", *options.split()]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastqat: warning: freeze_threshold 0.015 is below 2 x momentum = 0.02")


def test_rows_have_the_shares(capsys: pytest.CaptureFixture[str]) -> None:
    """Counted by hand from the trackers; what is frozen has the code of its tracker in the weights that are saved."""
    trainer = run("run", **FROZEN)
    trackers = [q.tracker for q in weight_quantizers(trainer.model).values()]
    frozen = torch.cat([tracker.frozen().flatten() for tracker in trackers])
    frequency = torch.cat([tracker.frequency().flatten() for tracker in trackers])
    last = rows("run")[-1]
    assert last["frozen"] == frozen.sum().item() / len(frozen) > 0
    assert last["oscillating"] == ((frequency > 0.005) & ~frozen).sum().item() / len(frozen) > 0
    shares = [row["frozen"] for row in rows("run") if row["phase"] == "QAT"]
    assert shares == sorted(shares) and "frozen" not in rows("run")[1]
    output = capsys.readouterr().out
    assert f"oscillating {last['oscillating']:.2%}  frozen {last['frozen']:.2%}" in output
    heading = next(line for line in output.splitlines() if "top-1" in line)
    assert "oscillating" in heading and "frozen" in heading
    assert all(tracker.clock[1] == 4 * 3 - 1 for tracker in trackers), "the last forward saw the steps before it"


def test_tracking_changes_no_number() -> None:
    """Nor does what is recorded of it; without it, rows are as they ever were."""
    run("plain")
    run("tracked", track_oscillations=True)
    assert [{k: v for k, v in row.items() if k not in ("oscillating", "frozen")} for row in rows("tracked")] == rows(
        "plain"
    )
    assert not Path("plain/oscillations").exists() and Path("tracked/oscillations/epochs.jsonl").exists()


def test_weights_are_quantized_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one call, to the bits of one call each; in data-parallel training in buckets (see below)."""
    asked: list[Any] = []
    original = fastqat.quantize_weights_together

    def watched(model: torch.nn.Module, *buckets: Any) -> Any:
        asked.append(buckets)
        return original(model, *buckets)

    monkeypatch.setattr(fastqat, "quantize_weights_together", watched)
    together = run("together", **FROZEN, dampening=0.1, accumulate=2)
    assert asked == [(None,)]
    monkeypatch.setattr(fastqat, "quantize_weights_together", lambda *_: None)
    alone = run("alone", **FROZEN, dampening=0.1, accumulate=2)
    assert rows("together") == rows("alone")
    states = [trainer.model.state_dict() for trainer in (together, alone)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def latent_before_the_last_step(monkeypatch: pytest.MonkeyPatch, config: Config, **options: Any) -> Any:
    """A run's quantized weights before its last step, with their grids; and the weights after it."""
    seen: list[dict[str, Any]] = []
    original = Updates.step

    def watched(self: Updates, step: int) -> None:
        grids = {name: (q.scale.detach().clone(), *q.codes) for name, q in weight_quantizers(trainer.model).items()}
        seen.append({name: (trainer.model.get_parameter(name).detach().clone(), *grid) for name, grid in grids.items()})
        original(self, step)

    trainer = Trainer(replace(config, **options))
    with monkeypatch.context() as patch:
        patch.setattr(Updates, "step", watched)
        trainer.run()
    return seen[-1], {name: trainer.model.get_parameter(name).detach().clone() for name in seen[-1]}


PLAIN_STEPS = {"schedule": "constant", "weight_decay": 0.0, "momentum": 0.0, "epochs": 2, "limit_train": 32, "lr": 0.1}
PLAIN_STEPS |= {"quantizer_lr": 0.0, "model": "resume_networks:without_batch_norm"}


@pytest.mark.parametrize("pieces", [1, 3])
def test_dampening_is_that_of_a_step(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step more with dampening: minus lr * lambda * 2 (w - q(w)) * C_out / numel within the grid, in any pieces.

    Two steps, along a cosine from the first one on: lambda is 0, and then half of what it ends at.
    """
    options = {**PLAIN_STEPS, "accumulate": pieces, "dampening_begin": 0.0}
    before, plain = latent_before_the_last_step(monkeypatch, TINY, out=Path("plain"), **options)
    _, dampened = latent_before_the_last_step(monkeypatch, TINY, out=Path("dampened"), dampening=80.0, **options)
    for name, (w, scale, qmin, qmax) in before.items():
        s = scale.double().view(-1, *[1] * (w.dim() - 1))
        r = w.double() / s
        inside = (r >= qmin) & (r <= qmax)
        pull = 2 * (w.double() - s * r.round().clamp(qmin, qmax)) * inside * w.shape[0] / w.numel()
        wanted = -0.1 * 40.0 * pull
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close((dampened[name] - plain[name]).double(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pieces", [1, 3])
def test_bin_regularization_is_that_of_a_step(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its beginning on: minus lr * lambda * 2 / n_i * (w - q(w)) with the n_i weights of the bin."""
    options = {**PLAIN_STEPS, "accumulate": pieces, "bin_regularization_begin": 0.5}
    before, plain = latent_before_the_last_step(monkeypatch, TINY, out=Path("plain"), **options)
    regularized = latent_before_the_last_step(monkeypatch, TINY, out=Path("new"), bin_regularization=3.0, **options)
    assert all(torch.equal(regularized[0][name][0], before[name][0]) for name in before), "it has not begun"
    for name, (w, scale, qmin, qmax) in before.items():
        s = scale.double().view(-1, *[1] * (w.dim() - 1))
        codes = (w.double() / s).round().clamp(qmin, qmax)
        counts = torch.zeros_like(codes)
        for code in codes.unique():
            counts[codes == code] = (codes == code).sum().double()
        wanted = -0.1 * 3.0 * 2 * (w.double() - s * codes) / counts
        torch.testing.assert_close((regularized[1][name] - plain[name]).double(), wanted, rtol=1e-4, atol=1e-6)


def test_average_has_what_is_frozen() -> None:
    """The codes of frozen weights in the average are those of the network, and its own state is not averaged."""
    trainer = Trainer(replace(TINY, out=Path("run"), **FROZEN))
    trainer.train_fp32()
    trainer.quantize()
    average = fastqat.AveragedModel(trainer.model, 0.5)  # before anything is frozen
    trainer.train_quantized()
    average.updates = 100
    average.update_parameters(trainer.model)
    own = {name: buffer for name, buffer in trainer.model.named_buffers() if ".tracker." in name}
    assert own and all(torch.equal(average.module.get_buffer(name), own[name]) for name in own)
    quantized: dict[str, tuple[Tensor, Tensor]] = {}
    for model in (trainer.model.eval(), average.module.eval()):
        for name, quantizer in weight_quantizers(model).items():
            frozen, codes = quantizer.tracker.frozen(), quantizer.tracker.codes()
            y = quantizer(model.get_parameter(name)).detach()
            found = (y / quantizer.scale.detach().view(-1, *[1] * (y.dim() - 1))).round().int()
            assert torch.equal(found[frozen], codes[frozen])
            quantized.setdefault(name, (frozen, codes))
    assert sum(frozen.sum().item() for frozen, _ in quantized.values()) > 0


def test_saved_weights_bring_their_frozen_codes() -> None:
    options = {**FROZEN, "reestimate_bn": "never"}  # what is saved has the statistics of training
    trainer = run("run", **options)
    other = Trainer(replace(TINY, out=Path("other"), **options))
    other.prepare()
    other.model.load_state_dict(import_extra("safetensors.torch").load_file("run/model.safetensors"))
    tested = evaluate(other.model, other.data, TINY.batch_size)
    assert tested == (rows("run")[-1]["test_loss"], rows("run")[-1]["test_accuracy"])
    assert tested == evaluate(trainer.model, trainer.data, TINY.batch_size)


def test_compiled_training_tracks_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured as a whole, but run without a compiler's own arithmetic: to the same numbers."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: original(network, backend="eager", fullgraph=True))
    options = {**FROZEN, "dampening": 0.1, "dampening_begin": 0.0, "accumulate": 2, "epochs": 3}
    run("eager", **options)
    run("compiled", compile=True, **options)
    assert rows("compiled") == rows("eager") and rows("eager")[-1]["frozen"] > 0


OF_TWO = "--model resume_networks:Dropped --model-options dropout=0.0 --limit-train 97 --batch-size 32 --fp32-epochs 1"
OF_TWO += " --epochs 4 --calibration-batches 2 --device cpu --threads 1 --range minmax --first-last-bits 0 --lr 0.3"
OF_TWO += " --track-oscillations --oscillation-momentum 0.05 --freeze-threshold 0.1 --dampening 0.1 --dampening-begin 0"
OF_TWO += " --reestimate-bn always --bn-batches 4 --bin-regularization 0.001"


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes_track_as_one() -> None:
    """State of tracking is equal to the bit on both; rows are those of one process but for what rounding tips over."""
    in_two_processes(train_all, {"two": OF_TWO}, port=free_port())
    assert any("tracker" in key for key in state_of_both("two"))
    assert cli.main(["train", *OF_TWO.split(), "--out", "one"]) == 0
    for one, two in zip(rows("one"), rows("two"), strict=True):
        phase = one.pop("phase")
        assert two.pop("phase") == phase
        # Codes that tip over make two trainings drift apart; what is measured before the first of them does not.
        assert one == pytest.approx(two, rel=0.02 if phase == "QAT" else 1e-4, abs=0.01 if phase == "QAT" else 0.003)
    assert rows("two")[-1]["frozen"] > 0
