"""Two processes do what one does with the same batches; what one of them sees, both know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import fastqat
from fastqat import cli
from fastqat.train.checkpoint import Checkpoints, unpack
from fastqat.train.distributed import Processes, SyncBatchNorm, synchronize_batch_norm
from fastqat.train.extras import import_extra
from fastqat.train.trainer import Trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread", "in_empty_folder"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
]
HERE = Path(__file__).resolve().parent
# 97 = 3 * 32 + 1: the slices of the last batch hold no image and one image.
OPTIONS = "--limit-train 97 --batch-size 32 --fp32-epochs 2 --epochs 1 --calibration-batches 2 --device cpu --threads 1"
OPTIONS += " --range minmax --fp32-lr 0.01 --seed 1"
KINDS = {
    "batch norm": "--model resume_networks:Dropped --model-options dropout=0.0 --ema 0.9 --label-smoothing 0.1",
    "bit-widths": "--model resume_networks:Dropped --model-options dropout=0.0 --adaqat 0.01 --adaqat-lr-weight 3.0 "
    "--adaqat-lr-activation 3.0",
    "pieces": "--model resume_networks:without_batch_norm --accumulate 3 --clip-norm 0.5",
}
TIMES = ("seconds", "images_per_second")


def rows(folder: str) -> list[dict[str, Any]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def in_two_processes(work: Callable[..., None], *arguments: Any, port: str) -> None:
    """Run ``work(*arguments)`` as torchrun would, twice."""
    torch.multiprocessing.spawn(_as_rank, (work, arguments, port), nprocs=2)


def _as_rank(rank: int, work: Callable[..., None], arguments: tuple[Any, ...], port: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    work(*arguments)


def free_port() -> str:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def train_all(runs: dict[str, str]) -> None:
    """Make each run into the folder of its name, and keep the weights and the state of the quantizers of this rank."""
    sys.path.insert(0, str(HERE))
    for name, options in runs.items():
        parsed = vars(cli._parser().parse_args(["train", *options.split(), "--out", name]))
        del parsed["command"]
        trainer = Trainer(cli.make_config(parsed))
        trainer.run()
        torch.save(trainer.model.state_dict(), f"{name} {trainer.processes.rank}.pt")
    trainer.close()


def state_of_both(name: str) -> dict[str, Any]:
    """What both ranks have after a run of :func:`train_all`, which is equal to the bit."""
    ranks = [torch.load(f"{name} {rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys() and all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    return ranks[0]


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Metrics and weights are those of one process, and state is equal to the bit on both ranks."""
    in_two_processes(
        train_all, {f"two {kind}": f"{OPTIONS} {options}" for kind, options in KINDS.items()}, port=free_port()
    )
    load = import_extra("safetensors.torch").load_file
    for kind, options in KINDS.items():
        assert cli.main(["train", *OPTIONS.split(), *options.split(), "--out", f"one {kind}"]) == 0
        for one, two in zip(rows(f"one {kind}"), rows(f"two {kind}"), strict=True):
            assert one.pop("phase") == two.pop("phase")
            assert one == pytest.approx(two, rel=1e-5, abs=0.003), "one of 500 test images may tip over"
        assert state_of_both(f"two {kind}")
        one, two = (load(f"{count} {kind}/model.safetensors") for count in ("one", "two"))
        steps = [key for key in one if key.endswith("fake_quant.step")]
        assert steps and all(one[key].item() == 4 for key in steps), "an optimizer step each, whatever the pieces"
        for key in one:
            torch.testing.assert_close(
                two[key], one[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key} {text}"
            )


def _batch_norm_case() -> None:
    """One step of SyncBatchNorm over uneven slices, one of them empty, against nn.BatchNorm2d in float64."""
    processes = Processes("cpu")
    generator = torch.Generator().manual_seed(0)
    for sizes in ((3, 4), (0, 2), (5, 1)):
        images = torch.randn(sum(sizes), 3, 2, 2, generator=generator) * 3 + 100
        slope = torch.randn(images.shape, generator=generator)
        whole = nn.BatchNorm2d(3, momentum=0.3).double()
        part = synchronize_batch_norm(nn.Sequential(nn.BatchNorm2d(3, momentum=0.3)), torch.device("cpu"))[0]
        assert type(part) is SyncBatchNorm
        with torch.no_grad():
            for module in (whole, part):
                module.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        x = images.double().requires_grad_()
        y = whole(x)
        (y * slope).sum().backward()
        slices = slice(0, sizes[0]) if processes.main else slice(sizes[0], None)
        mine = images[slices].clone().requires_grad_()
        out = part(mine)
        (out * slope[slices]).sum().backward()
        torch.testing.assert_close(out.double(), y[slices], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.grad.double(), x.grad[slices], rtol=1e-3, atol=1e-4)
        total = processes.sum(part.weight.grad.double().clone())
        torch.testing.assert_close(total, whole.weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(part.running_mean.double(), whole.running_mean, rtol=1e-5, atol=0)
        torch.testing.assert_close(part.running_var.double(), whole.running_var, rtol=1e-4, atol=0)
        assert part.num_batches_tracked.item() == 1
        torch.testing.assert_close(
            part.eval()(images),
            nn.functional.batch_norm(images, part.running_mean, part.running_var, part.weight, part.bias),
        )
    alone = synchronize_batch_norm(nn.Sequential(nn.BatchNorm1d(3)), torch.device("cpu"))[0]
    try:  # as nn.BatchNorm1d: the variance of one image would be 0 / 0
        alone(torch.ones(int(processes.main), 3))
    except ValueError as error:
        assert "wanted at least 2 values per channel in all processes; got 1" in str(error)
    else:
        raise AssertionError("a batch of one image was taken")
    assert processes.any(processes.main, False, True) == [True, False, True]
    assert processes.gather(processes.rank) == [0, 1]
    assert processes.once(lambda: os.getpid()) != os.getpid() or processes.main
    try:
        processes.once(lambda: (_ for _ in ()).throw(ValueError("only the main process saw it")))
    except ValueError as error:
        assert str(error) == "only the main process saw it"
    else:
        raise AssertionError("the error of the main process was not raised")
    processes.close()


def test_batch_norm_over_processes() -> None:
    in_two_processes(_batch_norm_case, port=free_port())


def _run_all(commands: list[list[str]], ports: list[str]) -> None:
    sys.path.insert(0, str(HERE))
    for command, port in zip(commands, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        assert cli.main(["train", *command]) == 0


def test_torchrun_stops_and_resumes(tmp_path: Path) -> None:
    """A signal to one process stops both after the same step; both go on to the bits of a run never stopped."""
    options = [*OPTIONS.split(), "--model", "resume_networks:Stopping"]
    package = Path(fastqat.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{package}:{HERE}", "STOP_AT": "6"}
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    command = [*run, "-m", "fastqat", "train", *options, "--out", "stopped"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode, "the run was not stopped"
    assert done.stderr.count("fastqat train: stopped by SIGTERM; go on with: fastqat train --resume stopped\n") == 1
    position = unpack(Checkpoints(Path("stopped/checkpoints")).files()[0].read_bytes()).facts["position"]
    assert (position["phase"], position["epoch"], position["batch"]) == ("FP32", 1, 2)
    commands, ports = [["--resume", "stopped"], [*options, "--out", "whole"]], [free_port(), free_port()]
    in_two_processes(_run_all, commands, ports, port=ports[0])
    assert rows("stopped") == rows("whole")
    for name in ("fp32", "model", "best"):
        files = [Path(f"{folder}/{name}.safetensors").read_bytes() for folder in ("stopped", "whole")]
        assert files[0] == files[1]
