"""Benchmark on a GPU: ``python benchmarks/bench_gpu.py kernels weights sizes steps --json FILE``. See docs/gpu.md.

Five groups, each in a module of its own: kernels against a copy (``gpu_kernels``), activations and gradients with one
scale (``gpu_activations``), all weights of a MobileNetV2 (``gpu_weights``), four sizes against the peers
(``gpu_sizes``), a step of a ResNet-50 (``gpu_steps``).
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

ROUNDS = {"kernels": 60, "activations": 60, "weights": 60, "sizes": 30, "steps": 15}


def main() -> int:
    """Measure the groups that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", choices=ROUNDS, help="what to measure")
    parser.add_argument("--json", type=Path, help="file for the results, written after every entry")
    parser.add_argument("--once", action="store_true", help="one round, to fill the caches of torch.compile")
    options = parser.parse_args()
    # Here, not above: pytest imports this file to look for benchmarks of its own.
    from gpu_timing import DEVICE, REHEARSAL, Record, warm_up

    import fastqat

    record = Record(options.json)
    for group in options.groups:
        backend = fastqat.current_backend(DEVICE)
        print(f"{group} on {DEVICE} by the backend {backend!r}{', a rehearsal' if REHEARSAL else ''}", flush=True)
        warm_up()
        rounds = 2 if options.once or REHEARSAL else ROUNDS[group]
        importlib.import_module(f"gpu_{group}").measure(record, rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
