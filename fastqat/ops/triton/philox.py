"""philox_uniform: random numbers that are the same on every backend."""

from __future__ import annotations

import triton
import triton.language as tl

from fastqat.ops.triton import layout, math
from fastqat.ops.triton.launch import cdiv, launch

COUNT = tl.constexpr(2048)  # numbers of one program


@triton.jit
def uniform_at(element, seed, step_ptr, tensor_id):
    """Uniform numbers of elements counted in logical order, each from a counter of its own. element: int64."""
    zeros = tl.zeros(element.shape, tl.uint32)
    step = zeros + tl.load(step_ptr).to(tl.uint32)
    random = math.philox(seed, element >> 2, step, zeros + tensor_id.to(tl.uint32))
    lane = element & 3
    low = tl.where(lane == 0, random.lane0, random.lane1)
    return math.uniform(tl.where(lane < 2, low, tl.where(lane == 2, random.lane2, random.lane3)))


@triton.jit
def uniform_from(first, seed, step_ptr, tensor_id, COUNT: tl.constexpr):
    """Uniform numbers of COUNT elements in a row, a counter for each four of them: float32 [COUNT].

    first: int64 scalar, the first of them, a multiple of 4; COUNT: a power of two.
    """
    block = first // 4 + tl.arange(0, COUNT // 4)
    zeros = tl.zeros((COUNT // 4,), tl.uint32)
    step = zeros + tl.load(step_ptr).to(tl.uint32)
    random = math.philox(seed, block, step, zeros + tensor_id.to(tl.uint32))
    bits = tl.join(tl.join(random.lane0, random.lane2), tl.join(random.lane1, random.lane3))  # [COUNT / 4, 2, 2]
    return math.uniform(tl.reshape(bits, (COUNT,)))


@triton.jit
def drawn(r, u):
    """floor(r + u) where |r| <= 2^22, else some value as far out; Triton's own floor takes subnormals for 0."""
    v = r + u
    nearest = math.round_even(v)
    return tl.where(nearest > v, nearest - 1.0, nearest)


@triton.jit(do_not_specialize=["seed", "tensor_id"])
def philox_uniform_kernel(u_ptr, step_ptr, seed, tensor_id, numel):
    """u: float32 [numel]; step: int64 [1]; seed, tensor_id: scalars."""
    first = tl.program_id(0).to(tl.int64) * COUNT
    u = uniform_from(first, seed, step_ptr, tensor_id, COUNT)
    element = first + tl.arange(0, COUNT)
    tl.store(u_ptr + element, u, mask=element < numel)


def philox_uniform(step, seed, tensor_id, numel, u):
    """u = uniform numbers in [0, 1). step: int64 [1]; u: float32 [numel]."""
    if numel == 0:
        return
    with layout.writing(u, u.new_empty(u.shape)) as u:
        launch(philox_uniform_kernel, cdiv(numel, COUNT.value), u, step, seed, tensor_id, numel)
