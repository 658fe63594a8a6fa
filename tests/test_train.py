"""The trainer: checkpoints, the run folder, and whole runs on a few digits."""

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
from fastqat import models
from fastqat.train.checkpoint import load_checkpoint
from fastqat.train.config import Config, make_config
from fastqat.train.curves import draw_curves
from fastqat.train.progress import Meter
from fastqat.train.run_folder import RunFolder
from fastqat.train.trainer import Trainer, choose_device, evaluate

TINY = Config(limit_train=192, fp32_epochs=2, epochs=2, calibration_batches=2, device="cpu")
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


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nested", [False, True])
def test_checkpoint_loads(tmp_path: Path, prefix: str, nested: bool) -> None:
    source, target = models.build("resnet20"), models.build("resnet20")
    # Like the public checkpoints, this one has no batch counters.
    state = {prefix + key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    torch.save({"best_prec1": 91.7, "state_dict": state} if nested else state, tmp_path / "weights.th")
    load_checkpoint(target, tmp_path / "weights.th")
    assert same_state(source.state_dict(), target.state_dict())


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "digits.pt"
    torch.save(models.build("digits").state_dict(), path)
    model = models.build("resnet20")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_checkpoint(model, path)
    message = str(caught.value)
    assert message.startswith(
        f"checkpoint {path}: wanted the weights of ResNet; got 95 missing: conv1.weight, bn1.weight,"
    )
    assert "unexpected: stem.0.weight, stem.1.weight" in message
    assert same_state(before, model.state_dict())


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "shape": (
        {"linear.weight": torch.zeros(7, 64)},
        r"got 1 of another shape: linear.weight \(wanted \[10, 64\], got \[7, 64\]\)$",
    ),
    "missing": ({"linear.bias": None}, "got 1 missing: linear.bias$"),
    "unexpected": ({"extra": torch.zeros(1)}, "got 1 unexpected: extra$"),
    "no tensor": ({"epoch": 3}, "wanted a state_dict"),
}


@pytest.mark.parametrize(("change", "message"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_checkpoint_with_one_difference(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {**models.build("resnet20").state_dict(), **change}
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(models.build("resnet20"), tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [b"", b"these are no weights", b"\x80\x02}q\x00.", None])
def test_checkpoint_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "weights.pt"
    torch.save(models.build("digits").state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ValueError, match=f"checkpoint {path}: wanted"):
        load_checkpoint(models.build("digits"), path)


def test_checkpoint_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        load_checkpoint(models.build("digits"), tmp_path / "absent.pt")


def test_run_folder_keeps_the_old_file_when_a_write_fails(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a" / "run", TINY)
    folder.add_metrics({"loss": 1.5})
    with pytest.raises(TypeError):
        folder.add_metrics({"loss": object()})

    class BrokenFigure:
        def savefig(self, file: Path, **_: Any) -> None:
            file.write_bytes(b"half a picture")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.save_figure(BrokenFigure(), "curves.png")
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.json", "metrics.jsonl"]
    assert json.loads((folder.path / "metrics.jsonl").read_text()) == {"loss": 1.5}
    assert json.loads((folder.path / "config.json").read_text())["limit_train"] == 192


def test_run_folder_takes_no_folder_that_exists(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(FileExistsError, match="does not exist yet; got .*run"):
        RunFolder(tmp_path / "run", TINY)


def test_recipe_gives_way_to_options() -> None:
    assert make_config({}) == Config()
    cifar = make_config({"data": "cifar10", "lr": 0.5})
    assert (cifar.model, cifar.bits_weight, cifar.batch_size, cifar.lr) == ("resnet20", 4, 128, 0.5)


def test_meter() -> None:
    meter = Meter()
    meter.add(torch.tensor(1.0), torch.tensor([[0.0, 1.0], [3.0, 2.0]]), torch.tensor([1, 1]))
    meter.add(torch.tensor(4.0), torch.tensor([[5.0, 1.0]]), torch.tensor([0]))
    assert meter.read() == (pytest.approx(2.0), pytest.approx(2 / 3))


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
    names = ["config.json", "curves.png", "fp32.pt", "metrics.jsonl", "model.pt"]
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == names
    assert (tmp_path / "first" / "curves.png").read_bytes().startswith(b"\x89PNG")
    weights = [torch.load(tmp_path / run / "model.pt", weights_only=True) for run in ("first", "second", "other")]
    assert same_state(weights[0], weights[1]) and not same_state(weights[0], weights[2])


def test_learning_rate_follows_a_cosine(tmp_path: Path) -> None:
    Trainer(replace(TINY, out=tmp_path / "run", fp32_lr=0.08, lr=0.02)).run()
    rates = [row["lr"] for row in metrics(tmp_path / "run") if row["phase"] != "PTQ"]
    assert rates == pytest.approx([0.08, 0.04, 0.02, 0.01])


def test_checkpoint_replaces_fp32_training(tmp_path: Path) -> None:
    Trainer(replace(TINY, out=tmp_path / "first")).run()
    checkpoint = tmp_path / "first" / "fp32.pt"
    Trainer(replace(TINY, out=tmp_path / "second", checkpoint=checkpoint, epochs=0)).run()
    first, second = metrics(tmp_path / "first"), metrics(tmp_path / "second")
    assert [(row["phase"], row["epoch"]) for row in second] == [("FP32", 0), ("PTQ", 0)]
    assert second[0]["test_loss"] == first[1]["test_loss"]
    assert not (tmp_path / "second" / "fp32.pt").exists()


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
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


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
