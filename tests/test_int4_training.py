"""Training with quantized gradients by the trainer: its recipes, what it records and reports, processes, resuming."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_runs import SMALL, TIMES, stop_at_step
from test_distributed import free_port, in_two_processes
from torch import nn

import fastqat
from fastqat import cli
from fastqat.html_report import sections
from fastqat.nn import GradientFakeQuant, GradientQSpec
from fastqat.train.config import Config
from fastqat.train.distributed import Processes
from fastqat.train.quantization import prepare_as, quantizers
from fastqat.train.quantizer_recorder import EVERY, QuantizerRecorder
from fastqat.train.recipe import make_config, read_recipe
from fastqat.train.run_folder import RunFolder
from fastqat.train.trainer import Trainer

pytestmark = [pytest.mark.usefixtures("one_thread")]
HERE = Path(__file__).resolve().parent
TINY = f"{SMALL} --limit-train 96 --calibration-batches 1 --epochs 4 --save-steps 1 --lr 0.02"
INT4 = [*TINY.split(), "--recipe", "int4-training", "--gradient-alpha", "0.1", "--quantizer", "lsq"]
INT8 = [*TINY.split(), "--recipe", "int8-training"]


def train(folder: Path, *options: str) -> Path:
    assert cli.main(["train", *options, "--out", str(folder)]) == 0
    return folder


def outcome(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Metrics without what the clock decides, and the weights with the state of the quantizers."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return kept, (folder / "model.safetensors").read_bytes()


def recorded(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quantizers" / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each recipe on a few digits, from scratch."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("runs")
    made = {"int4": train(folder / "int4", *INT4), "int8": train(folder / "int8", *INT8)}
    torch.set_num_threads(threads)
    return made


def test_recipes_say_what_the_papers_do() -> None:
    int4, int8 = (Config(**read_recipe(f"int{bits}-training")) for bits in (4, 8))
    assert (int4.bit_widths, int8.bit_widths) == ("W4A4G4", "W8A8G8")
    assert int4.first_last_float and not int8.first_last_float and int8.first_last_bits == 0
    for config in (int4, int8):
        assert (config.epochs, config.batch_size, config.lr, config.momentum, config.weight_decay) == (
            *(160, 128, 0.1, 0.9),
            1e-4,
        )
        assert (config.schedule, config.step_at, config.step_factor, config.fp32_epochs) == (
            "step",
            (0.5, 0.75),
            0.1,
            0,
        )
    assert (int4.gradient_alpha, int4.gradient_gamma_step, int4.quantizer_lr) == (1e-3, 1e-3, 1e-5)
    wanted = quantizers(int4, 10)
    assert wanted.gradient == GradientQSpec(bits=4, method="lbt")
    assert wanted.weight is not None and (wanted.weight.restricted, wanted.weight.learn) == (True, "scale")
    wanted = quantizers(int8, 10)
    assert wanted.gradient == GradientQSpec(bits=8, method="in_hindsight") and wanted.weight is not None
    assert (wanted.weight.range, wanted.weight.axis, wanted.weight.learn) == ("minmax", None, None)
    assert wanted.activation is not None
    assert (wanted.activation.range, wanted.activation.symmetric) == ("in_hindsight", False)
    six = make_config(
        {"recipe": ["int4-training"], "bits_gradient": 6, "gradient_method": "fixed", "gradient_gamma": 0.8}
    )
    assert quantizers(six, 10).gradient == GradientQSpec(bits=6, method="fixed", gamma=0.8)


def test_first_and_last_layer_in_float() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    config = Config(first_last_float=True, bits_gradient=4)
    prepare_as(config, model, quantizers(config, 10))
    assert [hasattr(model[i], "gradient_fake_quant") for i in (0, 2, 4)] == [False, True, False]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gradient_gamma": 0.5}, "gradient_gamma: wanted bits_gradient"),
        ({"bits_gradient": 9}, "bits_gradient"),
        ({"gradient_method": "lsq"}, "gradient_method"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**wrong)


def test_options_that_only_the_quantizer_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (("--bits-gradient", "1"), "bits: wanted"),
        (("--bits-gradient", "4", "--gradient-method", "fixed"), "gamma: wanted a number"),
    ):
        assert cli.main(["train", *TINY.split(), *options, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_resumed_to_the_bit(name: str, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was recorded; the 8th of 12 steps is the second one of the third epoch."""
    folder = tmp_path / "run"

    stop_at_step(monkeypatch, 8, lambda: signal.raise_signal(signal.SIGINT))
    assert cli.main(["train", *(INT4 if name == "int4" else INT8), "--out", str(folder)]) == 130
    monkeypatch.undo()
    assert cli.main(["train", "--resume", str(folder)]) == 0
    assert outcome(folder) == outcome(runs[name])
    for file in ("gradients", "activations"):
        assert recorded(folder, file) == recorded(runs[name], file)


def test_training_does_not_notice_the_recorder(runs: dict[str, Path], tmp_path: Path) -> None:
    plain = train(tmp_path / "run", *INT4, "--no-record-quantizers")
    assert outcome(plain) == outcome(runs["int4"])
    assert not (plain / "quantizers").exists()


def test_rows_of_steps_that_are_taken_again_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "quantizers").mkdir()
    for name in ("gradients", "activations"):
        rows = "".join(json.dumps({"step": step, "layers": {}}) + "\n" for step in (4, 8, 12))
        (tmp_path / "quantizers" / f"{name}.jsonl").write_text(rows)
    QuantizerRecorder(RunFolder(tmp_path), nn.Linear(2, 2), activations=False, steps=40, step=9).save()
    for name in ("gradients", "activations"):
        assert [row["step"] for row in recorded(tmp_path, name)] == [4, 8]


def test_what_is_recorded(runs: dict[str, Path]) -> None:
    for name, folder in runs.items():
        rows = recorded(folder, "gradients")
        assert [row["step"] for row in rows] == list(range(EVERY, 13, EVERY))
        for layer in (each for row in rows for each in row["layers"].values()):
            assert layer["largest"] > 0 and layer["large_error"] >= 0 and 0 <= layer["beyond"] < 0.5
            if name == "int4":
                assert layer["high"] == pytest.approx(layer["gamma"] * layer["largest"], rel=1e-5)
            else:
                assert layer["gamma"] is None and layer["low"] < layer["high"]
        rows = recorded(folder, "activations")
        assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6), (3, 9), (4, 12)]
        assert all(0 <= each["clipped"] < 1 for row in rows for each in row["layers"].values())


def test_report(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "DPI", 20)
    for folder in runs.values():
        assert cli.main(["report", str(folder)]) == 0
        page = (folder / "report/index.html").read_text()
        assert "<h2>Gradients</h2>" in page and "<h2>Activations</h2>" in page
        assert {"gradients.png", "activations.png"} <= {path.name for path in (folder / "report").iterdir()}
        last = recorded(folder, "gradients")[-1]["layers"]
        assert all(f"<td>{name}</td>" in page for name in last)
        assert f"{next(iter(last.values()))['large_error']:.4f}" in page


def test_a_network_that_nobody_trained_is_calibrated_as_it_will_train(tmp_path: Path) -> None:
    """Its running statistics say nothing yet: with ranges by these it would not learn, as they hardly move."""
    options = "--data digits --recipe int4-training --batch-size 64 --epochs 1 --device cpu --threads 1"
    folder = train(tmp_path / "run", *options.split(), "--no-record-quantizers")
    (row,) = [each for each in outcome(folder)[0] if each["phase"] == "QAT"]
    assert row["train_loss"] < 2.15  # 2.3 is that of a guess


def test_compiled_training_has_seen_a_gradient_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compiled(model: nn.Module) -> nn.Module:
        found = [m for m in model.modules() if isinstance(m, GradientFakeQuant)]
        seen.append([m.initialized for m in found])
        assert all(p.grad is None for p in model.parameters())
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    parsed = vars(
        cli._parser().parse_args(["train", *INT4, "--compile", "--epochs", "1", "--out", str(tmp_path / "r")])
    )
    del parsed["command"]
    trainer = Trainer(make_config(parsed))
    trainer.run()
    assert len(seen) == 1 and seen[0] and all(seen[0])


def _merge(rank_file: str) -> None:
    """Each process sees gradients of its own, and both have one state after the step."""
    processes = Processes("cpu")
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    fastqat.prepare(
        model,
        fastqat.QConfig(None, None, gradient=GradientQSpec(alpha=0.1)),
        overrides={"1": fastqat.QConfig(None, None, gradient=GradientQSpec(method="in_hindsight"))},
    )
    interval, hindsight = (m for m in model.modules() if isinstance(m, GradientFakeQuant))
    torch.manual_seed(processes.rank)
    g = torch.randn(1000) * (1 + processes.rank)
    for quantizer in (interval, hindsight):
        quantizer.quantize(g)
    own = {"g": g, "beyond": interval.get_buffer("beyond").clone()}
    processes.merge_gradient_grids(model)
    state = {f"{i}.{k}": b.clone() for i, q in enumerate((interval, hindsight)) for k, b in q.named_buffers()}
    torch.save((own, state), f"{rank_file}.{processes.rank}")
    processes.close()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_processes_move_their_grids_together(tmp_path: Path) -> None:
    in_two_processes(_merge, str(tmp_path / "rank"), port=free_port())
    (own0, state0), (own1, state1) = (torch.load(tmp_path / f"rank.{rank}") for rank in (0, 1))
    g = torch.stack([own0["g"], own1["g"]])
    for name in ("0.gamma", "0.beyond", "0.seen", "1.range_low", "1.range_high", "1.new_low", "1.new_high"):
        assert torch.equal(state0[name], state1[name]), name
    assert int(state0["0.seen"]) == 2000
    assert torch.equal(state0["0.beyond"], own0["beyond"] + own1["beyond"])
    assert (float(state0["1.new_low"]), float(state0["1.new_high"])) == (float(g.min()), float(g.max()))
