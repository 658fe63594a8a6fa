"""Memory of one training step at W4A4 beside float32: what autograd saves, and the peak of the process.

    python benchmarks/bench_memory.py            # prints the table; a process for each row, so that each has a peak
    python benchmarks/bench_memory.py --results benchmarks/results --docs docs/memory.md

Batch 256 of 32 x 32 images, first and last layer at 8 bits. Counted are the distinct storages that are saved between
forward and backward, without those of parameters and buffers. The peak is that of a step over what the process held
before it, as Linux counts it, with an allocator that gives tensors back as they are freed: the C library keeps holes
between them by itself.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from conftest import machine
from torch import Tensor, nn
from torch.nn import functional as F

import fastqat
from fastqat import models

IMAGE = (3, 32, 32)
NETWORKS = ("resnet20", "mobilenetv2")
RANGES: dict[str, dict[str, Any]] = {
    "fixed": {},
    "in_hindsight": {"range": "in_hindsight"},
    "pact": {"signed": False, "learn": "scale", "estimator": "pact"},
    "lsq": {"learn": "scale"},
}
SAVINGS: dict[str, dict[str, bool] | None] = {
    "nothing": None,
    "masks": {"activations": False},
    "codes and masks": {},
}
GOALS = {"masks": 1.10, "codes and masks": 0.70}
GOAL_OF_LSQ = 0.75  # with codes and masks
BEGIN, END = "<!-- table of bench_memory.py -->", "<!-- end of table -->"


def network(name: str, kind: str, saving: str, images: Tensor) -> nn.Module:
    """A network with ranges of this kind (float: none), which saves less in this way."""
    torch.manual_seed(0)
    model = models.build(name, 10, IMAGE)
    if kind != "float":
        activation = fastqat.QSpec(bits=4, **RANGES[kind])
        weight = fastqat.QSpec(bits=4, axis=0, learn="scale")
        fastqat.prepare(model, fastqat.QConfig(weight, activation), first_last_bits=8)
        options = SAVINGS[saving]
        if options is not None:
            fastqat.compress_saved_activations(model, **options)
    model.train()
    F.cross_entropy(model(images[:2]), torch.zeros(2, dtype=torch.int64)).backward()  # sets the ranges
    return model


def status(name: str) -> int:
    """A value of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(name: str, kind: str, saving: str, batch: int) -> dict[str, int]:
    """Both numbers of one row, of one step in this process: bytes saved, and bytes that it grew by at most."""
    ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: a tensor above 1 MB has pages of its own
    torch.manual_seed(0)
    images, labels = torch.randn(batch, *IMAGE), torch.randint(10, (batch,))
    model = network(name, kind, saving, images)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return t

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = status("VmRSS")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    saved = sum(count for pointer, count in found.items() if pointer not in own)
    return {"saved": saved, "peak": status("VmHWM") - before}


def rows(names: list[str], batch: int) -> list[dict[str, Any]]:
    """All rows, each measured in a process of its own."""
    found = []
    fresh = multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1)
    for name in names:
        cases = [("float", "nothing"), *((kind, saving) for kind in RANGES for saving in SAVINGS)]
        float32: dict[str, int] = {}
        for kind, saving in cases:
            row = fresh.apply(measure, (name, kind, saving, batch))
            float32 = float32 or row
            ratios = {f"{key} ratio": round(row[key] / float32[key], 3) for key in row}
            found.append({"network": name, "range": kind, "keeps less": saving, **row, **ratios})
            found[-1].update(judged(kind, saving, ratios["saved ratio"]))
            print(" ".join(str(value) for value in found[-1].values()), flush=True)
    return found


def judged(kind: str, saving: str, ratio: float) -> dict[str, Any]:
    """The goal of a row, of what is saved beside float32, and whether it is met."""
    if kind == "float" or saving not in GOALS:
        return {}
    goal = GOAL_OF_LSQ if (kind, saving) == ("lsq", "codes and masks") else GOALS[saving]
    return {"goal": goal, "met": ratio <= goal}


def table(record: dict[str, Any]) -> str:
    """The rows as Markdown."""
    of = record["machine"]
    lines = [
        f"Measured {of['date']} on {of['cores']} cores ({of['cpu']}), torch {of['torch']}, {of['threads']} threads, "
        f"batch {record['batch']}.",
        "",
        "| network | range of activations | keeps less | saved, MB | x float32 | goal | peak, MB | x float32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        goal = f"<= {row['goal']:.2f}{'' if row['met'] else ', missed'}" if "goal" in row else ""
        lines.append(
            f"| {row['network']} | {row['range']} | {row['keeps less']} | {row['saved'] / 1e6:.0f} "
            f"| {row['saved ratio']:.2f} | {goal} | {row['peak'] / 1e6:.0f} | {row['peak ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", metavar="FOLDER", type=Path, help="write the rows as JSON to this folder")
    parser.add_argument("--docs", metavar="FILE", type=Path, help="write the table into this document")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    record = {"machine": machine(), "batch": options.batch, "rows": rows(list(options.networks), options.batch)}
    text = table(record)
    print(text)
    if options.results:
        file = options.results / f"memory-{record['machine']['date']}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
    if options.docs:
        before, rest = options.docs.read_text().split(BEGIN)
        options.docs.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
