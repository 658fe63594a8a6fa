"""What the Triton kernels compile to for an A100, an H100 and a B200, found out without a GPU.

Run as a script, this file launches the ops with a compiler in the place of the launcher and prints the code as JSON.
The tests do so in a process of its own, because this one may have the interpreter switched on (TRITON_INTERPRET).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent


def compile_cases(capability: int) -> dict[str, dict[str, str]]:
    """PTX and SASS of the first kernel of each case, for a GPU of this capability, 90 for 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        """As much of a driver as compilation asks for."""

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    compiled, options = [], {}
    run = JITFunction.run

    def only_compile(kernel, *arguments, grid, warmup, **constants):
        compiled.append(run(kernel, *arguments, grid=grid, warmup=True, **constants | options))

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = only_compile
    cases = {}
    for name, call in calls().items():
        compiled.clear()
        options["enable_fp_fusion"] = name == "contracted"
        call()
        cases[name] = {form: compiled[0].asm[form] for form in ("ptx", "sass")}
    return cases


def calls() -> dict[str, Callable[[], object]]:
    """The cases: ops as a user would launch them, and three that the checks below must not accept."""
    from fastqat.ops import triton as ops

    qrange = torch.tensor([-8, 7], dtype=torch.int32)

    def case(op: str, dtype: torch.dtype, axis: int | None, shift: str | None = None, first: int = 0) -> Callable:
        x = torch.zeros(64 * 4608 + first, dtype=dtype)[first:].view(64, 4608)
        scale = torch.ones(1 if axis is None else x.shape[axis])
        shifts = (scale if shift == name else None for name in ("zero_point", "offset"))
        grid = (scale, *shifts, qrange, axis, 1e-8)
        y, sums = torch.empty_like(x), (torch.empty_like(scale), torch.empty(scale.numel() if shift else 0))
        return {
            "fake_quantize": lambda: ops.fake_quantize(x, *grid, None, y),
            "fake_quantize_backward": lambda: ops.fake_quantize_backward(y, x, *grid, True, True, 0.0, y, *sums),
            "quantize": lambda: ops.quantize(x, *grid, torch.int8, y.to(torch.int8)),
            "minmax": lambda: ops.minmax(x, axis, torch.empty_like(scale), torch.empty_like(scale)),
        }[op]

    made = {f"{op}-{dtype}": case(op, getattr(torch, dtype), 0, "zero_point") for op, dtype in FMA}
    made |= {f"{name}-{dtype}": many(name, getattr(torch, dtype)) for name, dtype in MANY}
    made |= {f"{name}-{dtype}": one(name, getattr(torch, dtype)) for name, dtype in ONE}
    made |= {f"{name}-{dtype}": two(name, getattr(torch, dtype)) for name, dtype in TWO}
    made["offset"] = case("fake_quantize", torch.float32, None, "offset")
    made["contracted"] = case("fake_quantize", torch.float32, None, "offset")
    made["unaligned"] = case("fake_quantize", torch.float32, None, first=1)
    made["bare division"] = lambda: bare_division_kernel[(1,)](qrange.new_zeros(1024).float(), torch.empty(1024))
    return made


def many(name: str, dtype: torch.dtype) -> Callable[[], object]:
    """A call of an op on many tensors with one tensor, tracked, and for the gradient what the name says."""
    from fastqat.ops import estimators, words
    from fastqat.ops import triton as ops

    x, none = torch.zeros(64, 4608, dtype=dtype), torch.empty(0)
    scale, qrange, step = torch.ones(64), torch.tensor([-4, 3], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    word, one = torch.zeros_like(x, dtype=words.dtype_of(3)), torch.ones(1)
    grid = ([scale], [none], [none], [qrange], [0], [1e-8], [3], [-1], [step])
    if name == "tracked":
        like = torch.zeros_like(x, dtype=torch.float32)
        state = (word, like, like.clone(), torch.zeros(5, dtype=torch.int64), torch.zeros(3, dtype=torch.float64))
        options = ([0.01], [1], [one], True, *([t] for t in state), [torch.empty_like(x)])
        return lambda: ops.multi_tensor_fake_quantize([x], *grid, *options)
    number = estimators.ESTIMATORS[name][0]
    options = ([1], [0], [number], [one], [one], [word], [torch.empty_like(x)], [scale.clone()], [none])
    return lambda: ops.multi_tensor_fake_quantize_backward([x.clone()], [x], *grid, *options)


def one(name: str, dtype: torch.dtype) -> Callable[[], object]:
    """A call of an op on one tensor with one scale, for what the name says."""
    from fastqat.ops import triton as ops

    x, none, seed = torch.zeros(64 * 4608, dtype=dtype), torch.empty(0), 5
    y, scale, qrange = torch.empty_like(x), torch.ones(1), torch.tensor([0, 15], dtype=torch.int32)
    inside, above, codes = (torch.empty(x.numel() * bits // 8, dtype=torch.uint8) for bits in (1, 1, 4))
    low, high, limit = (torch.ones(1) for _ in range(3))
    step, beyond = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
    grid, nearest, drawn = (scale, None, None, qrange, 1e-8), (seed, -1, none), (seed, 3, step)

    def forward(clip: float, noise: tuple, limit: torch.Tensor, code_bits: int, *made: torch.Tensor) -> None:
        ops.fake_quantize_tensor(x, *grid, clip, True, *noise, limit, code_bits, *made, y)

    return {
        "observed": lambda: forward(0.0, nearest, none, 0, low, high, none, inside, none, none),
        "clipped": lambda: forward(6.0, nearest, none, 4, none, none, none, inside, above, codes),
        "noise": lambda: forward(0.0, drawn, limit, 0, none, none, beyond, none, none, none),
        "backward": lambda: ops.fake_quantize_tensor_backward(x, inside, above, qrange, y, limit),
        "dequantize": lambda: ops.dequantize_tensor(codes, *grid, 4, y),
    }[name]


def two(name: str, dtype: torch.dtype) -> Callable[[], object]:
    """A call of an op on a weight at two bit-widths, for what the name says."""
    from fastqat.ops import triton as ops

    x, none, one = torch.zeros(64, 4608, dtype=dtype), torch.empty(0), torch.ones(1)
    first, second, sums = torch.empty_like(x), torch.empty_like(x), torch.empty((2, 2), dtype=torch.int64)
    scales, qranges = torch.ones(2, 64), torch.tensor([[-4, 3], [-8, 7]], dtype=torch.int32)
    weight = (x, one, one, torch.tensor([15, 7], dtype=torch.int32))
    return {
        "pair": lambda: ops.fake_quantize_two_widths(x, scales, scales, None, qranges, 0, 1e-8, first, second),
        "dorefa": lambda: ops.dorefa_fake_quantize(*weight, none, first, none),
        "dorefa pair": lambda: ops.dorefa_fake_quantize(*weight, sums, first, second),
        "dorefa backward": lambda: ops.dorefa_fake_quantize_backward(first, x, one, one, one, second),
    }[name]


@triton.jit
def bare_division_kernel(x_ptr, y_ptr):
    """What the kernels must not do: Triton's / on float32 is approximate. x, y: [1024]."""
    i = tl.arange(0, 1024)
    tl.store(y_ptr + i, tl.load(x_ptr + i) / 3.0)


# Explicit fma of each kernel: elements of a thread times those of one element. Forward: two for the quotient on the
# fast path. Backward: one more for the term of ds, and that one on the slow path as well.
FMA = {
    ("fake_quantize", "float32"): 16 * 2,
    ("fake_quantize", "bfloat16"): 16 * 2,
    ("fake_quantize_backward", "float32"): 8 * 4,
    ("fake_quantize_backward", "bfloat16"): 8 * 4,
    ("quantize", "float32"): 16 * 2,
    ("quantize", "bfloat16"): 16 * 2,
    ("minmax", "float32"): 0,
    ("minmax", "bfloat16"): 0,
}


# The same for the ops on many tensors: dampening takes one more, and so does a factor, whose product is rounded; a
# sigmoid eight, and its peak once eight in a thread.
MANY = {
    ("tracked", "float32"): 8 * 2,
    ("tracked", "bfloat16"): 8 * 2,
    ("ste", "float32"): 8 * (4 + 2),
    ("ste", "bfloat16"): 8 * (4 + 2),
    ("ewgs", "float32"): 8 * (4 + 2 + 2),
    ("sigmoid", "float32"): 8 * (4 + 2 + 2 + 2 * 8) + 2 * 8,
    ("psg", "float32"): 8 * (4 + 2 + 2),
    ("pact", "bfloat16"): 8 * (4 + 2),
}


# The same for the ops on one tensor with one scale.
ONE = {
    ("observed", "float32"): 8 * 2,
    ("clipped", "bfloat16"): 16 * 2,
    ("noise", "bfloat16"): 0,  # divides
    ("backward", "float32"): 0,
    ("dequantize", "bfloat16"): 0,
}

# The same for the ops on two bit-widths: two for each quotient by a scale, or by DoReFa's tanh(m) and 2^bits - 1.
TWO = {
    ("pair", "float32"): 16 * 2 * 2,
    ("pair", "bfloat16"): 16 * 2 * 2,
    ("dorefa", "float32"): 16 * (2 + 2),
    ("dorefa pair", "bfloat16"): 16 * (2 + 2 * 2),
    ("dorefa backward", "float32"): 16 * 2 * 2,
}


def faults(
    code: dict[str, str], fma: int, exact_quotients: bool = True, stores: bool = True, loads: bool = True
) -> list[str]:
    """Ways in which a kernel breaks the numerics law or the byte budget.

    Args:
        code: its PTX and SASS.
        fma: how many explicit ones there are on float32; any more are contractions.
        exact_quotients: whether there must be a division, of scales outside the fast range.
        stores: whether it writes a tensor as large as x.
        loads: whether it reads one.
    """
    ptx, sass = code["ptx"], code["sass"]
    found = [f"inexact: {op}" for op in sorted(set(re.findall(r"\b(?:div|rcp)\.(?:full|approx)\S*|\S+\.ftz\S*", ptx)))]
    found += [f"free to contract: {op}" for op in sorted(set(re.findall(r"\b(?:mul|add|sub)\.f(?:32|64)", ptx)))]
    if (count := sum(2 if pair else 1 for pair in re.findall(r"\bfma\.rn\.f32(x2)?\b", ptx))) != fma:
        found.append(f"{count} fma instead of {fma}")
    if exact_quotients and "div.rn.f32" not in ptx:
        found.append("no exact division")
    if loads and ("ld.global.v4.b32" not in ptx or "LDG.E.128" not in sass):
        found.append("no 16-byte load")
    if stores and ("st.global.v4.b32" not in ptx or "STG.E.128" not in sass):
        found.append("no 16-byte store")
    found += [f"local memory: {op}" for op in sorted(set(re.findall(r"\b(?:LDL|STL)\S*", sass)))]
    return found


@pytest.fixture(scope="module", params=(80, 90, 100))
def compiled(request: pytest.FixtureRequest) -> dict[str, dict[str, str]]:
    """PTX and SASS of each case."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, __file__, str(request.param)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("op", "dtype"), FMA)
def test_kernel_is_exact_and_wide(compiled: dict[str, dict[str, str]], op: str, dtype: str) -> None:
    """16-byte accesses, exact quotients, no contraction, no local memory."""
    minmax = op == "minmax"
    code = compiled[f"{op}-{dtype}"]
    assert faults(code, FMA[op, dtype], exact_quotients=not minmax, stores=not minmax) == []


@pytest.mark.parametrize(("name", "dtype"), MANY)
def test_kernel_on_many_tensors_is_exact_and_wide(compiled: dict[str, dict[str, str]], name: str, dtype: str) -> None:
    """The same of tracking, and of gradients with frozen weights, dampening and an estimator."""
    code = compiled[f"{name}-{dtype}"]
    assert faults(code, MANY[name, dtype]) == []
    assert "ld.global.b8" not in code["ptx"], "the words of a thread are not read in one access"


@pytest.mark.parametrize(("name", "dtype"), ONE)
def test_kernel_on_one_tensor_is_exact_and_wide(compiled: dict[str, dict[str, str]], name: str, dtype: str) -> None:
    """The same of what one read gives, of its gradient and its inverse; no floor that takes subnormals for 0."""
    code, quantizes = compiled[f"{name}-{dtype}"], name in ("observed", "clipped", "noise")
    assert faults(code, ONE[name, dtype], exact_quotients=quantizes, loads=name != "dequantize") == []
    single = re.findall(r"\b(?:ld|st)\.global\.b8", code["ptx"])
    assert len(single) == (name == "observed"), "the bytes of a thread are not moved in one access"  # it has one there


@pytest.mark.parametrize(("name", "dtype"), TWO)
def test_kernel_of_two_widths_is_exact_and_wide(compiled: dict[str, dict[str, str]], name: str, dtype: str) -> None:
    """The same of two results of one read, of DoReFa's, whose tanh is a polynomial, and of its gradient."""
    assert faults(compiled[f"{name}-{dtype}"], TWO[name, dtype]) == []


def test_offset_grid_rounds_twice(compiled: dict[str, dict[str, str]]) -> None:
    """s * level + o is no fma."""
    assert faults(compiled["offset"], 32) == []


def test_contraction_is_found(compiled: dict[str, dict[str, str]]) -> None:
    """The same kernel with enable_fp_fusion=True: one more fma for each of 16 elements on both paths."""
    found = faults(compiled["contracted"], 32)
    assert any(re.match(r"\d+ fma instead of 32", fault) for fault in found), found


def test_narrow_access_is_found(compiled: dict[str, dict[str, str]]) -> None:
    """A tensor that begins 4 bytes off a 16-byte boundary."""
    assert faults(compiled["unaligned"], 32) == ["no 16-byte load"]


def test_approximate_division_is_found(compiled: dict[str, dict[str, str]]) -> None:
    """A kernel with a bare division."""
    assert re.fullmatch(r"inexact: div\.(full|approx)\.f32", faults(compiled["bare division"], 0)[0])


if __name__ == "__main__":
    print(json.dumps(compile_cases(int(sys.argv[1]))))
