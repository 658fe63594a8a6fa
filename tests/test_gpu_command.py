"""``make gpu`` itself: parts that fail, hang or crash, how their output is judged, and what is left in the folder."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import gpu
import gpu_parts
from gpu_parts import CUT, FAILED, PASSED, ROOT, SKIPPED, Part

FACTS = {"rehearse": True, "cores": 8, "sanitizer": None, "backends": {}}


def part(name: str, code: str, judge=gpu_parts.of_command, stage: int = 2, seconds: float = 0.0) -> Part:
    """A part that runs a piece of Python."""
    return Part(name, (sys.executable, "-c", code), seconds, stage, gpu_parts.needs_gpu, judge)


def test_parts_do_not_stop_each_other(tmp_path: Path) -> None:
    """One fails, one dies by a signal, one hangs with a child, which ends too; the last stage still runs."""
    sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parts = [
        part("fails", "print('before'); raise SystemExit('a reason')"),
        part("dies", "import os; os.abort()"),
        part("hangs", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"),
        Part("is not there", ("/no/such/program",), 0.0, 2, gpu_parts.needs_gpu, gpu_parts.of_command),
        part("last", "import time; time.sleep(0.5)", stage=3, seconds=4.0),
    ]
    start = time.monotonic()
    rows = gpu.run_all(parts, dict(FACTS), start + 7, tmp_path)
    assert time.monotonic() - start < 20  # and not 60
    assert [(r["part"], r["state"]) for r in rows] == [
        ("fails", FAILED),
        ("dies", FAILED),
        ("hangs", CUT),
        ("is not there", FAILED),
        ("last", PASSED),
    ]
    assert "a reason" in rows[0]["why"] and "-6" in rows[1]["why"]
    assert "before" in (tmp_path / "fails.log").read_text()
    child = Path("/proc") / (tmp_path / "hangs.log").read_text().strip() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    "status, output, state, why",
    [
        (0, "....\n12 passed, 3 skipped in 4.50s\n", PASSED, "12 passed, 3 skipped"),
        (1, "FAILED tests/test_a.py::test_b - x\n1 failed, 2 passed in 0.1s\n", FAILED, "tests/test_a.py::test_b"),
        (0, "SKIPPED [2] tests/test_a.py:3: no GPU: none\n2 skipped in 0.1s\n", SKIPPED, "no GPU: none"),
        (-11, "....\nFatal Python error: Segmentation fault\n", FAILED, "Segmentation fault"),
        (1, "/usr/bin/python3: No module named pytest\n", FAILED, "No module named pytest"),
        (5, "no tests ran in 0.01s\n", FAILED, "exit status 5"),
    ],
)
def test_judging_pytest(status: int, output: str, state: str, why: str) -> None:
    """Only tests that ran and passed have passed."""
    got = gpu_parts.of_pytest(status, output)
    assert got[0] == state and why in got[1]


@pytest.mark.parametrize(
    "status, output, state",
    [
        (0, "3 calls were right in 1 s\n========= ERROR SUMMARY: 0 errors\n", PASSED),
        (0, "3 calls were right in 1 s\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n", PASSED),
        (0, "3 calls were right in 1 s\n", FAILED),
        (9, "3 calls were right in 1 s\n========= ERROR SUMMARY: 2 errors\n", FAILED),
        (0, "========= ERROR SUMMARY: 0 errors\n", FAILED),
        (1, "========= Error: Device not supported\n", SKIPPED),
    ],
)
def test_judging_a_sanitizer(status: int, output: str, state: str) -> None:
    """It has passed where it has counted, and all calls were made."""
    assert gpu_parts.of_sanitizer(status, output)[0] == state


def test_a_backend_that_does_not_run_has_failed() -> None:
    """On a GPU both compiled backends are wanted; a reason is not a pass."""
    why_not = gpu_parts.needs_backend("cuda")
    assert why_not({"backends": {"cuda": "available"}}) is None
    assert why_not({"backends": {"cuda": "nvcc failed"}}) == (FAILED, "backend cuda: nvcc failed")
    assert why_not({"no_gpu": "none", "backends": {}})[0] == SKIPPED


def test_what_the_parts_run_is_there(tmp_path: Path) -> None:
    """No part names a file that has moved."""
    commands = [word for p in gpu_parts.all_parts(dict(FACTS), tmp_path) for word in p.command]
    named = [word for word in commands if word.endswith(".py")]
    assert len(named) > 12 and all((ROOT / word).exists() for word in named), named


def test_without_a_gpu(tmp_path: Path) -> None:
    """Every part says that there is none, in the table and the files, and so does the exit status."""
    command = [sys.executable, str(ROOT / "scripts" / "gpu.py"), "--results", str(tmp_path), "--only", "values,steps"]
    code = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=code)
    assert done.returncode == 2, done.stderr
    (record,) = (json.loads(file.read_text()) for file in tmp_path.glob("gpu-*.json"))
    assert [row["state"] for row in record["parts"]] == [SKIPPED] * 2
    assert all(row["why"].startswith("no GPU: ") for row in record["parts"])
    assert done.stdout.count("no GPU: ") == 5 and "0 passed" in (tmp_path / "table.txt").read_text()
    (table,) = (list(csv.reader(file.open())) for file in tmp_path.glob("gpu-*.csv"))
    assert table == [["ratio", "value", "goal", "met", "GB/s"]]


def test_results_of_a_part_that_was_cut_count(tmp_path: Path) -> None:
    """What a group of the benchmark has measured before its end is in the table."""
    row = {"ratio": "a / b", "value": 1.5, "goal": ">= 2", "met": False, "GB/s": 10.0}
    (tmp_path / "sizes.json").write_text(json.dumps({"milliseconds": {"a": 3.0, "b": 2.0}, "ratios": [row]}))
    milliseconds, ratios = gpu.gather([tmp_path / "sizes.json", tmp_path / "never-ran.json"])
    text = gpu.table([{"part": "sizes", "state": CUT, "seconds": 9.0, "why": "too long"}], ratios, dict(FACTS))
    assert milliseconds == {"a": 3.0, "b": 2.0} and "MISSED" in text and "1 CUT" in text and "0 met, 1 missed" in text


@pytest.mark.parametrize(
    "bodies, said",
    [
        (["pass", "pass", "assert False", "pytest.skip('no')", "pass"], "1 failed, 3 passed, 1 skipped"),
        (["pass", "os.abort()"], "1 passed, 1 errors"),
    ],
)
def test_tests_in_shards(tmp_path: Path, bodies: list[str], said: str) -> None:
    """Each test runs once; a process that dies is an error; pytest's words are found in the output."""
    file = tmp_path / "test_some.py"
    tests = "".join(f"def test_{i}():\n    {body}\n" for i, body in enumerate(bodies))
    file.write_text(f"import os, pytest\n{tests}")
    command = [sys.executable, str(ROOT / "tests" / "gpu_shards.py"), "2", "-rfE", "-p", "no:cacheprovider", str(file)]
    bare = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=bare)
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith(f"{said} in ")
    state, why = gpu_parts.of_pytest(done.returncode, done.stdout)
    assert state == FAILED and why.startswith(said) and ("test_2" in why or "shard-1" in why)


@pytest.mark.parametrize("command", ("tests/gpu_calls.py", "benchmarks/bench_gpu.py kernels --json"))
def test_rehearsal(tmp_path: Path, command: str) -> None:
    """What runs on a GPU alone still runs, on CPU tensors of small sizes."""
    file, rehearsal = tmp_path / "kernels.json", {"FASTQAT_GPU_REHEARSAL": "1", "PYTHONPATH": str(ROOT)}
    words = [*command.split(), *([str(file)] if "--json" in command else [])]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **rehearsal}
    )
    assert done.returncode == 0, done.stderr
    if "--json" not in command:
        assert int(done.stdout.splitlines()[-1].split(" calls were right")[0]) > 200
        return
    record = json.loads(file.read_text())
    assert len(record["ratios"]) == 12 and len(record["milliseconds"]) == 14
    assert set(record["ratios"][0]) == {"ratio", "value", "goal", "met", "GB/s"}


def test_the_resnet50_of_the_benchmark() -> None:
    """As many parameters as the literature gives it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu_resnet import resnet50

    with torch.device("meta"):
        assert sum(p.numel() for p in resnet50().parameters()) == 25_557_032
