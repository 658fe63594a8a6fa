"""Turns the medians of one run into ratios, prints them beside their goals, and writes them to a results folder."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastqat
from fastqat.train.pages import HUGE_PAGES, keep_pages

GOALS: list[tuple[str, str, str, str, float]] = []  # label, numerator, denominator, "<=" or ">=", bound


def pytest_configure(config: pytest.Config) -> None:
    keep_pages()  # as `fastqat train` does: no op is charged for page faults of its result


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="FOLDER", help="write the ratios as CSV and JSON to this folder")


def goal(label: str, numerator: str, denominator: str, relation: str, bound: float) -> None:
    """Declare a ratio of two medians of this run, and what it should be."""
    GOALS.append((label, numerator, denominator, relation, bound))


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "huge pages": os.environ.get(HUGE_PAGES) == "1",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastqat": fastqat.__version__,
        "backend": fastqat.current_backend("cpu"),
    }


def take_turns(benchmark, contenders: dict[str, tuple[Callable[[], object], int]], rounds: int) -> None:
    """Time the contenders round by round, each right after an untimed call of its own; keep their medians.

    contenders: name -> (call, bytes that it must read and write, or 0).
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}

    def one_round() -> None:
        for name, (call, _) in contenders.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)

    benchmark.pedantic(one_round, rounds=rounds, iterations=1, warmup_rounds=2)
    for name, (_, moved) in contenders.items():
        benchmark.extra_info[name] = (statistics.median(times[name][2:]), moved)


def _medians(config: pytest.Config) -> dict[str, tuple[float, int]]:
    """Contender -> (median seconds, bytes that it must move)."""
    session = getattr(config, "_benchmarksession", None)
    return {name: value for b in (session.benchmarks if session else []) for name, value in b.extra_info.items()}


def _rows(medians: dict[str, tuple[float, int]]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for label, above, below, relation, bound in GOALS:
        if above in medians and below in medians:
            ratio = medians[above][0] / medians[below][0]
            met = ratio <= bound if relation == "<=" else ratio >= bound
            rows.append({"ratio": label, "value": round(ratio, 2), "goal": f"{relation} {bound}", "met": met})
    return rows


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    medians = _medians(config)
    if not medians:
        return
    write = terminalreporter.write_line
    write("")
    write(f"{'what':<44}{'median':>12}{'GB/s':>8}   fraction of the floor")
    for name, (seconds, moved) in medians.items():
        place = "cache" if "cache" in name else "memory"
        copy_seconds, copy_bytes = medians.get(f"copy[{place}]", (0.0, 0))
        floor = f"{moved / seconds / (copy_bytes / copy_seconds):.2f}" if moved and copy_seconds else ""
        write(f"{name:<44}{seconds * 1e3:>9.3f} ms{moved / seconds / 1e9:>8.1f}   {floor}")
    write("")
    rows = _rows(medians)
    write(f"{'ratio':<64}{'value':>8}   goal")
    for row in rows:
        write(f"{row['ratio']:<64}{row['value']:>8}   {row['goal']} {'' if row['met'] else '  MISSED'}")
    folder = config.getoption("--results")
    if folder:
        _write(Path(folder), medians, rows)
        write(f"written to {folder}")


def _write(folder: Path, medians: dict[str, tuple[float, int]], rows: list[dict[str, object]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"cpu-{datetime.date.today().isoformat()}"
    milliseconds = {name: round(seconds * 1e3, 4) for name, (seconds, _) in medians.items()}
    record = {"machine": machine(), "milliseconds": milliseconds, "ratios": rows}
    (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    with (folder / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["ratio", "value", "goal", "met"])
        writer.writeheader()
        writer.writerows(rows)
