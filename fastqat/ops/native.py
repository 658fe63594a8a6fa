"""The compiled libraries ``fastqat._C`` (C++, CPU) and ``fastqat._C_cuda`` (CUDA C++): loaded, or why not."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = Path(__file__).resolve().parent.parent


class Library:
    """A library that registers its kernels with the dispatcher when it is imported.

    Args:
        name: module in the package.
        language: what it is written in.
    """

    def __init__(self, name: str, language: str) -> None:
        self.name = name
        self.title = f"the {language} library fastqat.{name}"
        self.module: ModuleType | None = None
        self.reason: str | None = "not loaded yet"

    def load(self) -> None:
        """Import it where it can run; never raises."""
        try:
            self.module = importlib.import_module(f"fastqat.{self.name}")
            self.reason = None
        except ModuleNotFoundError:
            self.reason = f"{self.title} was not built"
            if (why := PACKAGE / f"{self.name}.not-built.txt").exists():  # written by setup.py
                self.reason += f": {why.read_text().strip()}"
        except ImportError as error:
            self.reason = f"{self.title} cannot be loaded: {error}"

    def why_not(self) -> str | None:
        """None if its kernels run here, else the reason."""
        return self.reason

    def state(self) -> str:
        """Whether it is there and loaded."""
        if self.module is not None:
            return "loaded"
        return "built, not loaded" if [*PACKAGE.glob(f"{self.name}.*.so")] else "not built"


class CudaLibrary(Library):
    """The library for NVIDIA GPUs: torch must have CUDA, and the library code for every GPU."""

    def load(self) -> None:
        """Import it where torch sees a GPU; never raises, and touches no GPU."""
        if torch.version.cuda is None:
            self.reason = f"torch {torch.__version__} has no CUDA"
        elif not torch.cuda.is_available():
            self.reason = "there is no CUDA device"
        else:
            super().load()
        if self.module is not None:
            self.reason = self._why_no_code(self.module)

    def _why_no_code(self, module: ModuleType) -> str | None:
        try:
            capabilities = module.capabilities()
        except RuntimeError as error:  # the driver may be too old for the runtime in the library
            return f"{self.title} cannot run: {error}"
        lacking = [f"cuda:{i} ({dotted(each)})" for i, each in enumerate(capabilities) if not self.has_code(each)]
        return f"{self.title} has no code for {', '.join(lacking)}, only {self.state()}" if lacking else None

    def built(self) -> list[int]:
        """Capabilities that it has code for, as 90 for 9.0."""
        return list(map(int, self.module.architectures.split())) if self.module else []

    def has_code(self, capability: int) -> bool:
        """Whether it has code for GPUs of a capability: of their generation and no newer, or PTX of an older one."""
        if any(b // 10 == capability // 10 and b <= capability for b in self.built()):
            return True
        return self.module is not None and capability >= self.module.ptx

    def state(self) -> str:
        """Whether it is there and loaded, for which capabilities, and by which compiler."""
        if self.module is None:
            return super().state()
        newer = f"and as PTX from {dotted(self.module.ptx)}"
        return f"for capability {', '.join(map(dotted, self.built()))}, {newer}, by nvcc {self.module.compiler}"


def dotted(capability: int) -> str:
    """A capability as CUDA writes it: 90 -> "9.0"."""
    return f"{capability // 10}.{capability % 10}"


cpu = Library("_C", "C++")
cuda = CudaLibrary("_C_cuda", "CUDA C++")
