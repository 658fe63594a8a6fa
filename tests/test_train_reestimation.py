"""Runs that re-estimate the statistics of BN before they test, and runs that quantize weights alone."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TIMES
from torch import Tensor, nn

from fastqat import cli
from fastqat.train import progress
from fastqat.train.config import Config
from fastqat.train.curves import REESTIMATED, draw_curves
from fastqat.train.extras import import_extra
from fastqat.train.run import Run, default_folder, evaluate
from fastqat.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")
TINY = Config(
    model="resume_networks:Dropped", limit_train=97, batch_size=32, fp32_epochs=2, epochs=2, calibration_batches=2
)
TINY = replace(TINY, device="cpu", threads=1, range="minmax", fp32_lr=0.02, momentum=0.5, bn_batches=3)


def rows(folder: str) -> list[dict[str, Any]]:
    """The rows of a run without what the clock decides."""
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in lines]


def load(folder: str, name: str) -> dict[str, Tensor]:
    return import_extra("safetensors.torch").load_file(f"{folder}/{name}.safetensors")


def prepared(config: Config, state: dict[str, Tensor]) -> Trainer:
    """A quantized network with a state, and the data that it was trained on."""
    trainer = Trainer(replace(config, out=Path(tempfile.mkdtemp(dir=".")) / "run"))
    trainer.prepare()
    trainer.model.load_state_dict(state)
    return trainer


def averaged_by_torch(trainer: Trainer) -> dict[str, Tensor]:
    """The state of a network after BN of torch has averaged over the batches: momentum None is the arithmetic mean."""
    model, config = trainer.model.eval(), trainer.config
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train().reset_running_stats()
            layer.momentum = None
    batches = trainer.data.train_batches(
        config.batch_size, seed=config.seed, epoch=config.fp32_epochs + config.epochs + 1
    )
    with torch.no_grad():
        for images, _ in list(batches)[: config.bn_batches]:
            model(images)
    return model.state_dict()


def test_statistics_are_those_of_training_batches() -> None:
    """Against torch's own average; the network is tested with them, and saved with them at the end."""
    end = replace(TINY, reestimate_bn="end", out=Path("end"))
    finished = Trainer(end)
    results = finished.run()
    trained = {key: tensor.clone() for key, tensor in finished.model.state_dict().items()}
    saved = load("end", "model")
    differ = {key for key in saved if not torch.equal(saved[key], trained[key])}
    assert differ == {"norm.running_mean", "norm.running_var"}, "training would go on from what it had"
    wanted = averaged_by_torch(prepared(end, trained))
    for key in differ:
        torch.testing.assert_close(saved[key], wanted[key], rtol=1e-5, atol=1e-6)
    trainer = prepared(end, saved)
    tested = evaluate(trainer.model, trainer.data, end.batch_size)
    assert tested == (results[-1]["bn_test_loss"], results[-1]["bn_test_accuracy"])
    assert results[-1]["bn_test_loss"] != results[-1]["test_loss"]


def test_never_at_the_end_and_always() -> None:
    """Rows have both numbers where they are wanted, and nothing else changes; the weights at the end are the same."""
    for when in ("never", "end", "always"):
        Trainer(replace(TINY, reestimate_bn=when, out=Path(when))).run()
    marks = {when: ["bn_test_accuracy" in row for row in rows(when)] for when in ("never", "end", "always")}
    assert marks["never"] == [False] * 5
    assert marks["end"] == [False] * 2 + [True, False, True]
    assert marks["always"] == [False, False, True, True, True]
    plain = [
        {key: value for key, value in row.items() if not key.startswith(("bn_", "compared_"))} for row in rows("always")
    ]
    assert plain == rows("never")
    assert rows("always")[-1] == rows("end")[-1]
    files = {when: Path(when, "model.safetensors").read_bytes() for when in marks}
    assert files["always"] == files["end"] != files["never"]
    trainer = prepared(TINY, load("always", "best"))
    quantized = rows("always")[2:]
    tests = [row["bn_test_accuracy" if row["bn_chosen"] else "test_accuracy"] for row in quantized]
    assert evaluate(trainer.model, trainer.data, TINY.batch_size)[1] == max(tests) > min(tests)


def test_without_epochs_the_end_is_after_quantization() -> None:
    Trainer(replace(TINY, reestimate_bn="end", epochs=0, out=Path("run"))).run()
    assert ["bn_test_loss" in row for row in rows("run")] == [False, False, True]


def test_average_is_reestimated_too() -> None:
    """Its weights are others, and so are their statistics."""
    results = Trainer(replace(TINY, reestimate_bn="end", ema=0.9, epochs=1, out=Path("run"))).run()
    tests = [results[-1][f"{prefix}test_loss"] for prefix in ("", "bn_", "ema_", "bn_ema_")]
    assert len(set(tests)) == 4
    assert "average re-estimated" in progress.test_text(results[-1])


def test_batches_are_those_of_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders of the images: FP32 0 and 1, calibration 2, QAT 3 and 4; in tests always the same one."""
    config = replace(TINY, reestimate_bn="always", out=Path("run"))
    trainer = Trainer(config)
    orders: list[tuple[int, bool]] = []
    original = type(trainer.data).train_batches

    def watched(data: Any, *args: Any, **options: Any) -> Any:
        orders.append((options["epoch"], options.get("augment", True)))
        return original(data, *args, **options)

    monkeypatch.setattr(type(trainer.data), "train_batches", watched)
    trainer.run()
    compared = [(2, False), (5, True), (2, False)]  # on images of the calibration, before and after
    training = [(0, True), (1, True), (2, False), *compared, (3, True), *compared, (4, True), *compared]
    assert orders == training


def test_network_without_batch_norm(capsys: pytest.CaptureFixture[str]) -> None:
    """One line says so, and the run goes on."""
    options = "--model resume_networks:without_batch_norm --limit-train 96 --fp32-epochs 1 --epochs 1 --device cpu"
    assert cli.main(["train", *options.split(), "--reestimate-bn", "always", "--out", "run"]) == 0
    output = capsys.readouterr()
    assert output.out.count("has no batch normalisation: nothing to re-estimate\n") == 1 and output.err == ""
    assert not any("bn_test_loss" in row for row in rows("run"))


def test_both_numbers_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"phase": "QAT", "epoch": 1, "test_loss": 1.5, "test_accuracy": 0.25, "train_loss": 2.0}
    after = {"bn_test_loss": 0.5, "bn_test_accuracy": 0.75}
    assert progress.test_text(row) == "test 1.5000  25.00%"
    assert progress.test_text(row | after) == "test 1.5000  25.00%  re-estimated 0.5000  75.00%"
    progress.print_table("title", [row])
    assert "BN" not in capsys.readouterr().out
    progress.print_table("title", [row | {"phase": "PTQ"}, row | after])
    heading, ptq, qat = (line for line in capsys.readouterr().out.splitlines() if "%" in line or "top-1" in line)
    assert "BN re-estimated" in heading and "25.00%" in ptq and "75.00%" not in ptq
    assert "25.00%" in qat and "75.00%" in qat
    fp32 = row | {"phase": "FP32"}
    _, accuracy = draw_curves([fp32, row | {"phase": "PTQ", "epoch": 0} | after, row, row | after], "title").axes
    (line,) = (line for line in accuracy.lines if line.get_color() == REESTIMATED)
    assert list(line.get_xdata()) == [1, 2] and list(line.get_ydata()) == [0.75, 0.75]
    assert accuracy.get_ylim()[1] > 0.75


@pytest.mark.parametrize(("per_channel", "shape"), [(True, [8]), (False, [1])])
def test_weights_only(per_channel: bool, shape: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """Activations stay in float and nothing is calibrated; scales are per channel, or per tensor as in the paper."""
    config = replace(TINY, bits_activation=0, per_channel=per_channel, epochs=1, out=Path("run"))
    trainer = Trainer(config)
    assert trainer.title == "digits, model resume_networks:Dropped, W3 of 100.0 % of the multiplications"
    assert default_folder(config).name.startswith("digits-resume_networks-Dropped-w3-")
    trainer.run()
    layers = [m for m in trainer.model.modules() if hasattr(m, "weight_fake_quant")]
    assert [m.weight_fake_quant.bits for m in layers] == [8, 3, 8]
    assert all(m.activation_fake_quant is None for m in layers)
    assert list(layers[1].weight_fake_quant.scale.shape) == shape
    assert [row["phase"] for row in rows("run")] == ["FP32", "FP32", "PTQ", "QAT"]


def test_run_restores_what_it_reestimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the test in between fails."""
    trainer = Trainer(replace(TINY, reestimate_bn="always", out=Path("run")))
    trainer.quantize()
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    original = Run._test

    def failing(self: Run, prefix: str, model: nn.Module) -> Any:
        if prefix == "bn_":
            assert not torch.equal(model.state_dict()["norm.running_mean"], before["norm.running_mean"])
            raise OSError("disk full")
        return original(self, prefix, model)

    monkeypatch.setattr(Run, "_test", failing)
    with pytest.raises(OSError, match="disk full"):
        trainer.measure("QAT", 1)
    after = trainer.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
