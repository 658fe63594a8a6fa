"""dequantize_tensor: the values of packed codes, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from fastqat.ops.triton import bitstream, layout, math
from fastqat.ops.triton.launch import launch


@triton.jit
def dequantize_tensor_kernel(y_ptr, stream, grid, shape, TILE: tl.constexpr, BITS: tl.constexpr):
    """y: [1, shape.length] in memory order; stream: bitstream.Stream."""
    row, col = layout.first_element(shape, TILE)
    index, exists = layout.channel_index(row, col, shape, TILE)
    ch = layout.load_channel(grid, index, exists)
    code = bitstream.load_codes(stream, col, BITS, TILE.cols)
    codes_up_to = tl.where(tl.load(grid.qrange) < 0, 1 << (BITS - 1), 1 << BITS)  # signed ones lie half below 0
    code = tl.where(code >= codes_up_to, code - (1 << BITS), code)
    y = math.dequantize(tl.reshape(code, (1, TILE.cols)).to(tl.float32), ch, grid.offset is not None)
    cols = layout.tile_cols(col, TILE)
    layout.store_float(y_ptr + cols, y, cols < shape.length)


def dequantize_tensor(codes, scale, zero_point, offset, qrange, eps, code_bits, y):
    """y = value(code). codes: uint8, a stream in the order of y in memory; y: dense; the others: fastqat.ops.schema."""
    if y.numel() == 0:
        return
    shape, tile, programs = layout.matrix_of(y, None, layout.WIDTH)
    grid = layout.grid_of(scale, zero_point, offset, qrange, eps)
    stream = bitstream.stream_of(codes)
    launch(dequantize_tensor_kernel, programs, y, stream, grid, shape, TILE=tile, BITS=code_bits)
