"""Which statistics of BN a run saves, and that training images decide it; scales at the floor in rows and lines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastqat import batch_norm
from fastqat.train import progress, run
from fastqat.train.bn_statistics import are_better, explanation
from fastqat.train.config import Config
from fastqat.train.extras import import_extra
from fastqat.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")
TINY = Config(
    model="resume_networks:Dropped", limit_train=256, batch_size=32, fp32_epochs=2, epochs=1, calibration_batches=2
)
TINY = replace(TINY, device="cpu", threads=1, range="minmax", fp32_lr=0.05, bn_batches=3, out=Path("run"))
KEYS = ("norm.running_mean", "norm.running_var")


def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def saved(name: str) -> dict[str, Tensor]:
    return import_extra("safetensors.torch").load_file(f"run/{name}.safetensors")


def is_trained(trainer: Trainer, name: str) -> bool:
    """True if a file has the statistics of training, which the network keeps."""
    now, kept = trainer.model.state_dict(), saved(name)
    return all(torch.equal(kept[key], now[key]) for key in KEYS)


def stale(trainer: Trainer) -> None:
    """Leave statistics in the network that no longer fit its weights."""
    trainer.model.get_buffer("norm.running_mean").add_(3.0)
    trainer.model.get_buffer("norm.running_var").mul_(30.0)


@contextlib.contextmanager
def spoiled(model: nn.Module, *_: Any, **__: Any) -> Iterator[int]:
    """Re-estimation that goes wrong."""
    before = {key: model.get_buffer(key).clone() for key in KEYS}
    model.get_buffer(KEYS[0]).add_(3.0)
    model.get_buffer(KEYS[1]).mul_(30.0)
    yield 1
    for key, values in before.items():
        model.get_buffer(key).copy_(values)


def test_default_shows_both_after_quantization_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    """Statistics that are not those of the quantized network are seen at once, and are not what is saved."""
    trainer = Trainer(TINY)
    trainer.train_fp32()
    stale(trainer)
    row = trainer.quantize()
    assert row["bn_test_accuracy"] > row["test_accuracy"] + 0.1 and row["bn_chosen"]
    assert not is_trained(trainer, "model") and not is_trained(trainer, "best")
    trainer.train_quantized()
    assert ["bn_test_accuracy" in row for row in rows()] == [False, False, True, True]
    ptq, qat = (line for line in capsys.readouterr().out.splitlines() if "which are better on training images" in line)
    assert ptq.startswith(f"PTQ: {row['bn_test_accuracy']:.2%} with re-estimated statistics of batch normalisation, ")
    assert f"{row['test_accuracy']:.2%} with those of training, which were gathered before the network was q" in ptq
    assert "saved with the re-estimated ones" in ptq and "while weights still changed" in qat


def test_trained_statistics_are_kept_where_they_are_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "reestimated", spoiled)
    trainer = Trainer(replace(TINY, epochs=0))
    trainer.train_fp32()
    row = trainer.quantize()
    assert row["bn_compared_accuracy"] < row["compared_accuracy"] and row["bn_chosen"] is False
    assert is_trained(trainer, "model") and is_trained(trainer, "best")
    assert "saved with those of training" in explanation(row)


@pytest.mark.parametrize("wrong", [False, True])
def test_no_test_image_decides(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test accuracies that say the opposite change nothing."""
    trainer = Trainer(replace(TINY, epochs=0))
    trainer.train_fp32()
    if wrong:
        monkeypatch.setattr(batch_norm, "reestimated", spoiled)
    else:
        stale(trainer)
    found = iter([(1.0, float(not wrong)), (1.0, float(wrong))])  # trained, re-estimated
    monkeypatch.setattr(run, "evaluate", lambda *_: next(found))
    row = trainer.quantize()
    assert row["bn_chosen"] is (not wrong) and is_trained(trainer, "model") is wrong
    assert is_trained(trainer, "best") is wrong and trainer.state.best == 0.0


def test_loss_decides_between_equal_accuracies() -> None:
    assert are_better((0.5, 0.8), (0.6, 0.8)) and not are_better((0.6, 0.8), (0.6, 0.8))
    assert are_better((9.0, 0.9), (0.1, 0.8)) and not are_better((0.1, 0.7), (9.0, 0.8))


def test_nothing_is_explained_where_there_is_one_number() -> None:
    row = {"phase": "PTQ", "test_accuracy": 0.5}
    both = row | {"bn_test_accuracy": 0.6}
    assert explanation(row) == explanation(both) == ""  # rows of older runs do not say what was saved
    assert explanation(both | {"bn_chosen": True}).startswith("PTQ: 60.00%")
    assert explanation(row | {"bn_test_accuracy": 0.5, "bn_chosen": True}) == ""


def test_scales_at_the_floor(capsys: pytest.CaptureFixture[str]) -> None:
    """They are counted in the row, the line and the table, where there are some."""
    trainer = Trainer(replace(TINY, epochs=0, reestimate_bn="never"))
    row = trainer.quantize()
    assert "scales_at_floor" not in row
    with torch.no_grad():
        trainer.model.depthwise.weight_fake_quant.scale[:3] = 0.0  # type: ignore[union-attr,operator]
    row = trainer.measure("QAT", 1, train_loss=1.0, train_accuracy=0.5, images_per_second=1.0)
    assert row["scales_at_floor"] == 3 and rows()[-1]["scales_at_floor"] == 3
    capsys.readouterr()
    progress.Progress("QAT", 1, 32).epoch(row)
    progress.print_table("title", [row])
    line, *table = capsys.readouterr().out.splitlines()
    assert "  3 scales at the floor  " in line
    assert "scales at the floor" in "\n".join(table)
