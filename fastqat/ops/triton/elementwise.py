"""How an op that maps each element of one tensor to the same element of another is run."""

from __future__ import annotations

from fastqat.ops.triton import layout
from fastqat.ops.triton.launch import launch


def map_elements(kernel, x, scale, zero_point, offset, qrange, axis, eps, y):
    """y = kernel(x), element by element. x: any shape and strides; y: shape of x; the rest: fastqat.ops.schema."""
    if x.numel() == 0:
        return
    x = layout.dense(x)
    shape, tile, programs = layout.matrix_of(x, axis, layout.WIDTH)
    grid = layout.grid_of(scale, zero_point, offset, qrange, eps)
    with layout.writing(y, x) as y:
        launch(kernel, programs, x, y, grid, shape, TILE=tile)
