"""What the CUDA kernels compile to for sm_90, read from the library without a GPU.

No spills and no local memory, accesses of 16 bytes, IEEE quotients and no contraction; registers and occupancy as the
table in docs/notes/cuda-kernels.md has them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "csrc" / "cuda")]
import cuda_resources  # noqa: E402
import nvcc  # noqa: E402
from cuda_resources import Kernel  # noqa: E402

try:
    COMPILER, CUOBJDUMP = nvcc.find(), cuda_resources.tool("cuobjdump")
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

# Accesses that are not 16 bytes wide, by what is in the name of a kernel.
NARROW = {
    "Any": ("LDG", "STG"),  # any dtypes, an element at a time
    "Dequantize<": ("LDG",),  # codes are bytes, 4 or 8 for a vector of values
    "dequantize_tensor_kernel": ("LDG",),  # as many bytes as a code has bits, for 8 values
    "advance_": ("LDG", "STG"),  # a few numbers
    "dorefa_mend_kernel": ("LDG", "STG"),  # single elements of any dtypes
    "Quantize<": ("STG",),
    "pack_kernel": ("LDG", "STG"),  # 8 codes at a time, packed or not
    "minmax_kernel": ("STG",),  # two numbers for a channel
    "philox_kernel": ("LDG",),  # reads no tensor
    "range_search_kernel": ("LDG", "STG"),  # computes for long on what it has read
}
# Kernels that quantize by vectors, and those that write as many elements as they read, or twice as many.
QUOTIENTS = "plain|tracking|backward|tensor|two_widths|dorefa|dorefa_backward"
MAPS = "plain|tensor|tensor_backward|two_widths|dorefa"


def faults(kernel: Kernel) -> list[str]:
    """Ways in which a kernel breaks the numerics law or the byte budget."""
    ptx, sass = kernel.ptx, kernel.sass
    found = [f"{name}: {size} bytes" for name in ("stack", "local") if (size := getattr(kernel, name))]
    found += [f"local memory: {op}" for op in sorted(set(re.findall(r"\b(?:LDL|STL)\S*", sass)))]
    found += [f"inexact: {op}" for op in sorted(set(re.findall(r"\b\S+\.(?:full|approx|ftz)\S*", ptx)))]
    found += [f"free to contract: {op}" for op in sorted(set(re.findall(r"\b(?:mul|add|sub)\.f(?:32|64)", ptx)))]
    narrow = {op for part, ops in NARROW.items() if part in kernel.name for op in ops}
    found += [f"no {op}.E.128" for op in ("LDG", "STG") if op not in narrow and f"{op}.E.128" not in sass]
    return found


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Every kernel of the library."""
    path = cuda_resources.library()
    if cuda_resources.ARCHITECTURE not in architectures(path):
        pytest.skip(f"{path} was not built for {cuda_resources.ARCHITECTURE}")
    return cuda_resources.kernels(path)


def architectures(path: Path) -> set[str]:
    """Those that a library has code for."""
    return set(re.findall(r"\.(sm_\d+)\.cubin", cuda_resources.ask(CUOBJDUMP, "-lelf", path)))


def test_kernels_are_exact_and_wide_and_spill_nothing(kernels: list[Kernel]) -> None:
    assert kernels
    assert {kernel.name: found for kernel in kernels if (found := faults(kernel))} == {}


def test_quotients_are_exact(kernels: list[Kernel]) -> None:
    """The rounded reciprocal, refined by fma; a division for scales outside of the fast range, and for any dtypes.

    The range search compares errors, and may do with the reciprocal.
    """
    lacking = set()
    for kernel in kernels:
        if re.match(rf"(?:{QUOTIENTS})_kernel|codes_kernel<Quantize", kernel.name):
            wanted = ["div"] if "Any" in kernel.name else ["div", "rcp", "fma"]
            lacking |= {f"{kernel.name}: {op}" for op in wanted if f"{op}.rn.f32" not in kernel.ptx}
    assert lacking == set()


def test_what_is_read_by_vectors_is_written_by_vectors(kernels: list[Kernel]) -> None:
    """As many bytes by accesses of 16: the compiler splits one where it loses sight of its alignment."""
    sizes, judged = {"float": 4, "BFloat16": 2, "Float16": 2}, 0
    for kernel in kernels:
        if made := re.match(rf"({MAPS})_kernel<(\w+), (\w+)(, true)?", kernel.name):
            kind, first, second, pair = made.groups()
            read, written = (second, first) if kind == "tensor_backward" else (first, second)
            loads, stores = (len(re.findall(rf"\b{op}\.E\.128", kernel.sass)) for op in ("LDG", "STG"))
            results = 2 if kind == "two_widths" or (kind == "dorefa" and pair) else 1
            assert loads * sizes[written] * results == stores * sizes[read] > 0, kernel.name
            judged += 1
    assert judged == 10 + 15 + 10 + 5 + 20


def test_the_table_in_the_notes_is_of_this_code(kernels: list[Kernel]) -> None:
    """Made anew by ``python scripts/cuda_resources.py --write``."""
    kept, version = cuda_resources.committed(), nvcc.version(COMPILER)
    if (made := re.search(r"by nvcc ([\d.]+)\. ", kept)) and made.group(1) != version:
        pytest.skip(f"the table is of nvcc {made.group(1)}, and here is {version}")
    assert kept == cuda_resources.table(kernels, version)


PROBES = """
__global__ void exact(const float* x, float* y) { y[0] = x[0] * x[1] + x[2]; y[1] = x[3] / x[4]; }
__global__ void local(const int* i, float* y) {
  float kept[64];
  for (int k = 0; k < 64; ++k) kept[k] = y[k];
  for (int k = 0; k < 64; ++k) y[k] = kept[i[k]];
}
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    """Small kernels as compiled with the flags of the library, and one as it must not be."""
    folder = tmp_path_factory.mktemp("probes")
    (folder / "probes.cu").write_text(PROBES)
    found = {}
    for name, flags in {"lawful": [], "fast": ["-fmad=true", "-use_fast_math"]}.items():
        made = folder / f"{name}.fatbin"
        flags = [*(flag for flag in nvcc.FLAGS if not (flags and "fmad" in flag)), *flags, *nvcc.targets([90])]
        subprocess.run([COMPILER, *flags, "-fatbin", "probes.cu", "-o", made], cwd=folder, check=True)
        found |= {f"{name} {kernel.name}": kernel for kernel in cuda_resources.kernels(made)}
    return found


def test_the_flags_neither_contract_nor_approximate(probes: dict[str, Kernel]) -> None:
    """x * y + z is a product and a sum, x / y a division."""
    ptx = probes["lawful exact"].ptx
    assert re.findall(r"\b(?:mul|add|fma|div)\.\S+f32", ptx) == ["mul.rn.f32", "add.rn.f32", "div.rn.f32"]
    assert faults(probes["lawful exact"]) == ["no LDG.E.128", "no STG.E.128"]


def test_what_breaks_the_law_is_found(probes: dict[str, Kernel]) -> None:
    """The same with --use_fast_math, arrays in local memory, and products that ptxas may contract."""
    found = faults(probes["fast exact"])
    assert any(re.match(r"inexact: div\.approx", fault) for fault in found), found
    assert any(fault.startswith("stack: ") for fault in faults(probes["lawful local"]))
    assert any(fault.startswith("local memory: LDL") for fault in faults(probes["lawful local"]))
    kernel = probes["lawful exact"]
    free = replace(kernel, ptx=kernel.ptx.replace("mul.rn.f32", "mul.f32"))
    assert "free to contract: mul.f32" in faults(free)


# Asks CUDA's own arithmetic, which needs no GPU.
OCCUPANCY = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  cudaOccDeviceProp device;
  device.computeMajor = 9; device.computeMinor = 0;
  device.maxThreadsPerBlock = 1024; device.maxThreadsPerMultiprocessor = 2048;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 49152; device.sharedMemPerMultiprocessor = 233472;
  device.reservedSharedMemPerBlock = 1024; device.sharedMemPerBlockOptin = 232448;
  device.numSms = 132;
  int registers, shared, threads;
  while (scanf("%d %d %d", &registers, &shared, &threads) == 3) {
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024; kernel.numRegs = registers; kernel.sharedSizeBytes = shared;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; kernel.maxDynamicSharedSizeBytes = 232448;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0)) return 1;
    printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_is_what_cuda_says(tmp_path: Path) -> None:
    """For many registers, sizes of shared memory and of blocks."""
    (tmp_path / "ask.cpp").write_text(OCCUPANCY)
    subprocess.run([COMPILER, "ask.cpp", "-o", "ask"], cwd=tmp_path, check=True)
    asked = [(r, s, t) for r in range(16, 129, 8) for s in (0, 4096, 16444, 40000) for t in (32, 96, 256, 512)]
    text = "\n".join(" ".join(map(str, each)) for each in asked)
    answers = list(map(int, cuda_resources.ask(tmp_path / "ask", text=text).split()))
    for (registers, shared, threads), blocks in zip(asked, answers, strict=True):
        taken = shared + 1024 if shared else 0  # as cuobjdump says it
        kernel = Kernel("", registers, 0, 0, taken, threads, "", "")
        assert kernel.blocks == blocks, (registers, shared, threads)
