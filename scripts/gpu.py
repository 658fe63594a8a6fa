"""``make gpu``: builds fastqat on a machine with an NVIDIA GPU, tests it there and measures it, in under 8 minutes.

It needs a Python with a torch that sees the GPU, nvcc and pytest, and no network. Each part is a process of its own
with a limit and a log: one that fails or takes too long does not stop the others. The results folder gets
``gpu-DATE.json``, ``gpu-DATE.csv``, ``table.txt`` and ``logs/``. The exit status is 0 if all is well, 1 if a part
failed or was cut, 2 without a GPU. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_parts import CUT, FAILED, PASSED, ROOT, SKIPPED, Facts, Part, all_parts, find_sanitizer

PROBE = """
import json, platform
facts = {"python": platform.python_version(), "machine": platform.machine()}
try:
    import torch
    facts.update(torch=torch.__version__, cuda=torch.version.cuda)
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        facts.update(gpu=p.name, capability=f"{p.major}.{p.minor}", multiprocessors=p.multi_processor_count,
                     memory_GiB=round(p.total_memory / 2**30, 1), gpus=torch.cuda.device_count())
        torch.ones(1, device="cuda").add_(1).item()
    else:
        facts["no_gpu"] = f"torch {torch.__version__} sees no CUDA device"
except Exception as error:
    facts["no_gpu"] = f"{type(error).__name__}: {error}"
print("FACTS " + json.dumps(facts))
"""
BACKENDS = "import json\nfrom fastqat.ops import select\nprint('FACTS ' + json.dumps(select.status()))"
_printing = threading.Lock()
_running: set[subprocess.Popen] = set()


def say(text: str) -> None:
    """Print a line at once."""
    with _printing:
        print(text, flush=True)


def environment(part: Part | None, rehearse: bool) -> dict[str, str]:
    """Variables of a part: Triton compiles, pytest loads no plugin that happens to be installed."""
    own = {
        "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p),
        "PYTHONUNBUFFERED": "1",
        "TRITON_INTERPRET": "1" if rehearse else "0",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "FASTQAT_GPU_REHEARSAL": "1" if rehearse else "",
    }
    return {**os.environ, **own, **dict(part.environment if part else ())}


def ask(code: str, rehearse: bool, seconds: float = 90) -> dict[str, Any]:
    """What a piece of Python says about this machine; a process of its own, since a driver may hang."""
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(None, rehearse), capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"no_gpu": f"the question for it was not answered in {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    if not lines:
        return {"no_gpu": f"{sys.executable} cannot say: {done.stderr.strip().splitlines()[-1:]}"}
    return json.loads(lines[-1].removeprefix("FACTS "))


def version_of(*command: str) -> str | None:
    """The last line that a tool prints about itself."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip().splitlines() or [None])[-1]


def stop(process: subprocess.Popen) -> None:
    """End a process and what it has started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:  # in the driver it cannot be killed: it is left behind
            continue


def run(part: Part, facts: Facts, deadline: float, logs: Path) -> dict[str, Any]:
    """Run one part until the deadline; its row of the table."""
    refused = part.why_not(facts)
    if refused is not None:
        say(f"{part.name:<15}| {refused[0]}: {refused[1]}")
        return {"part": part.name, "state": refused[0], "seconds": 0.0, "why": refused[1]}
    start = time.monotonic()
    say(f"{part.name:<15}| {' '.join(part.command)}   (at most {max(deadline - start, 0):.0f} s)")
    try:
        state, why = watch(part, facts, deadline, logs / f"{part.name}.log")
    except OSError as error:
        state, why = FAILED, f"it cannot be started: {error}"
    say(f"{part.name:<15}| {state} {why}")
    return {"part": part.name, "state": state, "seconds": round(time.monotonic() - start, 1), "why": why}


def watch(part: Part, facts: Facts, deadline: float, log: Path) -> tuple[str, str]:
    """Start a part, print and keep what it says, end it at the deadline; its state, and why."""
    options = {"cwd": ROOT, "env": environment(part, facts["rehearse"]), "start_new_session": True, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    process = subprocess.Popen(part.command, **pipes, **options)
    _running.add(process)
    lines: list[str] = []

    def read() -> None:
        with log.open("w") as file:
            for line in process.stdout or ():
                lines.append(line)
                file.write(line)
                file.flush()
                say(f"{part.name:<15}| {line.rstrip()}")

    reader, start = threading.Thread(target=read, daemon=True), time.monotonic()
    reader.start()
    try:
        status = process.wait(max(deadline - start, 0.1))
    except subprocess.TimeoutExpired:
        stop(process)
        return CUT, f"took longer than {time.monotonic() - start:.0f} s; see its log for how far it came"
    finally:
        _running.discard(process)
    reader.join(5)
    return part.judge(status, "".join(lines))


def ask_for_backends(facts: Facts) -> None:
    """Enter which backends run, now that they are built; a rehearsal takes all of them as running."""
    found = ask(BACKENDS, facts["rehearse"])
    facts.update({"no_backends": found["no_gpu"]} if "no_gpu" in found else {"backends": found})
    if facts["rehearse"]:
        facts["backends"] = dict.fromkeys(facts.get("backends", {}), "available")


def run_all(parts: list[Part], facts: Facts, end: float, logs: Path) -> list[dict[str, Any]]:
    """Run the stages, each for what is left of the time but for what the later ones are owed; the rows of the table."""
    rows: list[dict[str, Any]] = []
    owed = {part.stage: max(p.seconds for p in parts if p.stage == part.stage) for part in parts}
    for stage in sorted(owed):
        if stage > 1 and not facts.get("no_gpu") and "backends" not in facts:
            ask_for_backends(facts)
        now = [part for part in parts if part.stage == stage]
        deadline = end - sum(seconds for number, seconds in owed.items() if number > stage)
        pool = ThreadPoolExecutor(min(len(now), max(1, facts["cores"] * 3 // 4)))
        futures = [pool.submit(run, part, facts, deadline, logs) for part in now]
        try:
            rows.extend(future.result() for future in futures)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                stop(process)
            rows.append({"part": "the rest", "state": CUT, "seconds": 0.0, "why": "interrupted"})
            break
    return rows


def gather(files: list[Path]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Milliseconds and ratios of all groups of the benchmark that are there, also of those that were cut."""
    milliseconds: dict[str, float] = {}
    ratios: list[dict[str, Any]] = []
    for file in filter(Path.exists, files):
        record = json.loads(file.read_text())
        milliseconds.update(record["milliseconds"])
        ratios.extend(record["ratios"])
    return milliseconds, ratios


def table(rows: list[dict[str, Any]], ratios: list[dict[str, Any]], facts: Facts) -> str:
    """The short table that comes last; ratios of times as called are in the files alone."""
    head = "REHEARSAL on CPU tensors of tiny sizes: no number below means anything" if facts["rehearse"] else ""
    device = facts.get("gpu") or "no GPU"
    lines = [head] * bool(head) + [f"{device}, torch {facts.get('torch')}, nvcc {facts.get('nvcc')}", ""]
    shown = [r for r in ratios if not r["ratio"].endswith(", as called")]
    lines += [f"{'what':<76}{'value':>9}  {'goal':<8} {'GB/s':>7}"] * bool(shown)
    for r in shown:
        missed = "" if r["met"] else "  MISSED"
        lines.append(f"{r['ratio']:<76}{r['value']:>9.4g}  {r['goal']:<8} {r['GB/s'] or '':>7}{missed}")
    lines += ["", f"{'part':<15} {'state':<8}{'seconds':>8}  why"]
    lines += [f"{r['part']:<15} {r['state']:<8}{r['seconds']:>8.1f}  {r['why']}" for r in rows]
    count = {state: sum(r["state"] == state for r in rows) for state in (PASSED, FAILED, CUT, SKIPPED)}
    met, missed = (sum(r["met"] is value for r in shown) for value in (True, False))
    lines.append("")
    lines.append(", ".join(f"{n} {state}" for state, n in count.items()) + f"; goals: {met} met, {missed} missed")
    return "\n".join(lines)


def write(folder: Path, rows: list[dict[str, Any]], facts: Facts, milliseconds, ratios, text: str) -> None:
    """The files of the results folder."""
    known = {key: facts.get(key) for key in facts if key not in ("rehearse", "backends", "no_backends")}
    machine = {"date": datetime.date.today().isoformat(), **known}
    record = {"machine": machine, "backends": facts.get("backends"), "parts": rows}
    record.update({"milliseconds": milliseconds, "ratios": ratios})
    stem = folder / f"{'rehearsal' if facts['rehearse'] else 'gpu'}-{machine['date']}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["ratio", "value", "goal", "met", "GB/s"])
        writer.writeheader()
        writer.writerows(ratios)
    (folder / "table.txt").write_text(text + "\n")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "gpu", help="folder (default: build/gpu)")
    parser.add_argument("--budget", type=float, default=465, metavar="SECONDS", help="for all parts (default: 465)")
    parser.add_argument("--only", metavar="PART,PART", help="these parts alone")
    parser.add_argument("--rehearse", action="store_true", help="the same code on CPU tensors of tiny sizes")
    return parser


def know(rehearse: bool) -> Facts:
    """What can be known of the machine before anything is built."""
    facts: Facts = {"rehearse": rehearse, "cores": os.cpu_count() or 1, "sanitizer": find_sanitizer()}
    facts.update(ask(PROBE, rehearse))
    facts["nvcc"] = version_of("nvcc", "--version") or version_of("/usr/local/cuda/bin/nvcc", "--version")
    facts["driver"] = version_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def main() -> int:
    """Run the parts that were asked for."""
    parser = arguments()
    options = parser.parse_args()
    end = time.monotonic() + options.budget
    folder = options.results.resolve()
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    facts = know(options.rehearse)
    no_gpu = facts.get("no_gpu")
    if options.rehearse:
        facts.pop("no_gpu", None)
    parts = all_parts(facts, logs)
    if options.only:
        wanted = options.only.split(",")
        unknown = set(wanted) - {part.name for part in parts}
        if unknown:
            parser.error(f"--only: wanted some of {', '.join(p.name for p in parts)}; got {', '.join(sorted(unknown))}")
        parts = [part for part in parts if part.name in wanted]
    for part in parts:
        for kind in ("log", "json"):
            (logs / f"{part.name}.{kind}").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends this wants the results so far
    rows = run_all(parts, facts, end, logs)
    milliseconds, ratios = gather([logs / f"{part.name}.json" for part in parts])
    text = table(rows, ratios, facts)
    write(folder, rows, facts, milliseconds, ratios, text)
    say(f"\n{text}\nresults: {folder}")
    if no_gpu and not options.rehearse:
        say(f"no GPU: {no_gpu}")
        return 2
    return 1 if any(r["state"] in (FAILED, CUT) for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
