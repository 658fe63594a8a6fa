"""Pages of freed tensors stay with a process that owns them, unless its environment says otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from fastqat.train.pages import HUGE_PAGES, OWN_SETTINGS

PROGRAM = """
import os, sys
from pathlib import Path
import torch
from fastqat.train.pages import HUGE_PAGES, keep_pages

if "keep" in sys.argv:
    keep_pages()

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

def step():
    tensors = [torch.ones(3 << 20) for _ in range(4)]  # freed together

step()
held = resident()
tensors = [torch.ones(3 << 20) for _ in range(4)]
print(resident() - held, os.environ.get(HUGE_PAGES))
"""
MEGABYTES = 12  # of a tensor

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's allocator")


def run(*words: str, **environment: str) -> tuple[int, str]:
    """Megabytes of new pages that a second step takes, and what torch is told about huge pages."""
    clean = {name: value for name, value in os.environ.items() if name not in (HUGE_PAGES, *OWN_SETTINGS)}
    command = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    taken, huge = done.stdout.split()
    return int(taken), huge


def test_freed_pages_are_kept():
    assert run()[0] >= MEGABYTES
    assert run("keep")[0] <= 1


def test_huge_pages_are_asked_for():
    assert run("keep")[1] == "1"


def test_the_environment_goes_before():
    own = {"MALLOC_TRIM_THRESHOLD_": "1000000", "MALLOC_MMAP_THRESHOLD_": "1000000", HUGE_PAGES: "0"}
    taken, huge = run("keep", **own)
    assert taken >= 4 * MEGABYTES - 1 and huge == "0"


def test_train_keeps_pages(monkeypatch):
    from fastqat import cli
    from fastqat.train import pages

    called = []
    monkeypatch.setattr(pages, "keep_pages", lambda: called.append(True))
    assert cli.main(["train", "--data", "cifar10", "--root", "/nowhere"]) == cli.USER_ERROR
    assert called
