"""What the CUDA kernels take of a GPU, read from the library without one: ``python scripts/cuda_resources.py``.

Prints registers, shared memory and occupancy of each kernel on sm_90 as a table; with ``--write`` the table goes to its
place in docs/notes/cuda-kernels.md. The tests compare the two, and judge the code that is read here.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import nvcc  # noqa: E402

NOTE = ROOT / "docs" / "notes" / "cuda-kernels.md"
BEGIN, END = "<!-- made by scripts/cuda_resources.py -->", "<!-- end -->"
# Limits of a multiprocessor of sm_90. Registers are given to warps by 256 and belong to one of 4 schedulers.
ARCHITECTURE = "sm_90"
REGISTERS, SHARED, THREADS, BLOCKS, WARP, SCHEDULERS = 65536, 228 * 1024, 2048, 32, 32, 4


@dataclass(frozen=True)
class Kernel:
    """A kernel as it was compiled: bytes of memory in `stack`, `local` and `shared`, registers of a thread."""

    name: str
    registers: int
    stack: int
    local: int
    shared: int  # with the 1 KiB that the system takes for each block
    threads: int
    ptx: str
    sass: str

    @property
    def blocks(self) -> int:
        """Blocks that reside on a multiprocessor at a time."""
        warps = -(-self.threads // WARP)
        per_warp = -(-self.registers * WARP // 256) * 256
        by_registers = REGISTERS // SCHEDULERS // per_warp * SCHEDULERS // warps
        by_shared = SHARED // (-(-self.shared // 128) * 128) if self.shared else BLOCKS
        return min(BLOCKS, THREADS // (warps * WARP), by_registers, by_shared)

    @property
    def occupancy(self) -> float:
        """Share of the warps of a multiprocessor that are in use."""
        return self.blocks * self.threads / THREADS


def library() -> Path:
    """The compiled library.

    Raises:
        FileNotFoundError: it was not built; the message says why, where that is known.
    """
    path = ROOT / "fastqat" / "_C_cuda.abi3.so"
    if not path.exists():
        why = path.with_name("_C_cuda.not-built.txt")
        raise FileNotFoundError(f"{path}: not built; {why.read_text().strip() if why.exists() else 'reason unknown'}")
    return path


def tool(name: str) -> str:
    """Path of cuobjdump or ptxas: of CUDA, or of Triton, whose package has them too.

    Raises:
        FileNotFoundError: neither is there.
    """
    folders = ["/usr/local/cuda/bin"]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which(name) or next(filter(None, (shutil.which(name, path=each) for each in folders)), None)
    if found is None:
        raise FileNotFoundError(f"there is no {name} on the PATH, in {' or '.join(folders)}")
    return found


def ask(*command: str | Path, text: str | None = None) -> str:
    """What a command prints."""
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def short(demangled: str) -> str:
    """Name of a kernel with its template arguments, without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\bfastqat::|\bcuda::|^void ", "", demangled)
    name = re.sub(r"\(\w+\)(-?\d+)", r"\1", name)  # (Kind)2 -> 2
    return name.partition("(")[0]


def kernels(path: Path) -> list[Kernel]:
    """Every kernel of a library or an object, as compiled for sm_90, by name.

    Args:
        path: what nvcc has made, with code for sm_90 and PTX.
    """
    cuobjdump = tool("cuobjdump")
    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        ask(cuobjdump, "-arch", ARCHITECTURE, "-res-usage", path),
    )
    sass = dict(_parts(r"\t\tFunction : (\w+)\n", ask(cuobjdump, "-arch", ARCHITECTURE, "-sass", path)))
    ptx = dict(_parts(r"\.entry (\w+)\(", ask(cuobjdump, "-ptx", path)))
    names = ask("c++filt", text="\n".join(mangled for mangled, *_ in usage)).splitlines()
    found = []
    for name, (mangled, registers, stack, shared, local) in zip(names, usage, strict=True):
        limit = re.search(r"\.maxntid (\d+)", ptx[mangled])
        threads = int(limit.group(1)) if limit else 1024
        numbers = int(registers), int(stack), int(local), int(shared), threads
        found.append(Kernel(short(name), *numbers, ptx[mangled], sass[mangled]))
    return sorted(found, key=lambda kernel: kernel.name)


def _parts(begin: str, text: str) -> list[tuple[str, str]]:
    """Name and text of each part of a listing."""
    _, *parts = re.split(begin, text)
    return list(zip(parts[::2], parts[1::2], strict=True))


def table(found: list[Kernel], version: str) -> str:
    """The kernels as a Markdown table; version: of the nvcc that compiled them."""
    lines = [
        f"For sm_90, by nvcc {version}. Shared memory: bytes of a block. Blocks and occupancy: of a multiprocessor.",
        "",
        "| kernel | threads | registers | shared | blocks | occupancy |",
        "|---|---|---|---|---|---|",
    ]
    for kernel in found:
        numbers = f"{kernel.threads} | {kernel.registers} | {kernel.shared} | {kernel.blocks} | {kernel.occupancy:.0%}"
        lines.append(f"| `{kernel.name}` | {numbers} |")
    return "\n".join(lines)


def committed() -> str:
    """The table in the note."""
    return NOTE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def main() -> int:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description="Registers, shared memory and occupancy of the CUDA kernels.")
    parser.add_argument("--write", action="store_true", help=f"put the table into {NOTE.relative_to(ROOT)}")
    write = parser.parse_args().write
    path = library()
    made = table(kernels(path), nvcc.version(nvcc.find()))
    if not write:
        print(made)
        return 0
    before, begin, rest = NOTE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        print(f"{NOTE} has no place for the table: the lines {BEGIN} and {END}", file=sys.stderr)
        return 1
    NOTE.write_text(f"{before}{begin}\n{made}\n{end}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
