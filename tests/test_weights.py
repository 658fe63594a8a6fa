"""Weights in files: what comes back, and which files are refused, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastqat import models
from fastqat.train.extras import import_extra
from fastqat.train.weights import load_weights, to_safetensors


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nested", [False, True])
def test_checkpoint_loads(tmp_path: Path, prefix: str, nested: bool) -> None:
    source, target = models.build("resnet20"), models.build("resnet20")
    # Like the public checkpoints, this one has no batch counters.
    state = {prefix + key: value for key, value in source.state_dict().items() if "num_batches" not in key}
    torch.save({"best_prec1": 91.7, "state_dict": state} if nested else state, tmp_path / "weights.th")
    load_weights(target, tmp_path / "weights.th")
    assert same_state(source.state_dict(), target.state_dict())


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "digits.pt"
    torch.save(models.build("digits").state_dict(), path)
    model = models.build("resnet20")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(model, path)
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
        load_weights(models.build("resnet20"), tmp_path / "weights.pt")


@pytest.mark.parametrize("content", [b"", b"these are no weights", b"\x80\x02}q\x00.", None])
def test_checkpoint_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "weights.pt"
    torch.save(models.build("digits").state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ValueError, match=f"checkpoint {path}: wanted"):
        load_weights(models.build("digits"), path)


def test_checkpoint_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        load_weights(models.build("digits"), tmp_path / "absent.pt")


def test_safetensors_of_any_memory(tmp_path: Path) -> None:
    """Tied, strided and channels-last weights come back equal."""
    tied = torch.randn(4, 3)
    state = {"a": tied, "b": tied, "c": tied.t(), "d": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    path = tmp_path / "weights.safetensors"
    path.write_bytes(to_safetensors(state))
    assert same_state(import_extra("safetensors.torch").load_file(path), state)


def test_weights_of_a_safetensors_file(tmp_path: Path) -> None:
    source, target = models.build("digits"), models.build("digits")
    path = tmp_path / "weights.safetensors"
    path.write_bytes(to_safetensors(source.state_dict()))
    load_weights(target, path)
    assert same_state(source.state_dict(), target.state_dict())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"checkpoint {path}: wanted weights written by safetensors; got"):
        load_weights(target, path)
