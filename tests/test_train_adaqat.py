"""Runs that learn bit-widths (AdaQAT): what the options mean, what is measured and kept, and that it can be resumed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import results
from torch import Tensor

import fastqat
from fastqat.adaqat import AdaQAT, Update
from fastqat.adaqat.probe import Probe
from fastqat.html_report import write_report
from fastqat.train import bit_width_search
from fastqat.train.bit_width_search import adaqat
from fastqat.train.config import Config
from fastqat.train.extras import import_extra
from fastqat.train.recipe import make_config
from fastqat.train.run import evaluate
from fastqat.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")
HERE = Path(__file__).resolve().parent
TINY = Config(model="resume_networks:Dropped", limit_train=96, batch_size=32, fp32_epochs=1, epochs=4, lr=0.1)
TINY = replace(TINY, calibration_batches=1, device="cpu", threads=1, range="minmax", bits_weight=8, bits_activation=8)
# 12 steps: of the only layer that is neither the first nor the last, weights lose some 5 bits.
LEARNED = {"adaqat": 0.15, "adaqat_lr_weight": 0.5, "adaqat_lr_activation": 0.2}


def run(folder: str, config: Config = TINY, **options: Any) -> Trainer:
    """A run without the picture of its curves, which takes half the time."""
    trainer = Trainer(replace(config, out=Path(folder), **options))
    trainer.train_fp32()
    trainer.quantize()
    trainer.train_quantized()
    return trainer


def rows(folder: str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, name).read_text().splitlines()]


def recorded(folder: str) -> list[dict[str, Any]]:
    return rows(folder, "bit_widths/steps.jsonl")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learns bit-widths, which the tests only read."""
    folder = tmp_path_factory.mktemp("runs") / "learned"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        run(str(folder), **LEARNED)
    return folder


def test_bits_are_learned_and_told(learned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows of the epochs have N, and costs of its ceiling by hand: of 72, 72 and 1280 weights the second 72."""
    found = recorded(str(learned))
    assert [row["step"] for row in found] == list(range(1, 13))
    assert found[0]["hardware"] == 64
    for before, after in zip(found, found[1:], strict=False):
        ceilings = [math.ceil(n) for n in before["widths"].values()]
        assert after["hardware"] == ceilings[0] * ceilings[1]
    for epoch, row in enumerate(rows(str(learned))[2:], 1):
        weight, activation = found[3 * epoch - 1]["widths"].values()
        assert (row["weight_bits"], row["activation_bits"]) == (weight, activation)
        bits, both = math.ceil(weight), math.ceil(weight) * math.ceil(activation)
        assert row["weight_compression_rate"] == pytest.approx(32 * 1424 / (8 * 1352 + 72 * bits))
        assert row["bit_operations"] == 64 * (64 * 72 + 1280) + 16 * 72 * both
    assert row["weight_bits"] < 6 and row["activation_bits"] < 8


def test_bits_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(replace(TINY, out=Path("run"), **LEARNED)).run()
    told, last = capsys.readouterr().out, rows("run")[-1]
    assert f"  W{last['weight_bits']:.2f} A{last['activation_bits']:.2f}  " in told
    for text in ("W bits", "A bits", "WCR", "BitOPs", f"{last['bit_operations']:,}", f" {last['weight_bits']:.2f} "):
        assert text in told


def test_saved_weights_have_the_learned_bits(learned: Path) -> None:
    """A network that is prepared at the bits of the options has the others after loading, and their accuracy."""
    last = rows(str(learned))[-1]
    trainer = Trainer(replace(TINY, out=Path("again")))
    trainer.prepare()
    state = import_extra("safetensors.torch").load_file(str(learned / "model.safetensors"))
    with pytest.warns(UserWarning, match="the checkpoint has . bits, and the model had"):
        trainer.model.load_state_dict(state)
    wanted = (math.ceil(last["weight_bits"]), math.ceil(last["activation_bits"]))
    assert fastqat.bit_widths(trainer.model) == {"stem": (8, 8), "depthwise": wanted, "linear": (8, 8)}
    kind = "bn_" if last["bn_chosen"] else ""  # of the statistics of BN that are saved
    reached = (pytest.approx(last[f"{kind}test_loss"]), last[f"{kind}test_accuracy"])
    assert evaluate(trainer.model, trainer.data) == reached


PIECES = {"accumulate": 3, "label_smoothing": 0.1, "model_options": {"dropout": 0.0}, "bin_regularization": 0.1}


@pytest.mark.parametrize("options", [{}, PIECES, {"bf16": True}], ids=["dropout", "pieces", "bf16"])
def test_loss_is_that_of_the_step(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """At the same bits a pass computes, to the bit, the mean of cross-entropies that the step has computed."""
    original, compared = AdaQAT.step, []

    def step(self: AdaQAT, loss: Tensor, closure: Any) -> Update | None:
        compared.append((loss.item(), self.probe.losses(closure, [{}])[0].item()))
        return original(self, loss, closure)

    monkeypatch.setattr(AdaQAT, "step", step)
    run("run", **LEARNED, **options, epochs=1)
    assert len(compared) == 3
    for loss, again in compared:
        assert loss == again and 0.5 < loss < 5
    assert rows("run")[-1]["train_loss"] == pytest.approx(sum(loss for loss, _ in compared) / 3)


def test_passes_leave_no_trace() -> None:
    """With widths that stay where they are, weights, averages and oscillations are those of a run without AdaQAT."""
    options = {"bits_weight": 3, "track_oscillations": True, "ema": 0.9, "record_quantizers": True, "lr": 0.3}
    run("with", **options, **{**LEARNED, "adaqat_lr_weight": 0.0, "adaqat_lr_activation": 0.0})
    run("without", **options)
    (kept, weights), (wanted, same) = (results(Path(name)) for name in ("with", "without"))
    assert weights == same and len(recorded("with")) == 12
    assert [{key: row[key] for key in other} for row, other in zip(kept, wanted, strict=True)] == wanted
    assert wanted[-1]["oscillating"] > 0


def test_frozen_widths_are_recorded_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """After freezing no pass is made; the loss of the task is kept all the same."""
    losses = iter([torch.tensor(value) for value in (0.0, 10.0) * 6])  # less and more than those of the steps
    monkeypatch.setattr(Probe, "losses", lambda self, closure, settings: [next(losses)] * len(settings))
    options = {**LEARNED, "adaqat_lr_activation": 0.5, "adaqat_freeze_after": 3}
    run("run", **options, bits_weight=4, bits_activation=4)
    found = recorded("run")
    assert [len(row["frozen"]) for row in found] == [0, 0, 0, *[2] * 9]
    assert [row["oscillations"]["weight"] for row in found] == [0, 1, 2, *[3] * 9]
    assert found[-1]["widths"] == found[3]["widths"] and found[-1]["hardware"] == math.prod(found[3]["widths"].values())
    assert rows("run")[-1]["train_loss"] == pytest.approx(sum(row["loss"] for row in found[-3:]) / 3)


def test_points_of_a_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first update, and the first one of every four steps, of which every other one has an update."""
    monkeypatch.setattr(bit_width_search, "POINTS", 3)
    run("run", adaqat=0.1, adaqat_lr_weight=0.0, adaqat_lr_activation=0.0, adaqat_every=2)
    assert [row["step"] for row in recorded("run")] == [1, 5, 9]


def test_average_follows_bits() -> None:
    """The averaged network gets the bits of the network, and its range where they changed."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    fastqat.prepare(model, fastqat.QConfig(weight=fastqat.QSpec(bits=4, oscillation=fastqat.Oscillation())))
    average, q = fastqat.AveragedModel(model, 0.5), model[0].weight_fake_quant
    q.set_grid(torch.tensor([0.3]))
    mine = average.module[0].weight_fake_quant
    for bits, scale in ((3, 0.3 * 15 / 7), (8, 0.3 * 15 / 255)):
        q.change_bits(bits)
        average.update_parameters(model)
        assert mine.bits == bits and mine.codes == q.codes and (mine.tracker is None) == (bits > 4)
        assert mine.scale.item() == pytest.approx(scale, rel=1e-5)
    with torch.no_grad():
        q.scale.mul_(2)
    average.update_parameters(model)  # of the same bits again: t = 2, so that 3 of 12 parts stay
    assert mine.scale.item() == pytest.approx(scale * (0.25 + 0.75 * 2), rel=1e-5)


ERRORS = [
    ({"bits_weight": 1}, "bits_weight: wanted at least adaqat_lowest, 2, where adaqat starts; got 1"),
    ({"bits_activation": 3, "adaqat_lowest": 4}, "bits_activation: wanted at least adaqat_lowest, 4"),
    ({"adaqat_lowest": 9}, "adaqat_lowest: wanted an integer from 1 to 8; got 9"),
    ({"adaqat": -0.1}, "adaqat: wanted a number of at least 0"),
    ({"adaqat_every": 0}, "adaqat_every: wanted an integer of at least 1; got 0"),
    ({"adaqat_cost": "latency"}, "adaqat_cost: wanted one of product, bit_operations, weight_bits; got 'latency'"),
    ({"quantizer": "trs", "transition_rate": 0.005}, "adaqat: wanted no transition_rate beside it"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_mistakes_in_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        replace(TINY, **{**LEARNED, **options})
    assert message in str(error.value)


def test_mistakes_that_the_network_shows() -> None:
    """Before anything is trained or written: no layer is left, or a grid has no such bits."""
    with pytest.raises(ValueError, match="fixed: wanted a quantized layer that is not fixed"):
        run("run", **LEARNED, bits={"depthwise": "4/4"})
    with pytest.raises(ValueError, match="lowest: wanted 2 to 8"):
        run("run", **LEARNED, quantizer="dorefa", adaqat_lowest=1)
    assert not Path("run").exists()


def test_layers_that_keep_their_bits() -> None:
    """The first and the last one where they have bits of their own, and those that the options name."""

    def learned(**options: Any) -> list[str]:
        config = replace(TINY, **LEARNED, **options)
        trainer = Trainer(replace(config, out=Path(f"run {len(list(Path().iterdir()))}")))
        trainer.prepare()
        (weight, _) = adaqat(config, trainer.model, torch.zeros(1, 1, 8, 8)).widths
        return weight.layers

    assert learned() == ["depthwise"]
    assert learned(first_last_bits=0) == ["stem", "depthwise", "linear"]
    assert learned(first_last_float=True) == ["depthwise"]
    assert learned(first_last_bits=0, bits={"depth*": 8}) == ["stem", "linear"]


@pytest.mark.parametrize("name", ["adaqat", "adaqat-scratch"])
def test_recipes(name: str) -> None:
    """They start at 8 bits with what the paper has: DoReFa, clipped activations, the edges at 8 bits; and train."""
    small = {"model": "digits", "device": "cpu", "threads": 1, "limit_train": 128, "batch_size": 32, "epochs": 2}
    faster = {"adaqat_lr_weight": 0.4, "adaqat_lr_activation": 0.2, "fp32_epochs": 0, "out": Path("run")}
    trainer = Trainer(make_config({"recipe": [name], **small, **faster}))
    weight, activation = trainer.qconfig.weight, trainer.qconfig.activation
    assert weight is not None and (weight.bits, weight.normalize) == (8, "tanh")
    assert activation is not None and (activation.bits, activation.learn) == (8, "scale")
    trainer.train_fp32()
    trainer.quantize()
    trainer.train_quantized()
    last, bits = rows("run")[-1], list(fastqat.bit_widths(trainer.model).values())
    assert bits[0] == bits[-1] == (8, 8)
    assert bits[1:-1] == [(math.ceil(last["weight_bits"]), math.ceil(last["activation_bits"]))] * (len(bits) - 2)
    assert last["weight_bits"] < 6 and last["train_loss"] < 2.4


RESUMED = "--model resume_networks:Dropped --limit-train 96 --batch-size 32 --fp32-epochs 1 --epochs 4 --lr 0.1 "
RESUMED += "--calibration-batches 1 --device cpu --threads 1 --range minmax --bits-weight 8 --bits-activation 8 "
RESUMED += "--adaqat 0.15 --adaqat-lr-weight 0.5 --adaqat-lr-activation 0.3 --adaqat-per-layer --first-last-bits 0 "
RESUMED += "--adaqat-freeze-after 2 --adaqat-every 2 --ema 0.9 --save-steps 2"
# Kills a run before and after an update of bit-widths, each time in a fork of this process; see killing.py.
KILLS = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from killing import WARM, at_call, child, go_on
from fastqat.adaqat import AdaQAT
from fastqat.train.extras import import_extra
torch.set_num_threads(1)
for module in (*WARM, "matplotlib.figure", "matplotlib.backends.backend_agg"):
    import_extra(module)
options, out = sys.argv[2:], Path("killed")
assert child([*options, "--out", "whole"]) == 0
assert child(go_on(out, options), change=at_call(AdaQAT, "step", 6)) == -9
assert child(go_on(out, options), change=at_call(AdaQAT, "step", 3, after=True)) == -9
assert child(go_on(out, options)) == 0
"""


def test_kills_change_nothing() -> None:
    """Metrics, weights, bit-widths and what is recorded of them are those of a run that nothing disturbs."""
    command = [sys.executable, "-c", KILLS, str(HERE), *RESUMED.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert results(Path("killed")) == results(Path("whole"))
    assert recorded("killed") == recorded("whole")
    widths = [tuple(row["widths"].values()) for row in recorded("whole")]
    assert len(set(widths)) > 5 and len(widths[0]) == 6


def test_report(learned: Path) -> None:
    """Both losses and widths in pictures, the ends in a table; layers of their own in a map."""
    html = write_report(learned).read_text()
    last = recorded(str(learned))[-1]["widths"]
    assert "<h2>Bit-widths</h2>" in html and (learned / "report/bit_widths.png").exists()
    assert f"{last['weight']:.2f}</td>" in html and "lambda = 0.15" in html
    run("layers", **LEARNED, adaqat_per_layer=True, first_last_bits=0, epochs=2)
    html = write_report(Path("layers")).read_text()
    assert (Path("layers") / "report/bit_widths_of_layers.png").exists()
    assert "<td>depthwise</td><td>activations</td>" in html
    run("untrained", **LEARNED, epochs=0)
    assert "Bit-widths: the run has not updated its bit-widths yet." in write_report(Path("untrained")).read_text()
    run("plain", epochs=0)
    assert "Bit-widths" not in write_report(Path("plain")).read_text()


def test_weights_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """With activations in float, which cost 32 bits: the pull on weights is 32 lambda."""
    run("run", **{**LEARNED, "adaqat_lr_weight": 0.05}, bits_activation=0, epochs=1)
    assert [row["hardware"] for row in recorded("run")] == [8 * 32, 8 * 32, 8 * 32]
    assert list(recorded("run")[-1]["widths"]) == ["weight"]
    assert rows("run")[-1]["weight_bits"] == pytest.approx(8 - 3 * 0.05 * 0.15 * 32, abs=0.02)
    assert "activation_bits" not in rows("run")[-1] and "  W7.28  " in capsys.readouterr().out


def test_oscillations_beside_it() -> None:
    """Freezing of oscillating weights is allowed: a change of bits forgets what was tracked, and frees the frozen."""
    options = {"track_oscillations": True, "oscillation_momentum": 0.2, "freeze_threshold": 0.4, "lr": 0.5}
    run("run", **{**LEARNED, "adaqat_lr_weight": 0.09, "adaqat_lr_activation": 0.0}, **options, bits_weight=3)
    found = rows("run")[2:]
    assert found[-1]["weight_bits"] == 2 and all("oscillating" in row and "frozen" in row for row in found)


def test_quantizers_are_recorded_beside_it() -> None:
    """Ranges of activations are measured at the bits of their epoch."""
    run("run", **LEARNED, record_quantizers=True, epochs=2)
    assert [row["step"] for row in rows("run", "quantizers/activations.jsonl")] == [3, 6]
