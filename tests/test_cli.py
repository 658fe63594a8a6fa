"""The command line: what it prints, its exit codes, and that a mistake leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import fastqat
from fastqat import cli, models
from fastqat.train import extras
from fastqat.train.config import Config
from fastqat.train.run import default_folder

TINY = ["--limit-train", "128", "--fp32-epochs", "1", "--epochs", "1", "--calibration-batches", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_empty_folder_and_with_the_same_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must end with exit code 2 and one message; return the message."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse
        code = stop.code
    output = capsys.readouterr()
    assert code == 2 and output.out == ""
    assert "Traceback" not in output.err
    return output.err.splitlines()[-1]


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastqat", *argv], capture_output=True, text=True, check=False, timeout=120
    )


def test_train_as_a_process(tmp_path: Path) -> None:
    result = run("train", *TINY, "--bits-weight", "3", "--bits-activation", "5")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-digits-w3a5-")
    assert str(Path("runs") / folder.name) in result.stdout.splitlines()[-1]
    config = extras.import_extra("yaml").safe_load((folder / "config.yaml").read_text())
    assert (config["bits_weight"], config["bits_activation"], config["epochs"]) == (3, 5, 1)
    phases = [json.loads(line)["phase"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert phases == ["FP32", "PTQ", "QAT"]
    assert all(phase in result.stdout and "top-1" in result.stdout for phase in phases)


def test_mistake_as_a_process(tmp_path: Path) -> None:
    result = run("train", "--data", "cifar10", "--root", "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "fastqat train: error: CIFAR-10, binary version: wanted the file nowhere/data_batch_1.bin; it does not exist\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_status_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    shown = {words[0]: words[1] for words in lines if len(words) == 2}
    assert shown["torch"] == torch.__version__
    for backend, state in fastqat.status().items():
        assert shown[backend] == state


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bits-weight", "9"], "--bits-weight: wanted an integer from 1 to 8; got '9'"),
        (["--bits-weight", "0"], "--bits-weight: wanted an integer from 1 to 8; got '0'"),
        (["--bits-activation", "-1"], "--bits-activation: wanted an integer from 0 to 8; got '-1'"),
        (["--bits-activation", "4.5"], "--bits-activation: wanted an integer from 0 to 8; got '4.5'"),
        (["--first-last-bits", "16"], "--first-last-bits: wanted an integer from 0 to 8; got '16'"),
        (["--lr", "fast"], "--lr: wanted a number of at least 0; got 'fast'"),
        (["--lr", "nan"], "--lr: wanted a number of at least 0; got 'nan'"),
        (["--weight-decay=-1"], "--weight-decay: wanted a number of at least 0; got '-1'"),
        (["--batch-size", "0"], "--batch-size: wanted an integer of at least 1; got '0'"),
        (["--data", "mnist"], "--data: wanted one of digits, cifar10, fashion-mnist, folder; got 'mnist'"),
        (["--range", "guess"], "--range: wanted one of minmax, running_minmax, percentile, mse, "),
        (["--speed", "11"], "unknown option 'speed'; did you mean 'seed'?"),
        (["--batchsize=3"], "unknown option 'batchsize'; did you mean 'batch-size'?"),
        (["--resum", "run"], "resume run: wanted the folder of a run; got no config.yaml there"),  # argparse completes
        (["--recipes", "mine.yaml"], "unknown option 'recipes'; did you mean 'recipe'?"),
        (["--learning-rate", "1"], "unknown option 'learning-rate'; all are in fastqat train --help"),
        (["cifar10"], "unrecognized arguments: cifar10"),
        (["--model", "resnet21"], "got 'resnet21'; did you mean 'resnet20'?"),
        (["--model", "resnet20"], "model resnet20: wanted a network that turns images of shape (1, 8, 8)"),
        (["--checkpoint", "absent.pt"], "checkpoint absent.pt: wanted a file; got nothing there"),
        (["--checkpoint", "."], "checkpoint .: wanted a file; got a folder"),
        (["--data", "cifar10"], "data cifar10: wanted --root DIR"),
    ],
)
def test_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: list[str], message: str) -> None:
    assert message in refused(capsys, "train", *argv)
    assert list(tmp_path.iterdir()) == []


UNFIT = """
import torch
from torch import nn

class Matmul(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, num_classes))

    def forward(self, x):
        return x.flatten(1) @ self.weight

class Aside(Matmul):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.linear, self.unused = nn.Linear(num_classes, num_classes), nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(super().forward(x))
"""


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("Matmul", "model: wanted a model with layers that can be quantized"),
        ("Aside", "which these saw none: unused.weight_fake_quant, unused.activation_fake_quant"),
    ],
)
def test_network_that_cannot_be_quantized(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, message: str
) -> None:
    """It is refused before FP32 training, and not after."""
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("unfit.py").write_text(UNFIT)
    for bits in ("3", "0"):  # of activations
        argv = ["--model", f"unfit:{network}", "--bits-activation", bits, "--out", "run"]
        assert message in refused(capsys, "train", *argv)
        assert not Path("run").exists()


def test_broken_image(capsys: pytest.CaptureFixture[str]) -> None:
    """It shows when its batch comes: one message names it, and the run goes on when it is mended."""
    for split, name in itertools.product(("train", "val"), ("bee", "cat")):
        folder = Path("images") / split / name
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 20), (80 * number, 0, 200)).save(folder / f"{number}.png")
    broken = Path("images/val/cat/1.png")
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    options = ["--data", "folder", "--root", "images", "--image-size", "32", "--model", "resnet20", "--workers", "1"]
    assert cli.main(["train", *TINY, *options, "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fastqat train: {broken}: wanted an image that Pillow can read; got ")
    assert error.endswith("is in run; when that is put right, go on with: fastqat train --resume run\n")
    broken.write_bytes(whole)
    assert cli.main(["train", "--resume", "run"]) == 0


def test_runs_of_the_same_moment_have_folders_of_their_own() -> None:
    """As those of a sweep that a shell starts at once."""
    assert len({default_folder(Config()) for _ in range(20)}) > 1


def test_every_phase_shows_what_it_has_reached(capsys: pytest.CaptureFixture[str]) -> None:
    """PTQ too, and weights that were only loaded: before the training that follows, and not at the end of it."""
    assert cli.main(["train", *TINY, "--out", "run"]) == 0
    capsys.readouterr()
    assert cli.main(["train", *TINY, "--checkpoint", "run/fp32.safetensors"]) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    reached = [f"{row['phase']}  test {row['test_loss']:.4f} {row['test_accuracy']:7.2%}" for row in rows[:2]]
    lines = [line for line in capsys.readouterr().out.splitlines() if "better on training images" not in line]
    assert lines[1] == reached[0] and lines[2].startswith(f"{reached[1]}  re-estimated ")
    assert lines[3].startswith("QAT epoch 1/1")


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'fly'" in refused(capsys, "fly")
    assert "required: command" in refused(capsys)
    assert "unrecognized arguments: --lr 1" in refused(capsys, "status", "--lr", "1")


def test_a_wrong_option_is_not_buried(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--lr", "fast"])
    assert len(capsys.readouterr().err.splitlines()) <= 2, "all options are in --help"


def test_checkpoint_of_another_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.save(models.build("resnet20").state_dict(), "resnet.pt")
    message = refused(capsys, "train", "--checkpoint", "resnet.pt")
    assert "checkpoint resnet.pt: wanted the weights of DigitsNet; got" in message and "stem.0.weight" in message
    assert [path.name for path in tmp_path.iterdir()] == ["resnet.pt"]


def test_truncated_cifar(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        with open(name, "wb") as file:
            file.truncate(30_730_000 if name != "data_batch_3.bin" else 30_720_000)  # sparse: takes no room
    message = refused(capsys, "train", "--data", "cifar10", "--root", ".")
    assert message.endswith("data_batch_3.bin: wanted 30730000 bytes (10000 records of 3073); got 30720000 bytes")
    assert not (tmp_path / "runs").exists()


def test_out_that_cannot_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("file").write_text("content")
    assert "out: wanted a folder that can be made; got file/run" in refused(capsys, "train", "--out", "file/run")
    assert "out: wanted a folder that does not exist yet; got file" in refused(capsys, "train", "--out", "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and Path("file").read_text() == "content"


def test_missing_extra_names_the_pip_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # makes the import fail
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(ImportError):
        extras.import_extra("matplotlib.figure")
    assert "pip install 'fastqat[train]'" in refused(capsys, "train", *TINY)
    assert list(tmp_path.iterdir()) == []


def test_divergence_fails_with_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *TINY, "--fp32-lr", "1e30", "--out", "run"]) == 1
    error = capsys.readouterr().err
    assert "smaller learning rate" in error and "is in run" in error and "Traceback" not in error


def test_the_command_line_imports_no_extra() -> None:
    names = ("rich", "matplotlib", "sklearn", "yaml", "safetensors", "PIL", "tensorboard")
    check = f"import sys, fastqat.cli; fastqat.cli._parser(); print([n for n in {names} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr
