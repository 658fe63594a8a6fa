"""The bugs that tests/plant.py plants, and the tests that must notice each of them."""

from __future__ import annotations

from dataclasses import dataclass

REFERENCE, MATH, REDUCE = "fastqat/ops/reference.py", "csrc/math.h", "csrc/cpu/reduce.h"
TRITON, LAYOUT = "fastqat/ops/triton/math.py", "fastqat/ops/triton/layout.py"

BY_ORACLE = ("tests/test_reference.py", "-k", "test_oracle_agrees and (float32 or shapes) or onnx or vector")
CPU_VALUES = ("tests/test_conformance.py", "-k", "cpu and fake_quantize and (critical or shapes) and float32")
CPU_SHARES = ("tests/test_conformance.py", "-k", "cpu and test_large and fake_quantize and not backward")
CPU_SUMS = ("tests/test_conformance.py", "-k", "cpu and fake_quantize_backward and same_bits")
MULTI, OSCILLATION = "fastqat/ops/multi_tensor.py", "csrc/oscillation.h"
BY_ALGORITHM = ("tests/test_multi_tensor.py", "-k", "algorithm or (reference and trace)")
CPU_TRACKING = ("tests/test_multi_tensor.py", "-k", "cpu")
CPU_ESTIMATORS = ("tests/test_multi_tensor_gradients.py", "-k", "cpu")
TRITON_VALUES = ("tests/test_conformance.py", "-k", "triton and fake_quantize and (critical or shapes) and float32")
CUDA_REDUCE, TRAVERSE = "csrc/cuda/reduce.cuh", "csrc/cuda/traverse.cuh"
CUDA_VALUES = ("tests/test_conformance.py", "-k", "host and fake_quantize and (critical or shapes) and float32")
CUDA_ORDERS = ("tests/test_cuda_on_host.py", "-k", "every_order and backward")
CUDA_TRACKING = ("tests/test_cuda_on_host.py", "-k", "many_weights")

ONE_TENSOR, ONE_BACKWARD = "csrc/cpu/fake_quantize_tensor.cpp", "csrc/cpu/fake_quantize_tensor_backward.cpp"
ONE_REFERENCE = ("tests/test_one_tensor.py", "-k", "reference and float32")
CPU_ONE = ("tests/test_one_tensor.py", "-k", "cpu and (float32 or same_bits)")
BORDERS, CPU_SEARCH = "csrc/cpu/borders.cpp", ("tests/test_range_search.py", "-k", "cpu")
CPU_RANGES = ("tests/test_range_steps.py", "-k", "cpu and not settles")
DOREFA, CPU_DOREFA, PAIR = "csrc/dorefa.h", "csrc/cpu/dorefa.cpp", "csrc/cpu/two_widths.cpp"
DOREFA_ON_CPU = ("tests/test_two_widths.py", "-k", "cpu and not fake_quantize")
FROZEN_REFERENCE = ("tests/test_frozen_codes.py", "-k", "reference")
FROZEN_ON_CPU = ("tests/test_frozen_codes.py", "-k", "cpu")
NAN_ON_CPU = ("tests/test_nan_grids.py", "-k", "cpu")


@dataclass(frozen=True)
class Plant:
    """A bug: what it is, the replacements (file, old text, new text) that make it, and the tests that must see it."""

    name: str
    replacements: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]

    @property
    def rebuilds(self) -> bool:
        """Whether it is in the C++ library. CUDA's kernels are built for the CPU by the tests that run them there."""
        return any(file.startswith("csrc") and not file.startswith("csrc/cuda") for file, _, _ in self.replacements)


def plant(name: str, tests: tuple[str, ...], *replacements: tuple[str, str, str]) -> Plant:
    """Short form of Plant."""
    return Plant(name, replacements, tests)


IN_FINISHING_ORDER = (
    "      for (int q = 0; q < kTerms; ++q) partial_[p * width_ + i][q] = merged[q][i];\n",
    "      for (int q = 0; q < kTerms; ++q) {\n"
    "        static std::mutex mutex;\n        std::lock_guard<std::mutex> guard(mutex);\n"
    "        double& result = partial_[cut_.by_rows ? p / cut_.per_row * cut_.per_row : p * width_ + i][q];\n"
    "        result = Op::merge(result, merged[q][i]);\n      }\n",
)

PLANTS = (
    plant(
        "reference: half-up rounding",
        BY_ORACLE,
        (REFERENCE, "return r.round().clamp(grid.low", "return (r + 0.5).floor().clamp(grid.low"),
    ),
    plant(
        "reference: multiplication by the reciprocal",
        BY_ORACLE,
        (REFERENCE, "shifted(x, grid) / grid.scale", "shifted(x, grid) * (1 / grid.scale)"),
    ),
    plant(
        "reference: dropped tail of a sum",
        BY_ORACLE,
        (REFERENCE, "head[:, : tail.shape[1]] += tail", "head[:, : tail.shape[1] - 1] += tail[:, :-1]"),
    ),
    plant(
        "reference: mask off by one code",
        BY_ORACLE,
        (REFERENCE, "(k >= grid.low) & (k <= grid.high)", "(k >= grid.low) & (k <= grid.high - 1)"),
    ),
    plant(
        "cpu: half-up rounding", CPU_VALUES, (MATH, "return __builtin_rintf(v);", "return __builtin_floorf(v + 0.5f);")
    ),
    plant(
        "cpu: multiplication by the reciprocal",
        CPU_VALUES,
        (MATH, "return __builtin_fmaf(e, ch.reciprocal, q);", "return q;"),
    ),
    plant(
        "cpu: multiplication by the reciprocal on the fast path of the backward alone",
        CPU_VALUES,
        (MATH, ": quotient<true>(t, ch);", ": t * ch.reciprocal;"),
    ),
    plant(
        "cpu: dropped tail",
        CPU_VALUES,
        ("csrc/cpu/fake_quantize.cpp", "i < n; ++i)\n    y[i] =", "i < n - n % 16; ++i)\n    y[i] ="),
    ),
    plant(
        "cpu: dropped tail of bfloat16 where the CPU rounds to it",
        CPU_VALUES,
        ("csrc/cpu/fake_quantize.cpp", "i = whole; i < n; ++i) y[i]", "i = whole; i < n - 1; ++i) y[i]"),
    ),
    plant(
        "cpu: bfloat16 without a buffer takes tiny scales as well",
        CPU_VALUES,
        (
            "csrc/cpu/fake_quantize.cpp",
            "channels.fast && y.dtype == ScalarType::BFloat16",
            "y.dtype == ScalarType::BFloat16",
        ),
    ),
    plant(
        "cpu: a bfloat16 row with a NaN is not done again with care",
        CPU_VALUES,
        ("csrc/cpu/fake_quantize_backward.cpp", "channels.fast && !careful && g", "channels.fast && g"),
    ),
    plant(
        "cpu: bfloat16 gradients of float32 inputs go for bfloat16 ones",
        CPU_VALUES,
        ("csrc/cpu/fake_quantize_backward.cpp", "if (x.dtype == ScalarType::BFloat16)", "if (true)"),
    ),
    plant(
        "cpu: dropped tail of a sum",
        CPU_VALUES,
        (REDUCE, "for (int64_t i = whole; i < stop; ++i) merge", "for (int64_t i = whole; i < stop - 1; ++i) merge"),
    ),
    plant(
        "cpu: mask off by one code",
        CPU_VALUES,
        (
            MATH,
            "float nearest = clamp(tested, ch.low, ch.high);",
            "float nearest = clamp(tested, ch.low, ch.high - 1.0f);",
        ),
    ),
    plant(
        "cpu: sum in thread order",
        CPU_SUMS,
        (REDUCE, "#include <limits>\n", "#include <limits>\n#include <mutex>\n"),
        (REDUCE, *IN_FINISHING_ORDER),
    ),
    plant(
        "cpu: a pair of lanes is lost where lanes become one sum",
        CPU_VALUES,
        (REDUCE, "std::memcpy(halves, numbers, sizeof halves);", "std::memcpy(halves, numbers, sizeof halves - 8);"),
    ),
    plant(
        "cpu: the elements behind the last whole vector are no part of a sum",
        CPU_VALUES,
        (REDUCE, "Op::merge(lanes[q][lane], rest[q][lane])", "lanes[q][lane]"),
    ),
    plant(
        "cpu: the end of a thread's share is left to nobody",
        CPU_SHARES,
        ("csrc/cpu/threads.h", "shares[t].end = (t + 1) * n / count;", "shares[t].end = (t + 1) * n / count - t;"),
    ),
    plant(
        "the checks of a call remember too little of it",
        ("tests/test_bad_arguments.py", "-k", "after_a_good"),
        ("fastqat/arguments.py", "_described(offset),", "None,"),
    ),
    plant(
        "the checks of a call take True for 1",
        ("tests/test_bad_arguments.py", "-k", "after_a_good"),
        (
            "fastqat/arguments.py",
            "@functools.lru_cache(maxsize=4096, typed=True)",
            "@functools.lru_cache(maxsize=4096)",
        ),
    ),
    plant(
        "reference: every second change is an oscillation",
        BY_ALGORITHM,
        (MULTI, "(way != word.direction)", "(way == word.direction)"),
    ),
    plant(
        "reference: freezes at the average of after the step",
        BY_ALGORITHM,
        (MULTI, "mean = frozen_index(word.index, a.double() * at.previous_decay, qrange)", "mean = index"),
    ),
    plant(
        "reference: of two codes the one of even index",
        FROZEN_REFERENCE,
        (MULTI, "    return (mean.round() - low).to(torch.int32)", "    return (mean - low).round().to(torch.int32)"),
    ),
    plant(
        "reference: a tracked step wipes the seal",
        FROZEN_REFERENCE,
        (
            MULTI,
            "    counts = counts[:4]  # the fifth is the caller's own\n",
            "    counts[4] = 0\n    counts = counts[:4]\n",
        ),
    ),
    plant(
        "cpu: an average whose low bits are lost beside its code",
        FROZEN_ON_CPU,
        (
            OSCILLATION,
            "double low = qmin, high = qmax, mean = low + index + deviation;",
            "double low = qmin, high = qmax, mean = qmin + static_cast<float>(index) + static_cast<float>(deviation);",
        ),
    ),
    plant(
        "cpu: the jump to the frozen code is no change",
        FROZEN_ON_CPU,
        (
            OSCILLATION,
            "float last = pending ? weight.average : static_cast<float>(weight.index);",
            "float last = static_cast<float>(weight.index);",
        ),
    ),
    plant(
        "an older file is taken as it is",
        ("tests/test_frozen_codes.py", "-k", "older"),
        (
            "fastqat/nn/tracking.py",
            "index = torch.where(word.pending, average.to(torch.int32), word.index)",
            "index = word.index",
        ),
    ),
    plant(
        "cpu: a NaN zero point switches clamping off",
        NAN_ON_CPU,
        (MATH, "    if (zero != zero) {\n", "    if (false) {\n"),
    ),
    plant(
        "cpu: dampening of 0 adds 0 * Inf",
        NAN_ON_CPU,
        (MATH, "in_range = in_range & (extras.dampening != 0.0f);", "in_range = in_range & true;"),
    ),
    plant(
        "cpu: a search that sums 1024 terms in a chain",
        ("tests/test_accuracy.py", "-k", "cpu"),
        (
            "csrc/cpu/range_search.cpp",
            "  for (int k = 0; k < kCandidatesAtOnce; ++k) errors[k] += tile[k];",
            "  for (int k = 0; k < kCandidatesAtOnce; ++k) {\n    float chain = 0.0f;\n"
            "    for (int64_t i = 0; i < n; ++i) chain = add_squared_error(chain, x[i], c[k]);\n"
            "    errors[k] += chain;\n  }",
        ),
    ),
    plant(
        "reference: a freeze acts in its own step",
        BY_ALGORITHM,
        (
            MULTI,
            "direction = torch.where(held & ~nan, words.NONE,",
            "direction = torch.where(freezes | held, words.NONE,",
        ),
    ),
    plant(
        "cpu: a threshold that falls fast freezes nothing",
        CPU_TRACKING,
        (OSCILLATION, "at.sweeps = too_large || at.activates || falls;", "at.sweeps = too_large || at.activates;"),
    ),
    plant(
        "cpu: rescaled at 2^60, but not the averages",
        CPU_TRACKING,
        (OSCILLATION, "float average = weight.average * at.rescale;", "float average = weight.average;"),
    ),
    plant(
        "cpu: a frozen weight still passes its gradient",
        CPU_ESTIMATORS,
        (MATH, "bool inside = (nearest == tested) & !held;", "bool inside = nearest == tested;"),
    ),
    plant(
        "reference: a bit that does not know of the clip",
        ONE_REFERENCE,
        ("fastqat/ops/one_tensor.py", "inside, passes & (tested >= grid.low)", "inside, (tested >= grid.low)"),
    ),
    plant(
        "cpu: packed codes without their last byte",
        CPU_ONE,
        ("csrc/cpu/pack.cpp", "stream, packed_bytes(rest, bits)", "stream, rest * bits / 8"),
    ),
    plant(
        "cpu: noise that begins anew with every block",
        CPU_ONE,
        (ONE_TENSOR, "noise_->draw(offset, n, ", "noise_->draw(0, n, "),
    ),
    plant(
        "cpu: noise begun anew with each piece of work, in registers",
        ("tests/test_one_tensor.py", "-k", "cpu and beyond_one_piece"),
        (ONE_TENSOR, "limit_, offset, n, x, y", "limit_, 0, n, x, y"),
    ),
    plant(
        "cpu: an element at the limit counts as beyond it, in registers",
        ("tests/test_gradient_quant.py", "-k", "not compiled"),
        ("csrc/cpu/stochastic.cpp", "_CMP_GT_OQ", "_CMP_GE_OQ"),
    ),
    plant(
        "cpu: bits without the lowest code",
        CPU_ONE,
        (ONE_TENSOR, "(tested[i] >= low)", "(tested[i] > low)"),
    ),
    plant(
        "cpu: bits that let 0 through a ReLU",
        CPU_ONE,
        (ONE_TENSOR, "passes_clip(x[i], clip);", "static_cast<uint8_t>(x[i] >= 0.0f && x[i] < clip);"),
    ),
    plant(
        "cpu: the limit itself lies beyond it",
        CPU_ONE,
        (ONE_TENSOR, "__builtin_fabsf(x[i]) > limit", "__builtin_fabsf(x[i]) >= limit"),
    ),
    plant(
        "cpu: a search that counts a border twice",
        CPU_SEARCH,
        (BORDERS, "      bin += within[c];", "      bin += within[c] + (c == count / 2);"),
    ),
    plant(
        "cpu: a search that trusts the last digits of a difference",
        CPU_SEARCH,
        (BORDERS, "error > kDigits * squares || squares == 0.0", "true"),
    ),
    plant(
        "cpu: a search that takes the first channel's borders for all",
        CPU_SEARCH,
        (BORDERS, "  bool same = true;", "  return true;\n  bool same = true;"),
    ),
    plant(
        "cpu: Inf widens a range",
        CPU_ONE,
        (ONE_TENSOR, "if (highest == kInfinity) extremes_loop(x, extremes, n);", ""),
    ),
    plant(
        "cpu: NaN has another code than 0",
        CPU_ONE,
        (ONE_TENSOR, "rounded[i] == rounded[i] ? rounded[i] : 0.0f", "rounded[i]"),
    ),
    plant(
        "cpu: gradients are multiplied by their bits",
        CPU_ONE,
        (
            ONE_BACKWARD,
            "as_float(as_bits(g) & (0u - (bits >> bit & 1u)))",
            "g * static_cast<float>(bits >> bit & 1u)",
        ),
    ),
    plant(
        "cpu: PACT's sum in the order in which threads finish",
        CPU_ONE,
        (
            ONE_BACKWARD,
            "if (sums) partial[p] = total;",
            "static std::mutex mutex;\n    std::lock_guard<std::mutex> guard(mutex);\n"
            "    for (int k = 0; sums && k < kLanes; ++k) partial[0][k] += total[k];",
        ),
        (ONE_BACKWARD, '#include "bits.h"', '#include <mutex>\n\n#include "bits.h"'),
    ),
    plant(
        "cpu: packed codes lose their sign",
        CPU_ONE,
        ("csrc/cpu/dequantize_tensor.cpp", "(codes[i] ^ sign) - sign", "codes[i]"),
    ),
    plant(
        "cpu: a range that forgets instead of keeping",
        CPU_RANGES,
        ("csrc/ranges.h", "momentum * old + rest * now", "rest * old + momentum * now"),
    ),
    plant(
        "cpu: a range that moves with every forward",
        CPU_RANGES,
        ("csrc/cpu/ranges.cpp", "bool fresh = always || now != observed;", "bool fresh = true;"),
    ),
    plant(
        "cpu: gamma moves where it should rest",
        CPU_RANGES,
        ("csrc/ranges.h", "excess > 0.0 ? gamma + stride", "excess >= 0.0 ? gamma + stride"),
    ),
    plant("cpu: another coefficient of tanh", DOREFA_ON_CPU, (DOREFA, "0.46252546f", "0.46252549f")),
    plant(
        "cpu: half-up rounding to a level of DoReFa",
        DOREFA_ON_CPU,
        (
            DOREFA,
            "return round_even(clamp(u * half + half, 0.0f, n.scale));",
            "return __builtin_floorf(clamp(u * half + half, 0.0f, n.scale) + 0.5f);",
        ),
    ),
    plant(
        "cpu: each of several largest magnitudes takes the whole of what passes through them",
        DOREFA_ON_CPU,
        (CPU_DOREFA, "sum / static_cast<double>(std::max<int64_t>(ties, 1))", "sum"),
    ),
    plant(
        "cpu: DoReFa's sum in the order in which threads finish",
        DOREFA_ON_CPU,
        (
            CPU_DOREFA,
            "{ partial[p] = backward.piece(cut, p); });",
            "{\n    partial[p] = backward.piece(cut, p);\n    static std::mutex mutex;\n"
            "    std::lock_guard<std::mutex> guard(mutex);\n"
            "    if (p) partial[0].sum += partial[p].sum, partial[p].sum = 0.0;\n  });",
        ),
        (CPU_DOREFA, '#include "../dorefa.h"', '#include <mutex>\n\n#include "../dorefa.h"'),
    ),
    plant(
        "cpu: NaN in the sums of codes",
        DOREFA_ON_CPU,
        (CPU_DOREFA, "careful ? block<Sums::careful>", "false ? block<Sums::careful>"),
    ),
    plant(
        "cpu: both bit-widths have the zero points of the first",
        ("tests/test_two_widths.py", "-k", "cpu and fake_quantize"),
        (PAIR, "{&grid.scale, &grid.zero_point, &grid.offset}", "{&grid.scale, &grid.offset}"),
    ),
    plant(
        "triton: half-up rounding",
        TRITON_VALUES,
        (TRITON, "return (v + _ROUNDER) - _ROUNDER", "return tl.floor(v + 0.5)"),
    ),
    plant(
        "triton: multiplication by the reciprocal",
        TRITON_VALUES,
        (TRITON, "return tl.fma(e, ch.reciprocal, q)", "return q"),
    ),
    plant(
        "triton: dropped tail",
        TRITON_VALUES,
        (LAYOUT, "return cols < shape.length if TILE.rows == 1", "return cols < shape.length - 1 if TILE.rows == 1"),
    ),
    plant(
        "triton: mask off by one code",
        TRITON_VALUES,
        (TRITON, "(tested >= ch.low) & (tested <= ch.high)", "(tested >= ch.low) & (tested <= ch.high - 1.0)"),
    ),
    plant(
        "cuda: no barrier before the sums of warps are read",
        CUDA_ORDERS,
        (CUDA_REDUCE, "= sums;\n  __syncthreads();\n  if (threadIdx.x == 0)", "= sums;\n  if (threadIdx.x == 0)"),
    ),
    plant(
        "cuda: no barrier before a block says that it is done",
        CUDA_ORDERS,
        (CUDA_REDUCE, "  __threadfence();\n  __syncthreads();\n", "  __threadfence();\n"),
    ),
    plant(
        "cuda: no barrier before the weights that have changed are visited",
        CUDA_TRACKING,
        (
            "csrc/cuda/tracking.cu",
            "    __syncthreads();\n    for (unsigned int k = threadIdx.x; k < visits.count",
            "    for (unsigned int k = threadIdx.x; k < visits.count",
        ),
    ),
    plant(
        "cuda: last element of a tail",
        CUDA_VALUES,
        (TRAVERSE, "k < mine.count; k += mine.lanes", "k < mine.count - 1; k += mine.lanes"),
    ),
    plant(
        "cuda: a vector that begins one element before its tail",
        CUDA_VALUES,
        (TRAVERSE, "(size - before) / vector * vector", "(size - before + 1) / vector * vector"),
    ),
    plant(
        "cuda: shuffles of half the width",
        CUDA_VALUES,
        (CUDA_REDUCE, "distance, lanes)", "distance, lanes / 2)"),
    ),
    plant(
        "an optimizer that another one calls counts too",
        ("tests/test_clock.py",),
        (
            "fastqat/nn/clock.py",
            "others = {id(clock) for outer in running_steps(optimizer) for clock in _owned_by(outer)}",
            "others: set[int] = set()",
        ),
    ),
    plant(
        "two optimizers of one iteration are two steps",
        ("tests/test_clock.py",),
        ("fastqat/nn/clock.py", "or task != -1 or not self._stepped or optimizer in self._stepped)", "or True)"),
    ),
    plant(
        "averaged integers are taken as they are",
        ("tests/test_averaged_copies.py", "-k", "integers and frozen"),
        ("fastqat/nn/copied.py", "    if counts[4] != SEAL:\n", "    if False:\n"),
    ),
    plant(
        "frozen codes that an average left behind are taken as they are",
        ("tests/test_averaged_copies.py", "-k", "behind"),
        ("fastqat/nn/copied.py", "    if stale and tracker.options.freezes:\n", "    if False:\n"),
    ),
    plant(
        "a product takes the weight of an own forward in float",
        ("tests/test_own_forward.py", "-k", "values"),
        (
            "fastqat/nn/own_forward.py",
            "            weight = layer.quantized_weight(device_type)\n",
            "            weight = tensor\n",
        ),
    ),
    plant(
        "a standardized weight is not quantized",
        ("tests/test_own_forward.py", "-k", "values"),
        (
            "fastqat/nn/own_forward.py",
            "        value = self.layer.quantized_as_computed(tensor, place)\n",
            "        value = tensor\n",
        ),
    ),
    plant(
        "a weight leaves the model though a function reads it past its quantizer",
        ("tests/test_leaving.py", "-k", "function"),
        ("fastqat/nn/quantized_values.py", "        _refuse_reader(read)\n", "        pass\n"),
    ),
    plant(
        "products of two activations count as quantized",
        ("tests/test_coverage.py", "-k", "two_activations"),
        (
            "fastqat/nn/coverage.py",
            "    macs = sum(count.products.values())\n    taken",
            "    macs = sum(n for product, n in count.products.items() if product.of_weight)\n    taken",
        ),
    ),
    plant(
        "what a dict does not mention is forgotten",
        ("tests/test_partial_loads.py", "-k", "one_bias"),
        ("fastqat/nn/state.py", "        if left_out:\n            return\n", ""),
    ),
)
