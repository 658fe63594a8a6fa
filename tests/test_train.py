"""The trainer: the run folder, and whole runs on a few digits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastqat
from fastqat.train.config import Config
from fastqat.train.curves import draw_curves
from fastqat.train.extras import import_extra
from fastqat.train.progress import Meter
from fastqat.train.run import choose_device, evaluate
from fastqat.train.run_folder import RunFolder, create_folder
from fastqat.train.trainer import Trainer

TINY = Config(limit_train=192, fp32_epochs=2, epochs=2, calibration_batches=2, device="cpu", threads=1)
TIMES = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run without what the clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_run_folder_keeps_the_old_file_when_a_write_fails(tmp_path: Path) -> None:
    create_folder(tmp_path / "a" / "run", TINY, {"cpu": "some"})
    folder = RunFolder(tmp_path / "a" / "run")
    folder.add_metrics({"loss": 1.5})
    with pytest.raises(TypeError):
        folder.add_metrics({"loss": object()})

    class BrokenFigure:
        def savefig(self, file: Any, **_: Any) -> None:
            file.write(b"half a picture")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.save_figure(BrokenFigure(), "curves.png")
    names = ["config.yaml", "environment.json", "metrics.jsonl"]
    assert sorted(path.name for path in folder.path.iterdir()) == names
    assert json.loads((folder.path / "metrics.jsonl").read_text()) == {"loss": 1.5} == folder.rows[0]
    assert json.loads((folder.path / "environment.json").read_text()) == {"cpu": "some"}
    assert "limit_train: 192" in (folder.path / "config.yaml").read_text()


def test_run_folder_takes_no_folder_that_exists(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(FileExistsError, match="does not exist yet; got .*run"):
        create_folder(tmp_path / "run", TINY, {})


def test_meter() -> None:
    meter = Meter()
    meter.add(torch.tensor(2.0), torch.tensor([[0.0, 1.0], [3.0, 2.0]]), torch.tensor([1, 1]))
    meter.add(torch.tensor(0.0), torch.empty(0, 2), torch.empty(0, dtype=torch.int64))
    assert meter.state() == [2, 2.0, 1]
    meter = Meter(meter.state())
    meter.add(torch.tensor(4.0), torch.tensor([[5.0, 1.0]]), torch.tensor([0]))
    assert meter.read() == (pytest.approx(2.0), pytest.approx(2 / 3))
    assert meter.read(lambda sums: 2 * sums) == meter.read()


def test_whole_run_writes_everything_and_repeats(tmp_path: Path) -> None:
    results = Trainer(replace(TINY, out=tmp_path / "first")).run()
    Trainer(replace(TINY, out=tmp_path / "second")).run()
    Trainer(replace(TINY, out=tmp_path / "other", seed=1)).run()
    first = metrics(tmp_path / "first")
    assert [(row["phase"], row["epoch"]) for row in first] == [
        ("FP32", 1),
        ("FP32", 2),
        ("PTQ", 0),
        ("QAT", 1),
        ("QAT", 2),
    ]
    assert [result["phase"] for result in results] == ["FP32", "PTQ", "QAT"]
    assert first == metrics(tmp_path / "second")
    assert first != metrics(tmp_path / "other")
    weights = ["best.safetensors", "fp32.safetensors", "model.safetensors"]
    names = [*weights, "checkpoints", "config.yaml", "curves.png", "environment.json", "metrics.jsonl"]
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == sorted(names)
    assert len(list((tmp_path / "first" / "checkpoints").iterdir())) == 2
    assert (tmp_path / "first" / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in weights:
        first, second, other = ((tmp_path / run / name).read_bytes() for run in ("first", "second", "other"))
        assert first == second != other


def test_fused_and_compressed_training_is_the_same(tmp_path: Path) -> None:
    """Quantizers that compute the ReLU in front of them, bits instead of tensors: equal rows and weights."""
    short = replace(TINY, fp32_epochs=1, epochs=1)
    plain = Trainer(replace(short, out=tmp_path / "plain"))
    less = Trainer(replace(short, out=tmp_path / "less", fuse_activations=True, compress_activations=True))
    plain.run()
    less.run()
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "less")
    assert same_state(plain.model.state_dict(), less.model.state_dict())
    kinds = [type(module).__name__ for module in less.model.modules()]
    assert "FusedActivation" in kinds and "FusedActivation" not in [type(m).__name__ for m in plain.model.modules()]
    codes = [getattr(module, "saves_codes", None) for module in less.model.modules()]
    assert True in codes and True not in [getattr(module, "saves_codes", None) for module in plain.model.modules()]


def test_learning_rate_follows_a_cosine(tmp_path: Path) -> None:
    Trainer(replace(TINY, out=tmp_path / "run", fp32_lr=0.08, lr=0.02)).run()
    rates = [row["lr"] for row in metrics(tmp_path / "run") if row["phase"] != "PTQ"]
    assert rates == pytest.approx([0.08, 0.04, 0.02, 0.01])


def test_checkpoint_replaces_fp32_training(tmp_path: Path) -> None:
    Trainer(replace(TINY, out=tmp_path / "first")).run()
    checkpoint = tmp_path / "first" / "fp32.safetensors"
    Trainer(replace(TINY, out=tmp_path / "second", checkpoint=checkpoint, epochs=0)).run()
    first, second = metrics(tmp_path / "first"), metrics(tmp_path / "second")
    assert [(row["phase"], row["epoch"]) for row in second] == [("FP32", 0), ("PTQ", 0)]
    assert second[0]["test_loss"] == first[1]["test_loss"]
    assert not (tmp_path / "second" / "fp32.safetensors").exists()


def test_fp32_training_learns(tmp_path: Path) -> None:
    trainer = Trainer(Config(out=tmp_path / "run", fp32_epochs=8, device="cpu"))
    untrained, _ = evaluate(trainer.model, trainer.data)
    row = trainer.train_fp32()
    assert untrained > 2 and row["test_loss"] < 0.3 and row["test_accuracy"] > 0.95


def test_optimizers_of_quantized_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(replace(TINY, out=tmp_path / "run", weight_decay=0.1, momentum=0.8))
    trainer.quantize()
    taken: list[torch.optim.Optimizer] = []
    monkeypatch.setattr(trainer, "fit", lambda phase, optimizers, epochs: taken.extend(optimizers))
    trainer.train_quantized()
    sgd, adam = (optimizer.param_groups[0] for optimizer in taken)
    assert (sgd["lr"], sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (0.02, 0.8, False, 0.1)
    assert isinstance(taken[1], torch.optim.Adam) and (adam["lr"], adam["weight_decay"]) == (1e-5, 0)
    owned = [id(parameter) for parameter in (*sgd["params"], *adam["params"])]
    assert sorted(owned) == sorted(id(parameter) for parameter in trainer.model.parameters())


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    trainer = Trainer(replace(TINY, out=tmp_path / "run"))
    trainer.train_fp32()
    trainer.quantize()
    trainer.model.train()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    first = evaluate(trainer.model, trainer.data, batch_size=100)
    assert evaluate(trainer.model, trainer.data, batch_size=7) == pytest.approx(first, rel=1e-3)
    assert same_state(before, trainer.model.state_dict())


@pytest.mark.parametrize("quantizer_lr", [0.0, 1e-3])
def test_scales_have_their_own_optimizer_without_decay(tmp_path: Path, quantizer_lr: float) -> None:
    options = {"lr": 0.01, "weight_decay": 0.1, "quantizer_lr": quantizer_lr, "epochs": 1}
    trainer = Trainer(replace(TINY, out=tmp_path / "run", **options))
    trainer.train_fp32()
    trainer.quantize()
    scales = fastqat.quantizer_parameters(trainer.model)
    scale_ids = {id(scale) for scale in scales}
    weights = [parameter for parameter in trainer.model.parameters() if id(parameter) not in scale_ids]
    before = [parameter.detach().clone() for parameter in (*scales, *weights)]
    trainer.train_quantized()
    changed = [not torch.equal(old, new) for old, new in zip(before, (*scales, *weights), strict=True)]
    assert len(scales) == 16, "one for the weight and one for the input of each of the eight layers"
    assert all(changed[len(scales) :])
    assert all(changed[: len(scales)]) if quantizer_lr else not any(changed[: len(scales)])


@pytest.mark.parametrize(("first_last_bits", "edge"), [(8, (8, 8)), (0, (3, 2))])
def test_bits_reach_the_layers(tmp_path: Path, first_last_bits: int, edge: tuple[int, int]) -> None:
    bits = {"bits_weight": 3, "bits_activation": 2, "first_last_bits": first_last_bits}
    trainer = Trainer(replace(TINY, out=tmp_path / "run", **bits))
    trainer.quantize()
    layers = [module for module in trainer.model.modules() if hasattr(module, "weight_fake_quant")]
    found = [(layer.weight_fake_quant.bits, layer.activation_fake_quant.bits) for layer in layers]
    assert found == [edge] + [(3, 2)] * 6 + [edge]
    values = layers[2].quantized_weight("cpu").flatten(1)
    assert max(len(channel.unique()) for channel in values) <= 8 < len(layers[2].weight[0].unique())


def test_divergence_stops_the_run(tmp_path: Path) -> None:
    trainer = Trainer(replace(TINY, out=tmp_path / "run", fp32_lr=1e30))
    with pytest.raises(FloatingPointError, match="smaller learning rate"):
        trainer.run()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "environment.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="device: wanted a CUDA device"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"


def test_curves_join_the_phases() -> None:
    def row(phase: str, epoch: int, accuracy: float) -> dict[str, Any]:
        return {
            "phase": phase,
            "epoch": epoch,
            "train_loss": 1.0 / epoch if epoch else math.nan,
            "test_accuracy": accuracy,
        }

    rows = [row("FP32", 1, 0.3), row("FP32", 2, 0.9), row("PTQ", 0, 0.6), row("QAT", 1, 0.8), row("QAT", 2, 0.85)]
    loss, accuracy = draw_curves(rows, "title").axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in accuracy.lines}
    assert lines["FP32 training"] == ([1, 2], [0.3, 0.9])
    assert lines["QAT training"] == ([2, 3, 4], [0.6, 0.8, 0.85])
    assert lines["FP32 90.00%"][1] == [0.9, 0.9] and lines["PTQ 60.00%"][1] == [0.6, 0.6]
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2], [3, 4]]
    bottom, top = accuracy.get_ylim()
    assert 0.3 < bottom < 0.6 and top > 0.9


def test_pieces_are_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch in pieces, the last one short, gives the gradient of the whole, one step of time, and the same curve."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    options = {"model": "resume_networks:without_batch_norm", "limit_train": 97, "range": "minmax", "batch_size": 32}
    trainers = []
    for pieces in (1, 5):
        trainers.append(Trainer(replace(TINY, **options, accumulate=pieces, out=tmp_path / str(pieces))))
        trainers[-1].run()
    whole, parts = (trainer.model.state_dict() for trainer in trainers)
    steps = [key for key in whole if key.endswith("_fake_quant.step")]
    assert steps and all(whole[key].item() == parts[key].item() == 2 * 4 for key in steps)
    assert all(torch.allclose(whole[key], parts[key], rtol=1e-4, atol=1e-5) for key in whole)
    for one, other in zip(metrics(tmp_path / "1"), metrics(tmp_path / "5"), strict=True):
        assert one.pop("phase") == other.pop("phase")
        assert one == pytest.approx(other, rel=1e-4, abs=0.003)


def test_average_is_measured_beside_the_weights(tmp_path: Path) -> None:
    """The best weights are the better ones of both; quantized, and of the average where that won."""
    learning = {"limit_train": None, "fp32_epochs": 3, "epochs": 3}
    results = Trainer(replace(TINY, out=tmp_path / "run", ema=0.95, **learning)).run()
    assert "ema_test_accuracy" in results[0] and "ema_test_accuracy" not in results[1]
    quantized = [row for row in metrics(tmp_path / "run") if row["phase"] != "FP32"]
    tests = [row[key] for row in quantized for key in ("test_accuracy", "ema_test_accuracy") if key in row]
    trainer = Trainer(replace(TINY, out=tmp_path / "other"))
    trainer.prepare()
    trainer.model.load_state_dict(import_extra("safetensors.torch").load_file(tmp_path / "run" / "best.safetensors"))
    assert evaluate(trainer.model, trainer.data)[1] == max(tests) > min(tests)


def test_label_smoothing_and_bf16(tmp_path: Path) -> None:
    """Smoothing raises the training loss, not that of the tests; bfloat16 keeps float32 weights and scales."""
    options = {"epochs": 1, "fp32_epochs": 1, "lr": 0.0, "fp32_lr": 0.0, "quantizer_lr": 0.0}
    rows = {}
    for name, change in {"plain": {}, "smooth": {"label_smoothing": 0.5}, "bf16": {"bf16": True}}.items():
        trainer = Trainer(replace(TINY, out=tmp_path / name, **options, **change))
        trainer.run()
        rows[name] = metrics(tmp_path / name)[-1]
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    # With fresh weights all classes are about equally likely: smoothing moves the loss little, but it moves it.
    assert rows["smooth"]["train_loss"] != rows["plain"]["train_loss"]
    assert rows["smooth"]["test_loss"] == rows["plain"]["test_loss"] != rows["bf16"]["test_loss"]
    assert rows["bf16"]["test_loss"] == pytest.approx(rows["plain"]["test_loss"], rel=0.02)


def test_board_shows_every_row_once(tmp_path: Path) -> None:
    """A row for each epoch, under the number of the row in the metrics; a resumed run takes back what comes again."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(TINY, out=tmp_path / "run", tensorboard=True)
    trainer = Trainer(config)
    trainer.train_fp32()
    trainer.measure("QAT", 1)  # a row that no checkpoint knows
    trainer.close()
    trainer = Trainer(config, resume=tmp_path / "run")
    trainer.run()
    trainer.close()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    seen = {(tag.split("/")[0], event.step) for tag in board.Tags()["scalars"] for event in board.Scalars(tag)}
    rows = metrics(tmp_path / "run")
    assert seen == {(row["phase"], number) for number, row in enumerate(rows, 1)}
    shown = {event.step: event.value for event in board.Scalars("QAT/test_loss")}
    assert shown == {n: pytest.approx(row["test_loss"]) for n, row in enumerate(rows, 1) if row["phase"] == "QAT"}


def test_compiled_training_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both trainings run compiled, the quantized one anew; without a compiler's own arithmetic, to the same numbers."""
    compiled: list[str] = []
    original = torch.compile

    def captured(network: torch.nn.Module) -> Any:
        compiled.append(type(network.linear).__module__)
        return original(network, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", captured)
    Trainer(replace(TINY, out=tmp_path / "eager")).run()
    assert compiled == []
    Trainer(replace(TINY, out=tmp_path / "compiled", compile=True)).run()
    assert len(compiled) == 2 and compiled[0].startswith("torch.") and compiled[1].startswith("fastqat.")
    assert metrics(tmp_path / "compiled") == metrics(tmp_path / "eager")
