"""An independent oracle: the equations of the numerics law in numpy and Python integers. It calls no code of fastqat.

One function per op, named and called like it; the result is a tuple with a tensor for each exact result and a
:class:`Within` for each sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

F32, F64 = np.float32, np.float64


@dataclass
class Within:
    """A float64 value and how far a correct result may be from it, element by element."""

    want: Tensor
    bound: Tensor


def as_float32(x: Tensor) -> np.ndarray:
    """The stored values of a bfloat16, float16, float32 or integer tensor; widening is exact."""
    return x.detach().contiguous().float().numpy()


def rounded_to(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """float32 to a floating dtype, to nearest, ties to even."""
    values = np.array(values, F32, order="C")
    if dtype == torch.float32:
        return torch.from_numpy(values)
    if dtype == torch.float16:
        return torch.from_numpy(np.asarray(values.astype(np.float16)))
    bits = values.view(np.uint32).astype(np.uint64)
    high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    high = np.asarray(np.where(np.isnan(values), 0x7FC0, high).astype(np.uint16))
    return torch.from_numpy(high.view(np.int16)).view(torch.bfloat16)


class Grid:
    """The grid's parameters in numpy, broadcast against x; code() and value() are the two lines of the law."""

    def __init__(self, x: Tensor, scale, zero_point, offset, qrange, axis, eps: float) -> None:
        shape = [-1 if d == axis else 1 for d in range(x.dim())]
        if axis is not None and x.shape[axis] == 0:
            shape[axis] = 0
        self.low, self.high = (int(v) for v in qrange)
        s = scale.numpy()
        self.s = np.where(s < F32(eps), F32(eps), s).reshape(shape)
        z = np.zeros_like(s, F64) if zero_point is None else np.rint(zero_point.numpy().astype(F64))
        self.z = np.clip(z, self.low, self.high).reshape(shape) if zero_point is not None else z.reshape(shape)
        self.o = None if offset is None else offset.numpy().reshape(shape)

    def ratio(self, x: Tensor) -> np.ndarray:
        """x / s or (x - o) / s: every operation correctly rounded to float32."""
        t = as_float32(x)
        return (t if self.o is None else t - self.o) / self.s

    def exact_ratio(self, x: Tensor) -> np.ndarray:
        """The same quotient in float64."""
        t = as_float32(x)
        return (t if self.o is None else t - self.o).astype(F64) / self.s.astype(F64)

    def unclamped(self, x: Tensor) -> np.ndarray:
        """rint(r) + z in float64, exact; NaN stays NaN."""
        return np.rint(self.ratio(x).astype(F64)) + self.z

    def code(self, x: Tensor) -> np.ndarray:
        """clamp(rint(r) + z, qmin, qmax)."""
        return np.clip(self.unclamped(x), self.low, self.high)

    def value(self, code: np.ndarray) -> np.ndarray:
        """s * (c - z), or s * c + o rounded twice; the product of float64 is exact before its rounding."""
        y = (self.s.astype(F64) * (code - self.z)).astype(F32)
        return y if self.o is None else y + self.o


def along(terms: np.ndarray, axis: int | None) -> np.ndarray:
    """Rows [C, n] (or [1, n]) of an array."""
    if axis is None:
        return terms.reshape(1, -1)
    return np.moveaxis(terms, axis, 0).reshape(terms.shape[axis], -1 if terms.size else 0)


def fake_quantize(x, scale, zero_point, offset, qrange, axis, eps, out_dtype):
    with np.errstate(all="ignore"):
        grid = Grid(x, scale, zero_point, offset, qrange, axis, eps)
        return (rounded_to(grid.value(grid.code(x)), out_dtype or x.dtype),)


def quantize(x, scale, zero_point, offset, qrange, axis, eps, dtype):
    with np.errstate(all="ignore"):
        grid = Grid(x, scale, zero_point, offset, qrange, axis, eps)
        code = grid.code(x)
        code = np.where(np.isnan(code), np.clip(grid.z, grid.low, grid.high), code)
        return (torch.from_numpy(np.asarray(code.astype(np.int64))).to(dtype),)


def dequantize(codes, scale, zero_point, offset, qrange, axis, eps, dtype):
    with np.errstate(all="ignore"):
        grid = Grid(codes, scale, zero_point, offset, qrange, axis, eps)
        return (rounded_to(grid.value(codes.contiguous().numpy().astype(F64)), dtype),)


def mask(grid: Grid, x: Tensor, rounded: bool) -> np.ndarray:
    """qmin <= rint(r) + z <= qmax, or qmin <= r + z <= qmax; compared without rounding r + z."""
    k = grid.unclamped(x) - grid.z if rounded else grid.ratio(x).astype(F64)
    return (k >= grid.low - grid.z) & (k <= grid.high - grid.z)


def fake_quantize_backward_input(g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask):
    with np.errstate(all="ignore"):
        grid = Grid(x, scale, zero_point, offset, qrange, axis, eps)
        dx = np.where(mask(grid, x, rounded_mask), as_float32(g), F32(0))
        return (rounded_to(dx, x.dtype),)


def fake_quantize_backward(g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask, lsq_grad_scale, clip):
    with np.errstate(all="ignore"):
        dtype, passes = x.dtype, np.ones(x.shape, bool)
        if clip:
            wide = as_float32(x)
            passes = np.asarray((wide > 0) & (wide < F32(clip)))
            x = torch.from_numpy(np.asarray(np.clip(wide, F32(0), F32(clip))))
        dx = fake_quantize_backward_input(g, x, scale, zero_point, offset, qrange, axis, eps, rounded_mask)[0]
        dx = torch.where(torch.from_numpy(passes), dx, 0.0).to(dtype)
        grid = Grid(x, scale, zero_point, offset, qrange, axis, eps)
        inside, nan = mask(grid, x, rounded_mask), np.isnan(as_float32(x))
        wide = as_float32(g).astype(F64)
        slope = grid.code(x) - grid.z - np.where(inside, grid.exact_ratio(x), 0.0)
        count = x.numel() // max(scale.numel(), 1)
        factor = 1.0 / np.sqrt(max(count, 1) * max(grid.high, 1)) if lsq_grad_scale else 1.0
        dscale = total(np.where(nan, 0.0, wide * slope) * factor, axis)
        if zero_point is None and offset is None:
            return dx, dscale, torch.empty(0)
        slope = 1.0 if offset is not None else -grid.s.astype(F64)
        dshift = total(np.where(nan | inside, 0.0, wide * slope) * factor, axis)
        dshift.bound[torch.from_numpy(np.isnan(grid.s).reshape(-1))] = torch.inf  # no value is stated for a NaN scale
        return dx, dscale, dshift


def total(terms: np.ndarray, axis: int | None) -> Within:
    """Sum of the terms, to 1e-6 of the sum of their absolute values and one rounding to float32."""
    rows = along(terms, axis)
    want = rows.sum(1)
    bound = 1e-6 * np.abs(rows).sum(1) + np.abs(want) * 2.0**-24 + 2.0**-149
    return Within(torch.from_numpy(want), torch.from_numpy(bound))


def pack(codes, bits):
    stream, shift = 0, 0
    chunks = []
    for k, code in enumerate(codes.reshape(-1).tolist()):
        stream |= (code & (2**bits - 1)) << shift
        shift += bits
        if k % 8 == 7:  # eight codes fill whole bytes
            chunks.append(stream.to_bytes(bits, "little"))
            stream = shift = 0
    chunks.append(stream.to_bytes((shift + 7) // 8, "little"))
    return (torch.tensor(list(b"".join(chunks)), dtype=torch.uint8),)


def unpack(packed, bits, numel, signed):
    data, codes = bytes(packed.tolist()), []
    for k in range(numel):
        first = k * bits
        word = int.from_bytes(data[first // 8 : first // 8 + 2], "little") >> (first % 8)
        code = word % 2**bits
        codes.append(code - 2**bits if signed and code >= 2 ** (bits - 1) else code)
    return (torch.tensor(codes, dtype=torch.int8 if signed else torch.uint8),)


def minmax(x, axis):
    low, high = [], []
    for row in along(as_float32(x), axis):
        finite = row[np.isfinite(row)]
        low.append(finite.min() if finite.size else np.inf)
        high.append(finite.max() if finite.size else -np.inf)
    return torch.tensor(np.array(low, F32)), torch.tensor(np.array(high, F32))


def range_search(x, scales, zero_points, qrange, axis):
    """Errors to 1e-5; y may be rounded or not, and at a tie either code may be taken: both have one error."""
    values = as_float32(x)
    counts = np.isfinite(values)
    finite = torch.from_numpy(np.where(counts, values, F32(0)))

    def sums(errors: np.ndarray) -> np.ndarray:
        return along(np.where(counts, errors, 0.0), axis).sum(1)

    wants, bounds = [], []
    with np.errstate(all="ignore"):
        for k in range(scales.shape[0]):
            grid = Grid(x, scales[k], None if zero_points is None else zero_points[k], None, qrange, axis, 0.0)
            code, ratio, wide = grid.code(finite), grid.exact_ratio(finite), finite.numpy().astype(F64)
            want = sums((grid.value(code) - wide) ** 2)
            unrounded = (grid.s.astype(F64) * (code - grid.z) - wide) ** 2
            from_tie = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5)
            other = np.clip(code + np.sign(ratio + grid.z - code), grid.low, grid.high)
            swap = np.abs((grid.s.astype(F64) * (other - grid.z) - wide) ** 2 - unrounded)
            slack = np.where(from_tie <= 2.0**-22 * np.abs(ratio), swap, 0.0)
            wants.append(want)
            bounds.append(1e-5 * want + np.abs(sums(unrounded) - want) + sums(slack) + 1e-45)
    return (Within(torch.from_numpy(np.stack(wants)), torch.from_numpy(np.stack(bounds))),)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python integers (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = counter
    for r in range(10):
        k0, k1 = (key[0] + r * 0x9E3779B9) % 2**32, (key[1] + r * 0xBB67AE85) % 2**32
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def philox_uniform(step, seed, tensor_id, numel):
    key, out = (seed % 2**32, seed // 2**32 % 2**32), []
    for block in range((numel + 3) // 4):
        out += philox((block % 2**32, block // 2**32, int(step) % 2**32, tensor_id % 2**32), key)
    return (torch.tensor([(bits >> 8) * 2.0**-24 for bits in out[:numel]], dtype=torch.float32),)


def wrong(got: Tensor, want: Tensor | Within) -> Tensor:
    """Which elements of a result are wrong. Equal means equal by value: -0 is 0, and NaN is NaN."""
    if isinstance(want, Within):
        exact = want.want.to(got.dtype)  # Inf and NaN, also where float64 leaves the range of float32, must be met
        special = ~exact.isfinite()
        off = ~((got.double() - want.want).abs() <= want.bound)
        off = torch.where(special, ~((got == exact) | (got.isnan() & exact.isnan())), off)
        return off & want.bound.isfinite().logical_or(special & (want.bound != torch.inf))
    unequal = got != want
    return unequal & ~(got.isnan() & want.isnan()) if got.is_floating_point() else unequal


def describe(index: tuple[int, ...], got: Tensor, want: Tensor | Within, arguments: tuple) -> str:
    """One wrong element: its index, what came and what was wanted, the stored bits of x and the scale there."""
    expected = want.want[index].item() if isinstance(want, Within) else want[index].item()
    text = f"  {list(index)}: got {got[index].item()!r}, want {expected!r}"
    if isinstance(want, Within):
        text += f" +- {want.bound[index].item():.3g}"
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    has_g = len(tensors) > 1 and tensors[1].shape == tensors[0].shape
    for name, t in zip("gx" if has_g else "x", tensors, strict=False):
        if t.shape == got.shape:
            integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(t.element_size(), torch.int64)
            bits = t[index].clone().view(integer).item() & (256 ** t.element_size() - 1)
            text += f", {name} {t[index].item()!r} (0x{bits:x})"
    return text


def assert_results(names, results, wants, arguments: tuple, label: str) -> None:
    """Compare every element of every result; the failure lists the first wrong ones."""
    assert len(results) == len(wants) == len(names), f"{label}: {len(results)} results, {len(wants)} wanted"
    for name, got, want in zip(names, results, wants, strict=True):
        shape = want.want.shape if isinstance(want, Within) else want.shape
        assert got.shape == shape, f"{label}: {name}: shape {tuple(got.shape)}, want {tuple(shape)}"
        if not isinstance(want, Within):
            assert got.dtype == want.dtype, f"{label}: {name}: dtype {got.dtype}, want {want.dtype}"
        bad = wrong(got, want)
        if bad.any():
            lines = [describe(tuple(i), got, want, arguments) for i in bad.nonzero()[:5].tolist()]
            plain = [a.tolist() if isinstance(a, Tensor) and a.numel() <= 16 else a for a in arguments]
            rest = [f"  {a}" for a in plain if not isinstance(a, Tensor)]
            head = f"{label}: {name}: {int(bad.sum())} of {got.numel()} elements are wrong"
            raise AssertionError("\n".join([head, *lines, " arguments:", *rest]))
