"""Loss of a LoRA adapter whose B begins at zero, by bits and range; the table of docs/zero-initialised-layers.md.

python benchmarks/zero_initialised.py
"""

from __future__ import annotations

import torch
from torch import nn

import fastqat
from fastqat import QConfig, QSpec

WIDTH, RANK, STEPS = 32, 8, 1500
OPTIMIZERS = {"Adam": (torch.optim.Adam, 1e-2), "SGD": (torch.optim.SGD, 0.3)}
LSQ = {"learn": "scale", "grad_scale": "lsq"}
# name -> options, learning rate of the scales by that of the weight
RANGES = {
    'range="minmax"': ({"axis": 0, "range": "minmax"}, 1.0),
    "the default": ({"axis": 0}, 1.0),
    "learned": ({"axis": 0, **LSQ}, 1.0),
    "learned, 1/100 of the learning rate": ({"axis": 0, **LSQ}, 0.01),
    'range="minmax", one scale': ({"range": "minmax"}, 1.0),
    "the default, one scale": ({}, 1.0),
}


def loss(spec: QSpec | None, optimizer: str, share: float = 1.0) -> float:
    """Train B of B(A(x)) towards a B that A can reach; the mean squared error in evaluation.

    Args:
        spec: of the quantizer of B; None trains in float.
        optimizer: a name in OPTIMIZERS.
        share: learning rate of the scales by that of the weight.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False))
    nn.init.zeros_(net[1].weight)
    net[0].requires_grad_(False)
    wanted = torch.randn(WIDTH, RANK)
    if spec is not None:
        fastqat.prepare(net, QConfig(spec, None), overrides={"0": None})
    kind, rate = OPTIMIZERS[optimizer]
    groups = [{"params": [net[1].weight]}, {"params": fastqat.quantizer_parameters(net), "lr": rate * share}]
    descent = kind([group for group in groups if group["params"]], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(descent, STEPS)
    generator = torch.Generator().manual_seed(1)

    def error(rows: int) -> torch.Tensor:
        x = torch.randn(rows, WIDTH, generator=generator)
        return (net(x) - net[0](x) @ wanted.T).square().mean()

    for _ in range(STEPS):
        descent.zero_grad()
        error(64).backward()
        descent.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        return float(error(512))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for optimizer in OPTIMIZERS:
        print(f"{optimizer}, float: {loss(None, optimizer):.5f}", flush=True)
        print("| range | 2 bits | 3 bits | 4 bits | 8 bits |\n|---|---|---|---|---|")
        for name, (options, share) in RANGES.items():
            losses = [loss(QSpec(bits, **options), optimizer, share) for bits in (2, 3, 4, 8)]
            print(f"| {name} |", " | ".join(f"{value:.5f}" for value in losses), "|", flush=True)
