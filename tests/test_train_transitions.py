"""Runs with scheduled transition rates: what the options mean, what is saved and resumed, and what is recorded."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_runs import TINY, results, stop_at_step
from test_distributed import free_port, in_two_processes, state_of_both, train_all

from fastqat import cli
from fastqat.html_report.write import write_report
from fastqat.train.config import Config
from fastqat.train.optimization import Updates, hold_rate, weight_optimizer
from fastqat.train.quantization import quantizers
from fastqat.train.recipe import make_config

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")
TRS = "--quantizer trs --transition-rate 0.02 --transition-momentum 0.8 --first-last-bits 0 --bits-weight 2"
OF_TWO = f"{TINY} {TRS} --fp32-epochs 1 --epochs 2"


def test_options_reach_the_quantizers() -> None:
    """Ranges of weights are learned without a schedule of rates, and fixed with one, which wants them tracked."""
    config = make_config({"recipe": ["trs-sgd"]})
    assert (config.transition_rate, config.batch_size, config.lr, config.epochs) == (5e-3, 256, 0.1, 400)
    spec = quantizers(config, 10)
    assert spec.weight is not None and spec.activation is not None
    assert (spec.weight.learn, spec.weight.axis, spec.weight.bits) == (None, None, 2)
    assert spec.weight.oscillation is not None and spec.weight.oscillation.freeze_threshold is None
    assert (spec.activation.learn, spec.activation.normalize) == ("scale", "range")
    baseline = quantizers(replace(config, transition_rate=0.0), 10).weight
    assert baseline is not None and (baseline.learn, baseline.oscillation) == ("scale", None)
    adam = make_config({"recipe": ["trs-adam"]})
    assert (adam.optimizer, adam.lr, adam.transition_rate) == ("adam", 1e-3, 5e-3)
    with pytest.raises(ValueError, match="bits: wanted 2 to 8: TRS has other grids for 1 bit"):
        quantizers(replace(config, bits_weight=1), 10)
    with pytest.raises(ValueError, match=r"transition_bound: wanted 0, or a number of at least 1; got 0\.5"):
        replace(config, transition_bound=0.5)
    with pytest.raises(ValueError, match="transition_rate: wanted another quantizer than dorefa"):
        replace(config, quantizer="dorefa")
    with pytest.raises(ValueError, match=r"transition_momentum: wanted a number below 1; got 1\.0"):
        replace(config, transition_momentum=1.0)


@pytest.mark.parametrize("name, kind", (("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")))
def test_held_rates_stay(name: str, kind: str) -> None:
    """The rest follows the schedule: half way down a cosine it is at a half."""
    held, free = (torch.nn.Parameter(torch.ones(2)) for _ in "12")
    config = Config(optimizer=name, momentum=0.0, weight_decay=0.0)
    optimizer = weight_optimizer(config, [free, held], 0.1)
    hold_rate(optimizer, [held])
    updates = Updates(config, [optimizer], 10, 0)
    held.grad, free.grad = torch.ones(2), torch.ones(2)
    updates.step(5)
    assert type(optimizer).__name__ == kind and updates.lr(5) == pytest.approx(0.05)
    torch.testing.assert_close(held.detach(), torch.full((2,), 0.9))
    torch.testing.assert_close(free.detach(), torch.full((2,), 0.95))


def test_a_resumed_run_is_the_undisturbed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, metrics and what was recorded, to the bit; in pieces of a batch, too."""
    options = [*TINY.split(), *TRS.split(), "--optimizer", "adam", "--epochs", "3", "--accumulate", "2"]
    assert cli.main(["train", *options, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        stop_at_step(patch, 6 + 7, lambda: signal.raise_signal(signal.SIGINT))
        assert cli.main(["train", *options, "--out", "stopped"]) == 130
    assert cli.main(["train", "--resume", "stopped"]) == 0
    assert results(Path("whole")) == results(Path("stopped"))
    whole, stopped = (Path(name, "transitions", "steps.jsonl").read_bytes() for name in ("whole", "stopped"))
    assert whole == stopped
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["step"] for row in rows] == [4, 8]
    assert any(max(row["rate"]) > 0 for row in rows) and rows[-1]["factor"] != rows[0]["factor"]
    assert len(rows[0]["layers"]) == len(rows[0]["target"]) > 1
    for row in rows:  # a step has the value of the steps before it
        wanted = 0.02 * 2**0.5 * (1 + math.cos(math.pi * (row["step"] - 1) / 9)) / 2
        assert row["target"] == pytest.approx([wanted] * len(row["layers"]), rel=1e-5)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes_scale_alike() -> None:
    """Nothing is sent, and the weights are those of the other process, to the bit."""
    in_two_processes(train_all, {"two": OF_TWO}, port=free_port())
    assert state_of_both("two")
    last = json.loads(Path("two", "transitions", "steps.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and max(last["rate"]) > 0


def test_the_report_has_a_section() -> None:
    options = [*TINY.split(), *TRS.split(), "--epochs", "3"]
    assert cli.main(["train", *options, "--out", "run"]) == 0
    html = write_report(Path("run")).read_text()
    assert "Transition rates</h2>" in html and Path("run", "report", "transition_rates.png").is_file()
    last = json.loads(Path("run", "transitions", "steps.jsonl").read_text().splitlines()[-1])
    assert all(f"{target:.3g}" in html for target in last["target"])
