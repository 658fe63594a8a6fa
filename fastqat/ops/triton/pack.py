"""pack and unpack: codes as a stream of bits."""

from __future__ import annotations

import triton
import triton.language as tl

from fastqat.ops.triton import bitstream, layout
from fastqat.ops.triton.launch import cdiv, launch

COUNT = tl.constexpr(2048)  # codes of one program


@triton.jit
def pack_kernel(codes_ptr, stream, numel, BITS: tl.constexpr):
    """codes: [numel], any integer; stream: bitstream.Stream."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    element = start + tl.arange(0, COUNT)
    exists = element < numel
    bitstream.store_codes(stream, tl.load(codes_ptr + element, mask=exists, other=0), exists, start, BITS)


@triton.jit
def unpack_kernel(codes_ptr, stream, numel, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """codes: int8 or uint8 [numel]; stream: bitstream.Stream."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    code = bitstream.load_codes(stream, start, BITS, COUNT)
    if SIGNED:
        code = (code ^ (1 << (BITS - 1))) - (1 << (BITS - 1))
    element = start + tl.arange(0, COUNT)
    tl.store(codes_ptr + element, code.to(codes_ptr.dtype.element_ty), mask=element < numel)


def pack(codes, bits, packed):
    """packed = bit stream of codes. codes: any shape and integer dtype; packed: uint8 [ceil(numel * bits / 8)]."""
    if codes.numel() == 0:
        return
    codes = codes.contiguous()
    programs = cdiv(codes.numel(), COUNT.value)
    with layout.writing(packed, packed.new_empty(packed.shape)) as packed:
        launch(pack_kernel, programs, codes, bitstream.stream_of(packed), codes.numel(), BITS=bits)


def unpack(packed, bits, numel, signed, codes):
    """codes = the codes of a bit stream. packed: uint8 [ceil(numel * bits / 8)]; codes: int8 or uint8 [numel]."""
    if numel == 0:
        return
    stream = bitstream.stream_of(packed.contiguous())
    programs = cdiv(numel, COUNT.value)
    with layout.writing(codes, codes.new_empty(codes.shape)) as codes:
        launch(unpack_kernel, programs, codes, stream, numel, BITS=bits, SIGNED=signed)
