"""quantize and dequantize: integer codes of x, and values of integer codes."""

from __future__ import annotations

import triton
import triton.language as tl

from fastqat.ops.triton import layout, math
from fastqat.ops.triton.elementwise import map_elements


@triton.jit
def quantize_kernel(x_ptr, codes_ptr, grid, shape, TILE: tl.constexpr):
    """x, codes: [shape.rows, shape.length] in memory order."""
    OFFSET: tl.constexpr = grid.offset is not None
    row, col = layout.first_element(shape, TILE)
    rows, cols = layout.tile_rows(row, TILE), layout.tile_cols(col, TILE)
    mask = layout.tile_mask(rows, cols, shape, TILE)
    at = rows * shape.length + cols
    x = layout.load_float(x_ptr + at, mask)
    index, exists = layout.channel_index(rows, cols, shape, TILE)
    ch = layout.load_channel(grid, index, exists)
    if layout.all_fast(ch, TILE):
        code = math.quantize(x, ch, True, OFFSET)
    else:
        code = math.quantize(x, ch, False, OFFSET)
    layout.store_float(codes_ptr + at, code, mask)


@triton.jit
def dequantize_kernel(codes_ptr, y_ptr, grid, shape, TILE: tl.constexpr):
    """codes, y: [shape.rows, shape.length] in memory order."""
    row, col = layout.first_element(shape, TILE)
    rows, cols = layout.tile_rows(row, TILE), layout.tile_cols(col, TILE)
    mask = layout.tile_mask(rows, cols, shape, TILE)
    at = rows * shape.length + cols
    code = layout.load_float(codes_ptr + at, mask)
    index, exists = layout.channel_index(rows, cols, shape, TILE)
    ch = layout.load_channel(grid, index, exists)
    layout.store_float(y_ptr + at, math.dequantize(code, ch, grid.offset is not None), mask)


def quantize(x, scale, zero_point, offset, qrange, axis, eps, dtype, codes):
    """codes = quantize(x). x, codes: one shape, any strides; the others: see fastqat.ops.schema."""
    map_elements(quantize_kernel, x, scale, zero_point, offset, qrange, axis, eps, codes)


def dequantize(codes, scale, zero_point, offset, qrange, axis, eps, dtype, y):
    """y = dequantize(codes). codes, y: one shape, any strides; the others: see fastqat.ops.schema."""
    map_elements(dequantize_kernel, codes, scale, zero_point, offset, qrange, axis, eps, y)
