"""What `fastqat train` gains from keeping the pages of freed tensors, and from huge ones: time and memory of a step.

    python benchmarks/pages.py --results benchmarks/results

A step at W4A4 with learned scales, batch 128 of 32 x 32 images. Processes with and without take turns, as pages are a
matter of a whole process; ratios are medians over the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from conftest import machine
from torch.nn import functional as F

import fastqat
from fastqat import models
from fastqat.train.pages import HUGE_PAGES, OWN_SETTINGS, keep_pages

BATCH, IMAGE = 128, (3, 32, 32)
STEPS = {"resnet20": 25, "mobilenetv2": 6}
WARM_UP = 2


def measure(network: str, keeps: bool) -> dict[str, float]:
    """Median milliseconds of a step of this process, and its peak in MB."""
    if keeps:
        keep_pages()
    torch.manual_seed(0)
    model = models.build(network, 10, IMAGE).to(memory_format=torch.channels_last)
    spec = fastqat.QSpec(4, learn="scale")
    fastqat.prepare(model, fastqat.QConfig(spec, spec), first_last_bits=8)
    images = torch.randn(BATCH, *IMAGE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    seconds = []
    for _ in range(WARM_UP + STEPS[network]):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {
        "ms": round(statistics.median(seconds[WARM_UP:]) * 1e3, 1),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_process(network: str, keeps: bool) -> dict[str, float]:
    """The same in a process of its own, with nothing set in its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in (HUGE_PAGES, *OWN_SETTINGS)}
    command = [sys.executable, __file__, "--one", network, *(["--keeps"] if keeps else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def compare(network: str, pairs: int) -> dict[str, object]:
    """Both kinds of process in turn."""
    runs = [[in_process(network, keeps) for keeps in (False, True)] for _ in range(pairs)]
    row: dict[str, object] = {"network": network, "pairs": pairs}
    for key in runs[0][0]:
        row[key] = [round(statistics.median(run[side][key] for run in runs), 1) for side in (0, 1)]
        row[f"{key}, ratio"] = round(statistics.median(kept[key] / plain[key] for plain, kept in runs), 3)
    print(row, flush=True)
    return row


def main() -> None:
    """Print a row for each network: [without, with] of each number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--results", type=Path, help="folder for a JSON file")
    parser.add_argument("--one", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--keeps", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.keeps)))
        return
    about = machine()
    del about["huge pages"]  # they differ from process to process
    record = {"machine": about, "batch": BATCH, "rows": [compare(network, options.pairs) for network in STEPS]}
    if options.results:
        path = options.results / f"pages-{about['date']}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
