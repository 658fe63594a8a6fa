"""What is written is whole, whatever happens: damage is seen, a full disk and numbers that explode lose nothing."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TINY, flip, results, undisturbed
from torch import nn

from fastqat import cli
from fastqat.train import checkpoint as checkpoint_module
from fastqat.train import files
from fastqat.train.checkpoint import Checkpoints, Snapshot, pack, unpack
from fastqat.train.diagnosis import first_non_finite
from fastqat.train.training import Training

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("runs") / "whole")


@pytest.mark.parametrize("seed", range(3))
def test_any_damage_is_seen(seed: int) -> None:
    """Any bit of a file, and any length."""
    content = pack(Snapshot({"a": [1.5, None]}, {"x": torch.arange(5.0), "y": torch.tensor(3)}))
    facts, tensors = unpack(content)
    assert facts == {"a": [1.5, None]} and torch.equal(tensors["x"], torch.arange(5.0)) and tensors["y"].item() == 3
    chance = random.Random(seed)
    for _ in range(60):
        position = chance.randrange(len(content))
        for damaged in (flip(content, position), content[:position]):
            with pytest.raises(ValueError, match="wanted"):
                unpack(damaged)


class FullDisk:
    """Lets so many bytes through, then every write fails until there is room."""

    def __init__(self, room: int) -> None:
        self.room = room

    def opened(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = original(path, mode, *args, **options)
            if mode == "wb":
                write = file.write

                def limited(content: bytes) -> int:
                    if len(content) > self.room:
                        write(content[: self.room])
                        self.room = 0
                        raise OSError(errno.ENOSPC, "No space left on device")
                    self.room -= len(content)
                    return write(content)

                file = _Limited(file, limited)
            return file

        return opened


class _Limited:
    def __init__(self, file: Any, write: Callable[[bytes], int]) -> None:
        self.file, self.write = file, write

    def __enter__(self) -> _Limited:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [3_000, 30_000, 300_000, 500_000, 700_000])
def test_full_disk(room: int, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever the disk is full: exit code 1, every file whole, and with room the run goes on to the same bits."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", FullDisk(room).opened(Path.open))
        assert cli.main(["train", *TINY.split(), "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastqat train: [Errno 28] No space left on device") and "Traceback" not in error
    assert error.endswith("what was saved is in run; when that is put right, go on with: fastqat train --resume run\n")
    assert not [path for path in Path("run").rglob("*") if path.name.endswith(".unfinished")]
    for path in Path("run").glob("checkpoints/*"):
        unpack(path.read_bytes())
    assert cli.main(["train", "--resume", "run"]) == 0
    assert results(Path("run")) == results(whole)


def test_disk_full_at_the_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Path, "open", FullDisk(100).opened(Path.open))
    assert cli.main(["train", *TINY.split(), "--out", "runs/run"]) == 2
    assert "out: wanted a folder that can be made; got runs/run (No space left" in capsys.readouterr().err
    assert list(Path("runs").iterdir()) == []


def test_a_file_is_the_old_or_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on the disk before it takes the place of the old one, and the name before anybody relies on it."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *a, n=name, f=original: (calls.append(n), f(*a))[1])
    files.write_file(Path("file"), b"old")
    assert calls == ["fsync", "replace", "fsync"] and Path("file").read_bytes() == b"old"
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        files.write_file(Path("file"), b"new")
    assert [path.name for path in Path().iterdir()] == ["file"] and Path("file").read_bytes() == b"old"


def test_checkpoints_are_few_and_in_order() -> None:
    checkpoints = Checkpoints(Path("folder"))
    assert checkpoints.latest(lambda _: None) is None
    Path("folder").mkdir()
    Path("folder/notes.checkpoint").write_text("not a number: left alone")
    for number in range(12):
        checkpoints.save(Snapshot({"number": number}, {}))
    names = ["00000011.checkpoint", "00000012.checkpoint", "notes.checkpoint"]
    assert sorted(path.name for path in Path("folder").iterdir()) == names
    other = Checkpoints(Path("folder"))
    latest = other.latest(lambda _: None)
    assert latest is not None and latest.facts == {"number": 11}
    other.save(Snapshot({}, {}))
    assert [path.stem for path in other.files()] == ["00000013", "00000012"]


class Poison(nn.Module):
    """Gives an infinity from its so-manieth call on."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.left = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= self.training
        return x / 0 if self.left < 1 else x


def poisoned(num_classes: int, call: int) -> nn.Module:
    """A classifier whose third layer fails."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), Poison(call), nn.Linear(16, num_classes))


def test_non_finite_loss(capsys: pytest.CaptureFixture[str]) -> None:
    """The step and the layer are named; the checkpoint of the step before stays, with finite weights."""
    options = TINY.replace("resume_networks:Dropped", "test_saving:poisoned").split()
    assert cli.main(["train", *options, "--model-options", "call=5", "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert "the training loss is not finite at FP32 step 5 (epoch 2, batch 2): the first layer with a" in error
    assert "non-finite output is 2 (Poison); try a smaller learning rate" in error
    facts, tensors = unpack(Checkpoints(Path("run/checkpoints")).files()[0].read_bytes())
    assert (facts["position"]["epoch"], facts["position"]["batch"], len(facts["rows"])) == (1, 1, 1)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_non_finite_weights_are_not_saved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A finite loss whose gradient is not: the weights are found out before anything is written."""

    def spoil(self: Training, *args: Any) -> Any:
        loss = original(self, *args)
        if self.state.position.batch == 1 and self.state.position.epoch == 1:
            next(self.run.model.parameters()).grad[0] = torch.inf
        return loss

    original = Training._backward
    monkeypatch.setattr(Training, "_backward", spoil)
    assert cli.main(["train", *TINY.split(), "--out", "run"]) == 1
    assert "after FP32 epoch 2, batch 2, 1 weights hold a number that is not finite, the first of them stem.weight" in (
        capsys.readouterr().err
    )
    newest = unpack(Checkpoints(Path("run/checkpoints")).files()[0].read_bytes())
    assert newest.facts["position"]["batch"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in newest.tensors.values())
    assert cli.main(["train", *TINY.split(), "--clip-norm", "1", "--out", "clipped"]) == 1
    assert "the training gradient is not finite at FP32 step 5" in capsys.readouterr().err


def test_first_non_finite_layer() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU())
    x = torch.ones(1, 2)
    assert first_non_finite(net, lambda: net(x)) == "no layer gave such a number when the batch was run again"
    with torch.no_grad():
        net[1].weight[0, 0] = torch.nan
    found = first_non_finite(net, lambda: net(x))
    assert found == "the first layer with a non-finite output is 1 (Linear; so is its weight)"
    assert first_non_finite(net, lambda: net(x / 0)).endswith("is 0 (Linear; so is its input)")
    assert not any(module._forward_hooks for module in net.modules())


def test_format_has_one_home() -> None:
    """The first line is what the documentation says."""
    first = pack(Snapshot({}, {})).split(b"\n")[0].split()
    assert first[:2] == [checkpoint_module.MAGIC, checkpoint_module.FORMAT] and len(first) == 4
