"""Ctrl-C and the signal that ends a job: the running step is finished and saved first."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STDERR = 2


class Interrupted(Exception):
    """The run was stopped by a signal, after it had been saved.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopSignals:
    """Context in which SIGINT and SIGTERM are remembered; a second Ctrl-C stops at once.

    Args:
        patient: a second SIGINT changes nothing: torchrun sends one of its own to each process.
        says: the first signal is answered on stderr, as a step or a test may go on for long.
    """

    def __init__(self, patient: bool, says: bool) -> None:
        self.patient, self.says = patient, says
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # only there can handlers be set
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT and not self.patient:
            raise KeyboardInterrupt
        if self.received is None and self.says:
            at_once = "" if self.patient else "; Ctrl-C again stops at once"
            text = f"{signal.Signals(number).name}: finishes and saves the running step or test{at_once}"
            with contextlib.suppress(OSError):  # not print: a signal may come while that is busy
                os.write(STDERR, f"\nfastqat train: {text}\n".encode())
        self.received = number
