"""Data-parallel training: the processes of torchrun, and batch normalisation over all of them.

Each process takes a slice of every batch. Gradients are averaged by DistributedDataParallel; buffers are equal
everywhere because every process computes the same from the same numbers, so that none of them is ever broadcast:
state of quantizers by their step counts, statistics of BN because they are those of the whole batch, ranges that follow
activations because they hold those of all processes, and the grids of gradients because what each process has seen of
its own is put together after every step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fastqat.nn.gradient import GradientFakeQuant

T = TypeVar("T")


class Processes:
    """This process among those that train together; alone if torchrun did not start it.

    Args:
        device: "cpu" or "cuda"; each process of a machine takes a GPU of its own.

    Raises:
        ValueError: a GPU is wanted, and there are fewer than processes.
    """

    def __init__(self, device: str) -> None:
        local = int(os.environ.get("LOCAL_RANK", 0))
        if device == "cuda" and local >= torch.cuda.device_count():
            raise ValueError(f"device: wanted one GPU for each process; got {torch.cuda.device_count()}")
        self.device = torch.device(device, local) if device == "cuda" else torch.device(device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            if device == "cuda":
                torch.cuda.set_device(self.device)
            # Words and decisions go by gloo: they must not wait for the GPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    @property
    def main(self) -> bool:
        """True for the one process that writes and prints."""
        return self.rank == 0

    def any(self, *facts: bool) -> list[bool]:
        """Return each fact as true if it is so in any process."""
        if self.world_size == 1:
            return list(facts)
        flags = torch.tensor(facts, dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a float64 tensor over all processes."""
        if self.world_size > 1:
            values = values.cpu().clone()
            dist.all_reduce(values)
        return values

    def gather(self, fact: T) -> list[T]:
        """Return what each process has, by rank."""
        if self.world_size == 1:
            return [fact]
        facts: list[Any] = [None] * self.world_size
        dist.all_gather_object(facts, fact)
        return facts

    def once(self, work: Callable[[], T]) -> T:
        """Do something in the main process alone, and return its result, or raise its error, in all of them."""
        if self.world_size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.main:
            try:
                outcome[0] = work()
            except Exception as error:  # the others wait for an answer, whatever it is
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def meet(self) -> None:
        """Wait until all of them are here."""
        if self.world_size > 1:
            dist.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the network that averages gradients over the processes; the same one where there are no others."""
        if self.world_size == 1:
            return model
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def merge_gradient_grids(self, model: nn.Module) -> None:
        """Let the grids of gradients be the same everywhere, and move by what all processes have seen; after a step.

        Counts are added, ranges of the next step widened. What a first gradient or a search has set, and a range that
        holds the gradient in hand, is that of the main process.
        """
        if self.world_size == 1:
            return
        quantizers = [m for m in model.modules() if isinstance(m, GradientFakeQuant)]

        def tensors(*names: str) -> list[Tensor]:
            return [b for q in quantizers for name in names if (b := q._buffers.get(name)) is not None]

        lows = tensors("new_low")
        torch._foreach_neg_(lows)
        for state, work in (
            (tensors("beyond", "seen"), dist.all_reduce),
            ([*lows, *tensors("new_high")], lambda flat: dist.all_reduce(flat, dist.ReduceOp.MAX)),
            (tensors("gamma", "range_low", "range_high"), lambda flat: dist.broadcast(flat, 0)),
        ):
            if state:
                flat = torch.cat(state)
                work(flat)
                torch._foreach_copy_(state, flat.split(1))
        torch._foreach_neg_(lows)

    def close(self) -> None:
        """Leave the other processes."""
        if dist.is_initialized():
            dist.destroy_process_group()


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation with the statistics of all processes, from differentiable sums: torch's needs a GPU.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias`` with mean and biased variance over the batches of all
    processes; one of them may be empty.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm: wanted an input of at least 2 dimensions; got {input.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, ...] -> the same shape."""
        if not (self.training or self.running_mean is None):
            return super().forward(x)
        self._check_input_dim(x)
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        values = x.float()
        count = torch.tensor([x.numel() / x.shape[1]], dtype=torch.float32, device=x.device)
        sums: Tensor = _AllReduce.apply(torch.cat([values.sum(dims), count]))
        total = sums[-1].detach()
        if total == 1:  # its variance is 0 / 0
            raise ValueError("batch norm: wanted at least 2 values per channel in all processes; got 1")
        mean = sums[:-1] / total
        centred = values - mean.view(shape)
        # Two sums one after the other: the difference of two large ones would lose what the variance is.
        var: Tensor = _AllReduce.apply(centred.square().sum(dims)) / total
        self._follow(mean.detach(), var.detach(), total)
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    def _follow(self, mean: Tensor, var: Tensor, total: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * total / (total - 1), momentum)


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let the batch normalisations of a network use the statistics of all processes.

    Args:
        model: changed in place as far as that is possible; its parameters and state_dict keys stay.
        device: where it trains.

    Returns:
        The network, another object only if it is a batch normalisation itself.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = SyncBatchNorm
    return model
