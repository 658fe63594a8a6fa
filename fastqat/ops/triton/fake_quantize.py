"""fake_quantize: x rounded to the grid, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl

from fastqat.ops.triton import layout, math
from fastqat.ops.triton.elementwise import map_elements


@triton.jit
def store_rounded(y_ptrs, x, mask, grid, index, exists, TILE: tl.constexpr):
    """Store a tile rounded to the grid. x: float32; index, exists: see layout.channel_index."""
    OFFSET: tl.constexpr = grid.offset is not None
    ch = layout.load_channel(grid, index, exists)
    if layout.all_fast(ch, TILE):
        y = math.fake_quantize(x, ch, True, OFFSET)
    else:
        y = math.fake_quantize(x, ch, False, OFFSET)
    layout.store_float(y_ptrs, y, mask)


@triton.jit
def fake_quantize_kernel(x_ptr, y_ptr, grid, shape, TILE: tl.constexpr):
    """x, y: [shape.rows, shape.length] in memory order."""
    row, col = layout.first_element(shape, TILE)
    rows, cols = layout.tile_rows(row, TILE), layout.tile_cols(col, TILE)
    mask = layout.tile_mask(rows, cols, shape, TILE)
    at = rows * shape.length + cols
    x = layout.load_float(x_ptr + at, mask)
    index, exists = layout.channel_index(rows, cols, shape, TILE)
    store_rounded(y_ptr + at, x, mask, grid, index, exists, TILE)


def fake_quantize(x, scale, zero_point, offset, qrange, axis, eps, out_dtype, y):
    """y = fake_quantize(x). x: any shape and strides; y: shape of x; the others: see fastqat.ops.schema."""
    map_elements(fake_quantize_kernel, x, scale, zero_point, offset, qrange, axis, eps, y)
