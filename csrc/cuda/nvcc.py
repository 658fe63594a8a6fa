"""nvcc: where it is, for which GPUs it compiles, and with which flags. For setup.py, and the tests of the code.

As a script it compiles every .cu file for the architectures that are wanted, and keeps nothing: CI does so for all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ALL = [75, 80, 86, 89, 90, 100, 120]
DEFAULT = [90]
# The kernels use nothing that came after these, so that one front end serves all architectures up to the next.
VIRTUAL = [75, 80, 90]
# Numerics law: no contraction, and no fast-math.
FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr"]
HOST_FLAGS = ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off"]
# CUDA's runtime becomes part of the library, which exports none of it: torch has one of its own, perhaps an older one.
# libtorch_cuda is recorded as needed, although what it is linked against here is empty.
LINK_FLAGS = ["-shared", "-nodlink", "-cudart=static", "-Xlinker=--no-as-needed"]
STUB = "libtorch_cuda.so"


def find() -> str:
    """Path of nvcc: in $CUDA_HOME, on the PATH, or in /usr/local/cuda.

    Raises:
        FileNotFoundError: there is none, or no C++ compiler for it to work with.
    """
    home = os.environ.get("CUDA_HOME")
    for path in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and os.access(path, os.X_OK):
            if not (shutil.which("g++") or os.environ.get("NVCC_CCBIN")):
                raise FileNotFoundError(f"{path} needs a C++ compiler: there is no g++ on the PATH, and no $NVCC_CCBIN")
            return path
    raise FileNotFoundError("there is no nvcc in $CUDA_HOME/bin, on the PATH, or in /usr/local/cuda/bin")


def ask(*command: str) -> str:
    """What a command prints.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be run, or fails.
    """
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def version(nvcc: str) -> str:
    """Version of nvcc, such as "13.0.88"."""
    found = re.search(r"\bV([\d.]+)", ask(nvcc, "--version"))
    return found.group(1) if found else "unknown"


def known(nvcc: str) -> set[int]:
    """Architectures that this nvcc can compile for."""
    return {int(number) for number in re.findall(r"sm_(\d+)\b", ask(nvcc, "--list-gpu-code"))}


def present() -> list[int]:
    """Architectures of the GPUs of this machine; empty where there is none."""
    try:
        capabilities = ask("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()
        return sorted({int(capability.replace(".", "")) for capability in capabilities})
    except (OSError, subprocess.SubprocessError, ValueError):  # not installed, or it finds no driver
        import torch

        devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        return sorted({10 * major + minor for major, minor in map(torch.cuda.get_device_capability, devices)})


def wanted() -> list[int]:
    """Architectures that $FASTQAT_CUDA_ARCHS names ("all", or "80 90"), else those of the GPUs present, else 90.

    Raises:
        ValueError: the variable holds something else.
    """
    text = os.environ.get("FASTQAT_CUDA_ARCHS", "").strip()
    if text == "all":
        return ALL
    words = re.split(r"[ ,;]+", text) if text else []
    if not all(word.isdigit() for word in words):
        raise ValueError(f"FASTQAT_CUDA_ARCHS: wanted 'all' or numbers such as '80 90', got {text!r}")
    return sorted({int(word) for word in words}) or present() or DEFAULT


def architectures(nvcc: str) -> list[int]:
    """Those wanted, as far as this nvcc knows them; where it knows none, the newest older one, for the sake of its PTX.

    Raises:
        ValueError: the environment asks for something else than architectures, or there is none so old.
    """
    asked, can = wanted(), known(nvcc)
    if missing := [a for a in asked if a not in can]:
        print(f"fastqat: {nvcc} does not know {', '.join(f'sm_{a}' for a in missing)}")
    if chosen := [a for a in asked if a in can] or sorted(a for a in can if a < asked[0])[-1:]:
        return chosen
    raise ValueError(f"{nvcc} knows nothing as old as sm_{asked[0]}")


def virtual(architecture: int) -> int:
    """Architecture that the front end compiles for."""
    return max((v for v in VIRTUAL if v <= architecture), default=architecture)


def targets(chosen: list[int]) -> list[str]:
    """Flags for code of each architecture, and PTX of the last one for other GPUs that are newer."""
    forms = {v: [f"sm_{a}" for a in chosen if virtual(a) == v] for v in map(virtual, chosen)}
    forms[virtual(chosen[-1])].append(f"compute_{virtual(chosen[-1])}")
    return [f"-gencode=arch=compute_{v},code=[{','.join(codes)}]" for v, codes in forms.items()]


def compile_command(nvcc: str, chosen: list[int]) -> list[str]:
    """Begin of the command that compiles a .cu file."""
    return [nvcc, *FLAGS, *HOST_FLAGS, *targets(chosen)]


def link_command(nvcc: str, objects: list[str], library_dirs: list[str], folder: Path, made: str) -> list[str]:
    """Command that links a library, after making an empty libtorch_cuda in `folder` for it to be linked against.

    A library built where torch has no CUDA then runs where it has, and both are linked in the same way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stub = folder / STUB
    ask(nvcc, "-shared", "-cudart=none", f"-Xlinker=-soname={STUB}", "-o", str(stub), "-x", "c++", os.devnull)
    paths = [f"-L{path}" for path in (folder, *library_dirs)]
    return [nvcc, *LINK_FLAGS, *objects, *paths, "-ltorch_cuda", "-ltorch_cpu", "-lc10", "-o", made]


def main() -> int:
    """Compile all kernels, without what calls them; 1 where one fails, 0 also where there is no nvcc."""
    try:
        nvcc = find()
    except FileNotFoundError as error:
        print(error)
        return 0
    chosen, failed = architectures(nvcc), False
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(Path(__file__).resolve().parent.glob("*.cu")):
            command = [nvcc, *FLAGS, *targets(chosen), "-fatbin", str(source), "-o", f"{folder}/kernels"]
            bad = subprocess.run(command).returncode != 0
            print(f"{source.name} {'fails' if bad else 'compiles'} for {' '.join(map(str, chosen))}", flush=True)
            failed |= bad
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
