"""Builds csrc/cuda for the CPU, over the header beside this file, into a library outside of the package.

Objects are kept under build/cuda_on_host of the repository, each under a name that depends on all that it is made from.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "cuda_on_host"

CXX = "g++"  # whose checks of bounds include the last array of a struct
FLAGS = (
    *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-U_FORTIFY_SOURCE", "-w", "-DFASTQAT_CUDA_ON_HOST"),
)
FOLDERS = (f"-I{HERE}", f"-I{ROOT / 'csrc' / 'cuda'}")  # not in the names of objects: a copy of the tree can use them
# Undefined behaviour is an error of the kernel: machine.cpp has what these checks call.
KERNEL_FLAGS = (*("-O1", "-fsanitize=alignment,bounds-strict,shift", "-fno-sanitize-recover=all"),)


def why_not() -> str | None:
    """None if kernels can be built and run here, else the reason."""
    if sys.platform != "linux":
        return f"its fibers and its memory are those of Linux, not of {sys.platform}"
    return None if shutil.which(CXX) else f"there is no {CXX}"


def torch_flags() -> tuple[str, ...]:
    """What the glue needs to be compiled: torch's headers and Python's, as setup.py asks for them."""
    from torch.utils import cpp_extension

    paths = (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])
    versions = ("-DPy_LIMITED_API=0x030a0000", "-DTORCH_TARGET_VERSION=0x020a000000000000")
    return (*(f"-I{path}" for path in paths), *versions)


def torch_links() -> tuple[str, ...]:
    """What the library is linked with."""
    from torch.utils import cpp_extension

    paths = cpp_extension.library_paths()
    return (*(f"-L{p}" for p in paths), *(f"-Wl,-rpath,{p}" for p in paths), "-ltorch", "-ltorch_cpu", "-lc10")


def headers() -> bytes:
    """Digest of everything that a source may include."""
    folders = (HERE, ROOT / "csrc", ROOT / "csrc" / "cuda")
    files = sorted(f for folder in folders for f in folder.iterdir() if f.suffix in (".h", ".cuh"))
    return digest(*(f.read_bytes() for f in files))


def digest(*parts: bytes) -> bytes:
    """One digest of several byte strings."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def run(*command: str) -> None:
    """Run a compiler.

    Raises:
        RuntimeError: it fails; the message is what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def compiled(source: Path) -> Path:
    """The object of one source, compiled where it is not there yet.

    Raises:
        RuntimeError: the compiler fails, or the source was changed meanwhile.
    """
    kernels, glue = source.suffix == ".cu", source.parent != HERE
    flags = (*FLAGS, *(KERNEL_FLAGS if kernels else torch_flags() if glue else ("-O2",)))

    def key() -> str:
        return digest(source.read_bytes(), headers(), " ".join((CXX, torch.__version__, *flags)).encode()).hex()[:16]

    before = key()
    target = CACHE / f"{source.name}.{before}.o"
    if not target.exists():
        run(CXX, *flags, *FOLDERS, *(("-x", "c++") if kernels else ()), "-c", str(source), "-o", f"{target}.new")
        if key() != before:
            raise RuntimeError(f"{source} was changed while it was compiled")
        os.replace(f"{target}.new", target)
    return target


def library(name: str, sources: Iterable[Path], links: tuple[str, ...] = ()) -> Path:
    """Build a shared library, with as many compilers at a time as there are processors.

    Args:
        name: of the library.
        sources: .cu files, kernels; .cpp files, which see torch's headers unless they lie beside this file.
        links: what the linker is told besides.

    Raises:
        RuntimeError: a compiler fails.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may want the same
        objects = list(pool.map(compiled, [HERE / "machine.cpp", *sources]))
        target = CACHE / f"{name}.{digest(*(o.name.encode() for o in objects)).hex()[:16]}.so"
        if not target.exists():
            command = (CXX, "-shared", "-Wl,--no-undefined", *map(str, objects), *links)
            run(*command, "-o", f"{target}.new")
            os.replace(f"{target}.new", target)
        forget_old(name, objects, target)
    return target


def forget_old(name: str, objects: list[Path], target: Path) -> None:
    """Remove what earlier sources were built into."""
    for new in (*objects, target):
        stem, _, suffix = new.name.rsplit(".", 2)
        for old in CACHE.glob(f"{stem}.*.{suffix}"):
            if old != new:
                old.unlink()


def kernels() -> Path:
    """The library of all that csrc/cuda has."""
    folder = ROOT / "csrc" / "cuda"
    return library("kernels", sorted((*folder.glob("*.cu"), *folder.glob("*.cpp"))), torch_links())


def probes() -> Path:
    """The library of the kernels by which the tests judge the machine."""
    return library("probes", [HERE / "probes.cu"])
