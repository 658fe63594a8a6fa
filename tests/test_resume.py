"""A run that is killed, stopped, cut or refused a write goes on to the same bits as one that never was."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import SMALL, TINY, flip, results, stop_at_step, undisturbed
from torch import nn

from fastqat import cli
from fastqat.train.checkpoint import Checkpoints, Snapshot, pack, unpack
from fastqat.train.config import Config
from fastqat.train.distributed import Processes
from fastqat.train.random_state import random_state, restore_random_state, seed_random
from fastqat.train.run_state import RunState

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")
HERE = Path(__file__).resolve().parent
TRICKY = f"{SMALL} --limit-train 180 --calibration-batches 2 --ema 0.9 --accumulate 2 --warmup-epochs 1 --save-steps 2"
TRICKY += " --reestimate-bn always --bn-batches 3"
TRICKY += " --track-oscillations --oscillation-momentum 0.05 --freeze-threshold 0.11 --freeze-threshold-start 0.2"
TRICKY += " --dampening 0.1 --bin-regularization 0.001 --first-last-bits 0 --lr 0.3"  # all of it has something to do


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("runs") / "whole")


def test_kills_at_any_moment(tmp_path: Path) -> None:
    """24 kills at random moments, and one at each of the moments that might be worst; see killing.py."""
    options = [*TRICKY.split(), "--fp32-epochs", "8", "--epochs", "8"]
    command = [sys.executable, str(HERE / "killing.py"), str(tmp_path), "24", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["killed"] == 24
    for kind in ("whole", "short"):
        wanted = results(tmp_path / kind)
        assert kind == "short" or wanted[0][-1]["frozen"] > 0
        killed = list(tmp_path.glob(f"{kind}-killed*"))
        assert len(killed) >= (1 if kind == "whole" else told["chosen"])
        for folder in killed:
            assert results(folder) == wanted, folder
            left = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
            assert sorted(left) == sorted(path.name for path in (tmp_path / kind).iterdir())
            for name in ("steps.jsonl", "epochs.jsonl"):
                recorded, whole = ((each / "oscillations" / name).read_text() for each in (folder, tmp_path / kind))
                assert recorded == whole, folder
            assert len(list((folder / "checkpoints").glob("*.checkpoint"))) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", [2, 6, 8, 12])  # within FP32, its last, within QAT, its last
def test_signals_save_first(
    number: int, code: int, step: int, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at_step(patch, step, lambda: signal.raise_signal(number))
        options = [*TINY.replace("--save-steps 1", "").split(), "--out", "a run"]
        assert cli.main(["train", *options]) == code
    assert signal.getsignal(number) is handler
    name = signal.Signals(number).name
    error = capsys.readouterr().err
    assert error == f"fastqat train: stopped by {name}; go on with: fastqat train --resume 'a run'\n"
    saved = unpack(Checkpoints(Path("a run/checkpoints")).files()[0].read_bytes()).facts["position"]
    phase, step = ("FP32", step) if step <= 6 else ("QAT", step - 6)
    assert (saved["phase"], saved["epoch"], saved["batch"]) == (phase, (step - 1) // 3, (step - 1) % 3 + 1)
    assert cli.main(["train", "--resume", "a run", "--save-seconds", "0"]) == 0
    assert results(Path("a run")) == results(whole)


def test_a_signal_is_answered_at_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Before the step, or a test of minutes, is over: whoever waits knows what for, and how not to."""
    stop_at_step(monkeypatch, 2, lambda: (signal.raise_signal(signal.SIGTERM), signal.raise_signal(signal.SIGTERM)))
    assert cli.main(["train", *TINY.split(), "--out", "run"]) == 143
    answer, stopped = capfd.readouterr().err.split("\n")[1:3]
    assert answer == "fastqat train: SIGTERM: finishes and saves the running step or test; Ctrl-C again stops at once"
    assert stopped.startswith("fastqat train: stopped by SIGTERM")


def test_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop_at_step(monkeypatch, 2, twice)
    assert cli.main(["train", *TINY.split(), "--out", "run"]) == 130
    assert len(list(Path("run/checkpoints").iterdir())) == 1


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda c: b"", "wanted a checkpoint of a run; got a file of another kind"),
    "cut": (lambda c: c[:-1], "it is cut or damaged"),
    "half": (lambda c: c[: len(c) // 2], "it is cut or damaged"),
    "longer": (lambda c: c + b"\0", "it is cut or damaged"),
    "first bit": (lambda c: flip(c, 0), "got a file of another kind, or its first bytes are damaged"),
    "sum": (lambda c: flip(c, 60), "damaged"),
    "names": (lambda c: flip(c, 300), "got others: it is damaged"),
    "middle": (lambda c: flip(c, len(c) // 2), "got others: it is damaged"),
    "last": (lambda c: flip(c, len(c) - 1), "got others: it is damaged"),
    "format": (lambda c: c.replace(b"checkpoint 1 ", b"checkpoint 2 ", 1), "wanted format 1; got format 2"),
    "pickle": (lambda c: b"\x80\x02}q\x00.", "got a file of another kind"),
    "other run": (
        lambda c: pack(Snapshot({**unpack(c).facts, "config": {**unpack(c).facts["config"], "lr": 0.5}}, {})),
        "wanted a checkpoint of a run with lr 0.02; got 0.5",
    ),
}


@pytest.fixture
def stopped(whole: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped in the middle of QAT, with two checkpoints."""
    with monkeypatch.context() as patch:
        stop_at_step(patch, 10, lambda: signal.raise_signal(signal.SIGINT))
        assert cli.main(["train", *TINY.split(), "--out", "run"]) == 130
    return Path("run")


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint(
    damage: Callable[[bytes], bytes], message: str, stopped: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, older = Checkpoints(stopped / "checkpoints").files()
    newest.write_bytes(damage(newest.read_bytes()))
    capsys.readouterr()
    assert cli.main(["train", "--resume", "run"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"refused {newest}: wanted") and message in line
    assert results(stopped) == results(whole)


def test_checkpoint_that_the_disk_does_not_give(
    stopped: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged sector is a damaged checkpoint: the one before it is used."""
    newest = Checkpoints(stopped / "checkpoints").files()[0]
    original = Path.read_bytes

    def read(path: Path) -> bytes:
        if path == newest:
            raise OSError(errno.EIO, "Input/output error")
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        assert cli.main(["train", "--resume", "run"]) == 0
    assert f"refused {newest}: [Errno 5] Input/output error" in capsys.readouterr().out
    assert results(stopped) == results(whole)


def test_network_that_is_another_by_now(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A module of the user that was changed between: what differs is named, and nothing happens."""
    monkeypatch.syspath_prepend(".")
    Path("changing.py").write_text("from resume_networks import Dropped as make")
    options = TINY.replace("resume_networks:Dropped", "changing:make").split()
    with monkeypatch.context() as patch:
        stop_at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert cli.main(["train", *options, "--out", "run"]) == 130
    monkeypatch.delitem(sys.modules, "changing")
    Path("changing.py").write_text("from resume_networks import without_batch_norm as make  # of another length")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.main(["train", "--resume", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastqat train: error: model changing:make: wanted the network of the checkpoint; got ")
    assert error.count("\n") == 1 and 'Missing key(s) in state_dict: "0.weight"' in error
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_options_of_a_network_need_not_be_those_of_json(tmp_path: Path) -> None:
    """JSON knows no integers as keys, and YAML does: a run still knows its own checkpoints."""
    options = {"stages": {1: 16, 2: 32}, "threshold": float("nan")}
    state = RunState(Config(model_options=options), nn.Linear(2, 2), Processes("cpu"))
    state.check(unpack(pack(state.snapshot([]))))
    other = RunState(Config(model_options={**options, "stages": {1: 16, 2: 31}}), nn.Linear(2, 2), Processes("cpu"))
    with pytest.raises(ValueError, match="wanted a checkpoint of a run with model_options"):
        other.check(unpack(pack(state.snapshot([]))))


def test_no_good_checkpoint(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (stopped / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert cli.main(["train", "--resume", "run"]) == 2
    output = capsys.readouterr()
    assert output.out.count("refused run/checkpoints/") == 2
    assert "run/checkpoints: wanted a checkpoint that can be used; got 2 that cannot" in output.err
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_finished_run_only_draws_again(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, "run")
    Path("run/curves.png").unlink()
    assert cli.main(["train", "--resume", "run"]) == 0
    assert results(Path("run")) == results(whole) and Path("run/curves.png").exists()
    assert "goes on with run: all is done, but for the curves" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--resume", "absent"], "resume absent: wanted the folder of a run; got no config.yaml there"),
        (
            ["--resume", "run", "--lr", "1"],
            "resume run: wanted no option but root, compress_activations, coverage, record_quantizers, device,",
        ),
        (["--resume", "run", "--recipe", "digits"], "got recipe, which decides the numbers"),
    ],
)
def test_mistakes(argv: list[str], message: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole, "run")
    assert cli.main(["train", *argv]) == 2
    assert message in capsys.readouterr().err and results(Path("run")) == results(whole)


def test_random_numbers_come_back() -> None:
    device = torch.device("cpu")
    seed_random(5)
    random.gauss(0, 1), np.random.randn()  # leaves half a pair of normal numbers behind in both
    state = json.loads(json.dumps(random_state(device)))

    def draw() -> list[float]:
        return [torch.rand(()).item(), torch.randn(()).item(), *np.random.randn(3), random.random(), random.gauss(0, 1)]

    first = draw()
    assert draw() != first
    restore_random_state(state, device)
    assert draw() == first


def test_another_number_of_processes(capsys: pytest.CaptureFixture[str]) -> None:
    """The sums of two processes go to the main one of one, and it says that the bits may differ."""
    state = RunState(Config(), nn.Linear(2, 2), Processes("cpu"))
    saved = state.snapshot([])
    own = saved.facts["processes"][0]
    saved.facts["processes"] = [{**own, "meter": [2, 3.0, 1]}, {**own, "meter": [1, 0.5, 1]}]
    state.restore(saved, prepare=lambda: None)
    assert state.meter.state() == [3, 3.5, 2]
    assert "saved by 2 processes, goes on with 1: not to the bit" in capsys.readouterr().out
