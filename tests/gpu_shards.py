"""Tests in several processes side by side: ``python tests/gpu_shards.py COUNT ARGUMENTS-OF-PYTEST``.

Triton compiles a kernel for each combination of dtypes, options and alignments that it meets, many hundreds in all: too
many for one process. As a plugin of pytest this file leaves each process every COUNT-th test.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

SHARD = "FASTQAT_SHARD"


def pytest_collection_modifyitems(config, items: list) -> None:
    """Keep the tests of this process."""
    first, count = map(int, os.environ[SHARD].split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != first])
    items[:] = items[first::count]


def read(process: subprocess.Popen, lines: list[str]) -> None:
    """Print and keep what a process says."""
    for line in process.stdout or ():
        lines.append(line)
        print(line, end="", flush=True)


def main(count: int, arguments: list[str]) -> int:
    """Run all shards; the last line sums up what they count."""
    start, here = time.monotonic(), str(Path(__file__).resolve().parent)
    path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH")) if p)
    command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    shards = []
    for i in range(count):
        environment = {**os.environ, "PYTHONPATH": path, SHARD: f"{i}/{count}"}
        process, lines = subprocess.Popen(command, env=environment, **pipes), []
        reader = threading.Thread(target=read, args=(process, lines))
        reader.start()
        shards.append((process, lines, reader))
    total: collections.Counter[str] = collections.Counter()
    for i, (process, lines, reader) in enumerate(shards):
        reader.join()
        if process.wait() not in (0, 1, 5):  # 5: more shards than tests
            print(f"ERROR shard-{i} ended with status {process.returncode}: {''.join(lines[-1:]).strip()}")
            total["errors"] += 1
        counts = [found for line in lines if (found := re.findall(r"(\d+) (passed|failed|skipped|error)", line))]
        for number, kind in counts[-1] if counts and " in " in lines[-1] else ():
            total["errors" if kind == "error" else kind] += int(number)
    said = ", ".join(f"{number} {kind}" for kind, number in total.items())
    print(f"{said or 'no tests ran'} in {time.monotonic() - start:.1f}s")
    return 0 if total["passed"] and not total["failed"] and not total["errors"] else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
