"""Time and ranges under fully_shard and ZeroRedundancyOptimizer: two processes end where one does."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, GradientQSpec, Oscillation, QConfig, QSpec

pytestmark = [
    pytest.mark.usefixtures("one_thread", "in_empty_folder"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"),
]
STEPS = 6
X = torch.randn(STEPS, 8, 6, generator=torch.Generator().manual_seed(0))
TRACKED = QSpec(3, axis=0, oscillation=Oscillation(0.4, 0.9), learn="scale")
HINDSIGHT = QSpec(4, symmetric=False, range="in_hindsight")
CONFIGS = {
    "tracked": QConfig(TRACKED, HINDSIGHT, gradient=GradientQSpec(6, method="in_hindsight")),
    "learned": QConfig(QSpec(3, axis=0), QSpec(4, learn="scale")),  # by the first batch, which is sharded by then
    "noisy": QConfig(QSpec(3, axis=0, estimator="stochastic"), QSpec(4, range="running_minmax")),
}
WAYS = {
    "tracked": ("whole", "parts", "unsharded after forward", "together", "inside another", "zero"),
    "learned": ("whole", "inside another"),
    "noisy": ("parts", "zero"),
}


def network(config: str) -> nn.Module:
    torch.manual_seed(1)
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    return fastqat.prepare(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), block, nn.Linear(8, 4)), CONFIGS[config])


def train(net: nn.Module, zero: bool = False) -> Tensor:
    """Train; the outputs of an evaluation afterwards."""
    options: Any = {"lr": 0.5}
    optimizer: Any
    if zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, **options)
    else:
        optimizer = torch.optim.SGD(net.parameters(), **options)
    for x in X:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        return net(X[0])


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in state.items()}


def sharded(net: nn.Module, way: str) -> nn.Module:
    """The module to call: prepared first, sharded then."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    if way == "parts":
        for part in (net[0], net[2], net[3]):  # type: ignore[index]
            fully_shard(part, mesh=mesh)
    if way == "together":
        fastqat.quantize_weights_together(net)
    outer = nn.Sequential(net) if way == "inside another" else net
    if way != "zero":
        fully_shard(outer, mesh=mesh, reshard_after_forward=way != "unsharded after forward")
    return outer


def train_all(rank: int, port: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("default", module="torch")
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo")
    with pytest.raises(ValueError, match=r"model: wanted a model to shard after it is prepared; got .*'0.weight'"):
        fastqat.prepare(sharded(nn.Sequential(nn.Linear(6, 4)), "whole"), CONFIGS["tracked"])
    for config in CONFIGS:
        for way in WAYS[config]:
            net = network(config)
            outputs = train(sharded(net, way), zero=way == "zero")
            torch.save({**whole(net.state_dict()), "outputs": outputs}, f"{config} {way} {rank}.pt")
    dist.barrier()
    os._exit(0)  # threads of gloo that are still there when the interpreter ends have aborted it


def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    """Counts, tracking, ranges, noise and outputs, to the bit: the batches are the same, and so are the gradients."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    torch.multiprocessing.spawn(train_all, (port,), nprocs=2)
    for config in CONFIGS:
        net = network(config)
        outputs = train(net)
        wanted = {**net.state_dict(), "outputs": outputs}
        assert {int(q.step) for q in net.modules() if isinstance(q, FakeQuant)} == {STEPS}
        for way in WAYS[config]:
            for rank in (0, 1):
                found = torch.load(f"{config} {way} {rank}.pt", weights_only=True)
                assert found.keys() == wanted.keys()
                different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
                assert not different, (config, way, rank)
