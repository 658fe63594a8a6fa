"""Ranges over two processes: those of all batches, and the same to the bit in both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_distributed import free_port, in_two_processes
from torch import Tensor, nn

import fastqat
from fastqat import FakeQuant, ranges

HERE = Path(__file__).resolve().parent
BATCHES = [(1 + k) * torch.randn(4, 50, generator=torch.Generator().manual_seed(k)) + 0.3 for k in range(4)]
# The second process alone sees negative values, and what is rare.
OF_RANKS: list[list[Any]] = [[(x.abs(),) for x in BATCHES[:3]], [(BATCHES[3],), (BATCHES[0].abs(), True)]]
OPTIONS: dict[str, dict[str, Any]] = {
    f"{name} {kind}": {"range": name, **options}
    for name in (*ranges.ESTIMATORS, *ranges.OF_LOGITS)
    for kind, options in {
        "tensor": {},
        "affine": {"symmetric": False},
        "channel": {"axis": 0},
    }.items()
    if not (kind == "affine" and name in ranges.SYMMETRIC) and not (kind == "channel" and name in ranges.OF_LOGITS)
}


class Net(nn.Module):
    """A quantizer of each kind, and one that only some batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(FakeQuant(4, percentile=98.0, **options) for options in OPTIONS.values())
        self.rare = FakeQuant(4, range="minmax")

    def forward(self, x: Tensor, rare: bool = False) -> None:
        for quantizer in self.each:
            quantizer(x)
        if rare:
            self.rare(x)


def calibrated(batches: list[Any], **options: Any) -> Net:
    """A net that has seen these batches."""
    net = Net()
    return fastqat.calibrate(net, batches, forward=lambda net, batch: net(*batch), **options)


def _calibrate_all() -> None:
    torch.distributed.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(calibrated(OF_RANKS[rank]).state_dict(), f"{rank}.pt")
    alone = calibrated([(BATCHES[rank], True)], distributed=False)
    assert alone.rare.scale.item() == pytest.approx(BATCHES[rank].abs().max().item() / 7)
    _errors(rank)
    _merged(rank)
    dist.destroy_process_group()


def _errors(rank: int) -> None:
    """What goes wrong in one process ends all of them, and leaves no quantizer observing."""
    net = Net()
    batches = [(BATCHES[0], True), (BATCHES[1] if rank else "not a tensor",)]
    with pytest.raises(RuntimeError if rank else Exception) as caught:
        fastqat.calibrate(net, batches, forward=lambda net, batch: net(*batch))
    assert ("got an error in another" in str(caught.value)) is (rank == 1), str(caught.value)
    assert not any(q._calibrating for q in net.modules() if isinstance(q, FakeQuant))
    with pytest.raises(ValueError, match="got 2 batches, in which these saw none: rare$"):
        calibrated([(BATCHES[rank],)])


def _merged(rank: int) -> None:
    """The bounds of all; a process without data has none. What came in stays as it was."""
    low = torch.tensor([[-1.0, 2, torch.inf], [-3, 4, 5]])[rank]
    high = torch.tensor([[1.0, 3, -torch.inf], [0, 6, 7]])[rank]
    assert [bound.tolist() for bound in ranges.merged(low, high)] == [[-3, 2, 5], [1, 6, 7]]
    assert low[0] == (-1, -3)[rank]


def _in_process() -> None:
    sys.path.insert(0, str(HERE))
    _calibrate_all()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.usefixtures("one_thread", "in_empty_folder")
def test_two_processes_have_the_ranges_of_all_batches() -> None:
    """Bit for bit where the order of tensors does not count, to a rounding where it does."""
    in_two_processes(_in_process, port=free_port())
    ranks = [torch.load(f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    one = calibrated(OF_RANKS[0] + OF_RANKS[1]).state_dict()
    assert ranks[0]["rare.qrange"].tolist() == [0, 15]
    for index, (kind, options) in enumerate(OPTIONS.items()):
        assert kind.endswith("affine") or ranks[0][f"each.{index}.qrange"].tolist() == [-8, 7]
        if options["range"] == "running_minmax":
            scale = _running_scale(index, options)
            torch.testing.assert_close(ranks[0][f"each.{index}.scale"], scale, rtol=1e-5, atol=0)
            continue
        tolerance = 1e-5 if options["range"] in ("percentile", "std", "mean_abs") else 0
        for key in (key for key in one if key.startswith(f"each.{index}.") and not key.endswith("step")):
            torch.testing.assert_close(
                ranks[0][key], one[key], rtol=tolerance, atol=0, msg=lambda text, kind=kind: f"{kind}: {text}"
            )


def _running_scale(index: int, options: dict[str, Any]) -> Tensor:
    """By hand: the mean over the processes of the moving averages of their extremes."""
    bounds = []
    for batches in OF_RANKS:
        low = high = None
        for x, *_ in batches:
            rows = x.double() if "axis" in options else x.double().view(1, -1)
            new_low, new_high = rows.amin(1), rows.amax(1)
            low = new_low if low is None else 0.9 * low + 0.1 * new_low
            high = new_high if high is None else 0.9 * high + 0.1 * new_high
        bounds.append(torch.stack([low, high]))
    low, high = torch.stack(bounds).mean(0)
    low, high = low.clamp(max=0), high.clamp(min=0)
    return ((high - low) / 15 if options.get("symmetric") is False else torch.maximum(-low, high) / 7).float()
