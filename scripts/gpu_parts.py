"""The parts of ``make gpu``: what each runs, what it needs, and how its output is judged."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED, CUT, SKIPPED = "passed", "FAILED", "CUT", "skipped"
Facts = dict[str, Any]  # what is known of the machine: "gpu", "no_gpu", "backends", "cores", ...
Verdict = tuple[str, str]  # state, and why

CONFORMANCE = (
    "tests/test_conformance.py",
    "tests/test_multi_tensor.py",
    "tests/test_multi_tensor_gradients.py",
    "tests/test_range_search.py",
    "tests/test_one_tensor.py",
    "tests/test_one_tensor_edges.py",
    "tests/test_range_steps.py",
    "tests/test_two_widths.py",
)
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-rfEs", "--maxfail=25", "--tb=short")


@dataclass(frozen=True)
class Part:
    """A process of its own with a log of its own.

    Args:
        name: of the part and of its log.
        command: what runs, in the root of the repository.
        seconds: what is kept of the budget for it, however long the parts before it take.
        stage: parts of a stage run side by side; the stages one after the other.
        why_not: the reason why it cannot run, or None; an empty command never runs.
        judge: its exit status and its output -> state, and why.
        environment: variables of its own.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    stage: int
    why_not: Callable[[Facts], Verdict | None]
    judge: Callable[[int, str], Verdict]
    environment: tuple[tuple[str, str], ...] = ()


def last_lines(output: str, count: int = 1) -> str:
    """The last lines that say something."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-count:])[-300:]


def of_command(status: int, output: str) -> Verdict:
    """Passed where the exit status is 0."""
    return (PASSED, "") if status == 0 else (FAILED, f"exit status {status}: {last_lines(output)}")


def of_build(status: int, output: str) -> Verdict:
    """Passed where both libraries were built; setup.py itself goes on without one."""
    missing = re.findall(r"^fastqat: installing without (.*)$", output, re.M)
    return (FAILED, "; ".join(missing)[:300]) if missing else of_command(status, output)


def of_benchmark(status: int, output: str) -> Verdict:
    """The same; what it could not measure is on lines of its own."""
    missing = re.findall(r"^not measured: (.*)$", output, re.M)
    state, why = of_command(status, output)
    said = [why] * bool(why) + ["not measured: " + ", ".join(missing)] * bool(missing)
    return state, "; ".join(said)[:300]


def of_pytest(status: int, output: str) -> Verdict:
    """Passed where pytest says so and at least one test ran."""
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", summary_line(output))}
    if not counts:
        return FAILED, f"exit status {status}, no summary: {last_lines(output)}"
    said = ", ".join(f"{n} {kind}" for kind, n in counts.items())
    if status == 0 and counts.get("passed"):
        return PASSED, said
    if status == 0:
        skips = re.findall(r"^SKIPPED \[\d+\] [^ ]+ (.*)$", output, re.M)
        return SKIPPED, f"{said}: {skips[0] if skips else 'no test ran'}"[:300]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M)
    return FAILED, f"{said}: {', '.join(failed[:3])}"[:300]


def summary_line(output: str) -> str:
    """The line in which pytest counts."""
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|skipped|error).* in [\d.]+", line)]
    return lines[-1] if lines else ""


def of_sanitizer(status: int, output: str) -> Verdict:
    """Passed where it has counted no error, skipped where it does not work on this machine."""
    if "Device not supported" in output or "Failed to initialize" in output:
        return SKIPPED, f"compute-sanitizer does not work here: {last_lines(output)}"
    found = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    if status == 0 and found and "calls were right" in output:
        return PASSED, found[-1]
    return FAILED, f"exit status {status}: {found[-1] if found else last_lines(output)}"


def needs_gpu(facts: Facts) -> Verdict | None:
    """Skipped without a GPU."""
    return (SKIPPED, f"no GPU: {facts['no_gpu']}") if facts.get("no_gpu") else None


def needs_backend(name: str) -> Callable[[Facts], Verdict | None]:
    """Failed where a backend should run on this GPU and does not."""

    def why_not(facts: Facts) -> Verdict | None:
        state = facts.get("backends", {}).get(name, facts.get("no_backends", "unknown"))
        return needs_gpu(facts) or (None if state == "available" else (FAILED, f"backend {name}: {state}"))

    return why_not


def needs_sanitizer(facts: Facts) -> Verdict | None:
    """Skipped where compute-sanitizer is not installed."""
    if facts["sanitizer"] is None:
        return needs_gpu(facts) or (SKIPPED, "compute-sanitizer is not installed")
    return needs_backend("cuda")(facts)


def needs_cores(facts: Facts) -> Verdict | None:
    """Skipped where it would be in the way of the tests."""
    few = facts["cores"] < 8
    return needs_gpu(facts) or ((SKIPPED, f"{facts['cores']} cores: the benchmark compiles by itself") if few else None)


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH or beside nvcc."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    beside = [str(Path(home) / "bin") for home in homes if home]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(beside))


def conformance(backend: str, shards: int, stage: int, rehearse: bool) -> Part:
    """The conformance suite of one backend, in several processes."""
    choice = "test_plain and reference and not host" if rehearse else f"{backend} and not host"
    command = (sys.executable, "tests/gpu_shards.py", str(shards), *PYTEST[2:], *CONFORMANCE, "-k", choice)
    return Part(backend, command, 100, stage, needs_backend(backend), of_pytest)


def sanitizer(tool: str, stage: int, facts: Facts) -> Part:
    """A tool of compute-sanitizer over a small set of calls; a rehearsal makes the calls without it."""
    flags = ("--tool", tool, "--error-exitcode", "9", "--print-limit", "20", "--launch-timeout", "100")
    prefix = () if facts["sanitizer"] is None else (facts["sanitizer"], *flags)
    why_not, judge = needs_sanitizer, of_sanitizer
    if facts["rehearse"]:
        prefix, why_not, judge = (), needs_gpu, of_command
    # Each tensor in an allocation of its own: an access outside of it is one outside of what was allocated.
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return Part(tool, (*prefix, sys.executable, "tests/gpu_calls.py"), 100, stage, why_not, judge, environment)


def benchmark(group: str, seconds: float, stage: int, results: Path) -> Part:
    """A group of the benchmark."""
    command = (sys.executable, "benchmarks/bench_gpu.py", group, "--json", str(results / f"{group}.json"))
    return Part(group, command, seconds, stage, needs_gpu, of_benchmark)


def all_parts(facts: Facts, results: Path) -> list[Part]:
    """The parts in order."""
    rehearse = facts["rehearse"]
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    once = (sys.executable, "benchmarks/bench_gpu.py", "activations", "weights", "steps", "--once")
    return [
        Part("build", build, 110, 1, needs_gpu, of_build),
        conformance("cuda", 2, 2, rehearse),
        conformance("triton", max(2, min(12, facts["cores"] - 4)), 2, rehearse),
        Part("integration", (sys.executable, *PYTEST, "tests/test_gpu.py"), 100, 2, needs_gpu, of_pytest),
        Part("values", (sys.executable, *PYTEST, "tests/test_gpu_values.py"), 100, 2, needs_gpu, of_pytest),
        sanitizer("memcheck", 2, facts),
        sanitizer("racecheck", 2, facts),
        # The cache of torch.compile is filled while the tests run: the benchmark then finds its kernels there.
        Part("compile", once, 100, 2, needs_cores, of_command),
        benchmark("kernels", 25, 3, results),
        benchmark("activations", 25, 4, results),
        benchmark("weights", 60, 5, results),
        benchmark("sizes", 45, 6, results),
        benchmark("steps", 90, 7, results),
    ]
