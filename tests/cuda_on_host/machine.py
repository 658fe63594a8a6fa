"""The machine of machine.h as tests see it: its schedules, and one of its libraries as a backend of all ops."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from cuda_on_host import build

from fastqat.ops import schema, select

NAME = "cuda-on-host"
NAMESPACE = "fastqat_cuda_on_host"
ORDERS = ("ascending", "descending", "random")


@dataclass(frozen=True)
class Schedule:
    """Which threads and blocks go first, and how many blocks a launch has at most."""

    order: str = "ascending"
    seed: int = 0
    most_blocks: int = 2**31 - 1


# One after the other for the calls of a test. Few blocks have many pieces each; with one there is no other to wait for.
TURNS = tuple(
    Schedule(order, seed, most)
    for seed, (order, most) in enumerate(zip(itertools.cycle(ORDERS), (2**31 - 1, 3, 2, 2, 1, 5, 1), strict=False))
)


class Machine:
    """A library built over machine.h."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.cuda_on_host_schedule.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_int64)
        self.library.cuda_on_host_launches.restype = ctypes.c_int64

    def set(self, schedule: Schedule) -> None:
        """Run what follows by a schedule."""
        self.library.cuda_on_host_schedule(ORDERS.index(schedule.order), schedule.seed, schedule.most_blocks)

    def launches(self) -> int:
        """Number of launches so far."""
        return self.library.cuda_on_host_launches()


@functools.cache
def kernels() -> Machine:
    """The kernels of csrc/cuda, built, loaded and registered as ops of a namespace of their own."""
    path = build.kernels()
    definitions = torch.library.Library(NAMESPACE, "DEF")
    texts = [text for op in schema.OPS.values() for text in (op.schema, op.out_schema)]
    for text in (*texts, *schema.IN_PLACE_OPS.values()):
        definitions.define(text)
    torch.ops.load_library(path)
    machine = Machine(path)
    machine.definitions = definitions  # which ends with its object
    return machine


def backend(turns: tuple[Schedule, ...]) -> SimpleNamespace:
    """A backend like a module of fastqat.ops: a function for each op, whose calls take the schedules in turn."""
    machine, turn = kernels(), itertools.cycle(turns)

    def scheduled(name: str) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            machine.set(next(turn))
            getattr(getattr(torch.ops, NAMESPACE), name)(*arguments)

        return run

    outs = {name: scheduled(f"{name}_out") for name in schema.OPS}
    return SimpleNamespace(**outs, **{name: scheduled(name) for name in schema.IN_PLACE_OPS})


@contextlib.contextmanager
def use_cuda_on_host(*turns: Schedule) -> Iterator[None]:
    """Run all ops on these kernels, by the schedules given in turn, or by :data:`TURNS`."""
    select.REASONS[NAME], select.PYTHON_BACKENDS[NAME] = build.why_not, backend(turns or TURNS)
    try:
        with select.use_backend(NAME):
            yield
    finally:
        del select.REASONS[NAME], select.PYTHON_BACKENDS[NAME]
