"""Set-up of every test run: Triton's interpreter, the backends as a fixture, hypothesis without a clock or a seed."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported; lets its kernels run on the CPU

import pytest
import torch
from cuda_on_host import build, machine

from fastqat.ops import select

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # a machine that has a GPU need not have it; tests of properties then do not import
    pass
else:
    settings.register_profile(
        "fastqat",
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],  # one backend serves all examples
    )
    settings.load_profile("fastqat")


def pytest_report_header() -> list[str]:
    """Say which backends this run judges, and why the others are missing."""
    return [f"backend {name}: {state}" for name, state in select.status().items()]


@pytest.fixture
def backend(request: pytest.FixtureRequest):
    """Run the test with the backend named by the parameter; skip with its own reason where it cannot run."""
    if request.param == machine.NAME:
        if reason := build.why_not():
            pytest.skip(f"backend {request.param}: {reason}")
        with machine.use_cuda_on_host():
            yield request.param
        return
    state = select.status()[request.param]
    if state != "available":
        pytest.skip(f"backend {request.param}: {state}")
    with select.use_backend(request.param):
        yield request.param


@pytest.fixture
def process_group():
    """Be the only process of a gloo group.

    What the test made is gone before the group is: a wrapper that goes last joins gloo's threads, and holds Python's
    lock, which their last piece of work may still want.
    """
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture
def one_thread():
    """Run on one thread: small tensors gain nothing from more, and on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in a folder of its own, from which networks beside the tests can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent))
