"""pack and unpack: codes as a stream of bits; eight codes of `bits` bits are `bits` bytes."""

from __future__ import annotations

import triton
import triton.language as tl

from fastqat.ops.triton import layout
from fastqat.ops.triton.launch import cdiv, launch

GROUPS = tl.constexpr(256)  # groups of eight codes for one program


@triton.jit
def pack_kernel(codes_ptr, packed_ptr, numel, size, BITS: tl.constexpr):
    """codes: [numel], any integer; packed: uint8 [size]."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, 8)[None, :]
    element = group * 8 + lane
    code = tl.load(codes_ptr + element, mask=element < numel, other=0).to(tl.int64) & ((1 << BITS) - 1)
    word = tl.sum(code << (lane * BITS), 1, keep_dims=True)
    byte = group * BITS + lane
    tl.store(packed_ptr + byte, (word >> (lane * 8)).to(tl.uint8), mask=(lane < BITS) & (byte < size))


@triton.jit
def unpack_kernel(packed_ptr, codes_ptr, numel, size, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """packed: uint8 [size]; codes: int8 or uint8 [numel]."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, 8)[None, :]
    byte = group * BITS + lane
    part = tl.load(packed_ptr + byte, mask=(lane < BITS) & (byte < size), other=0).to(tl.int64)
    word = tl.sum(part << (lane * 8), 1, keep_dims=True)
    code = (word >> (lane * BITS)) & ((1 << BITS) - 1)
    if SIGNED:
        code = (code ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
    element = group * 8 + lane
    tl.store(codes_ptr + element, code.to(codes_ptr.dtype.element_ty), mask=element < numel)


def pack(codes, bits, packed):
    """packed = bit stream of codes. codes: any shape and integer dtype; packed: uint8 [ceil(numel * bits / 8)]."""
    if codes.numel() == 0:
        return
    codes = codes.contiguous()
    programs = cdiv(codes.numel(), 8 * GROUPS.value)
    with layout.writing(packed, packed.new_empty(packed.shape)) as packed:
        launch(pack_kernel, programs, codes, packed, codes.numel(), packed.numel(), BITS=bits)


def unpack(packed, bits, numel, signed, codes):
    """codes = the codes of a bit stream. packed: uint8 [ceil(numel * bits / 8)]; codes: int8 or uint8 [numel]."""
    if numel == 0:
        return
    packed = packed.contiguous()
    programs = cdiv(numel, 8 * GROUPS.value)
    with layout.writing(codes, codes.new_empty(codes.shape)) as codes:
        launch(unpack_kernel, programs, packed, codes, numel, packed.numel(), BITS=bits, SIGNED=signed)
