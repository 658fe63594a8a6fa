"""Codes of 1 to 8 bits as a stream, in kernels: the first code in the lowest bits of the first byte."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Stream(NamedTuple):
    """A stream as kernels get it. Only a size that is an argument can be known to be a multiple of 16."""

    bytes: Tensor  # uint8 [size]
    size: int


def stream_of(packed: Tensor) -> Stream | None:
    """The stream in a tensor; None where it is empty: not wanted. packed: uint8 [size], contiguous."""
    return Stream(packed, packed.numel()) if packed.numel() else None


@triton.jit
def store_codes(stream, codes, exists, start, BITS: tl.constexpr):
    """Store codes as codes start, start + 1, .. of a stream.

    codes: integers, a power of two of them in any shape, of which the low BITS bits count; exists: bool, like codes,
    false beyond the end; start: int64 scalar, a multiple of 8.
    """
    COUNT: tl.constexpr = codes.numel
    codes = tl.where(exists, codes.to(tl.int32) & ((1 << BITS) - 1), 0)
    first = start // 8 * BITS
    if 8 % BITS == 0:
        lane = tl.arange(0, 8 // BITS)[None, :]
        byte = tl.sum(tl.reshape(codes, (COUNT * BITS // 8, 8 // BITS)) << (lane * BITS), 1)
        at = first + tl.arange(0, COUNT * BITS // 8)
        tl.store(stream.bytes + at, byte.to(tl.uint8), mask=at < stream.size)
    else:  # eight codes are BITS bytes
        lane = tl.arange(0, 8)[None, :]
        word = tl.sum(tl.reshape(codes, (COUNT // 8, 8)).to(tl.int64) << (lane * BITS), 1, keep_dims=True)
        at = first + tl.arange(0, COUNT // 8)[:, None] * BITS + lane
        tl.store(stream.bytes + at, (word >> (lane * 8)).to(tl.uint8), mask=(lane < BITS) & (at < stream.size))


@triton.jit
def load_codes(stream, start, BITS: tl.constexpr, COUNT: tl.constexpr):
    """COUNT codes of a stream, the first of which is code start: int32 [COUNT], 0 beyond the end.

    start: int64 scalar, a multiple of 8; COUNT: a power of two.
    """
    first = start // 8 * BITS
    if 8 % BITS == 0:
        lane = tl.arange(0, 8 // BITS)[None, :]
        at = first + tl.arange(0, COUNT * BITS // 8)
        byte = tl.load(stream.bytes + at, mask=at < stream.size, other=0).to(tl.int32)
        return tl.reshape((byte[:, None] >> (lane * BITS)) & ((1 << BITS) - 1), (COUNT,))
    else:  # a code may begin in one byte and end in the next
        bit = tl.arange(0, COUNT) * BITS
        at = first + bit // 8
        byte = tl.load(stream.bytes + at, mask=at < stream.size, other=0).to(tl.int32)
        ends_in_next = (bit % 8 + BITS > 8) & (at + 1 < stream.size)
        byte |= tl.load(stream.bytes + at + 1, mask=ends_in_next, other=0).to(tl.int32) << 8
        return (byte >> (bit % 8)) & ((1 << BITS) - 1)
