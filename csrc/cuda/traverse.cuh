// How a block goes through a piece, and how what it reduces becomes one result for each channel, in a fixed order.
//
// A Body says what is done with the elements:
//   kVector, kAtOnce                 elements of a vector; those that a thread reads before it uses them
//   Sums                             what is reduced, see reduce.cuh
//   channel(c)                       constants of a channel; is_fast() of them: whether vectors may be taken
//   begin(origin), end()             of a piece; origin: its first element
//   place(base)                      the elements that follow are counted from here
//   Operands<n> load<n>(i)           reads n neighbouring elements
//   apply<n>(i, operands, channel, sums)   the rest. Vectors have a fast scale; single elements may have any, and are
//                                    divided: they are few, and less code leaves more registers
//   finish(c, sums)                  takes the result of a channel, in one thread
#pragma once

#include "cut.h"
#include "reduce.cuh"

namespace fastqat::cuda {

// What a Body has that reduces nothing, and does nothing for a piece as a whole.
struct Elementwise {
  using Sums = NoSums;
  __device__ __forceinline__ void begin(int64_t) const {}
  __device__ __forceinline__ void end() const {}
  __device__ __forceinline__ void finish(int64_t, const NoSums&) const {}
};

// Elements of one channel for one thread: whole vectors, of which it takes every `stride` elements one from `first` to
// `last`, and `count` others, every `lanes`-th from its own on: `before` neighbours at 0, the rest `step` apart from
// `rest` on. All are counted from `base`.
struct Share {
  int64_t base;
  int first, last, stride;
  int before, rest, step, count;
  int lane, lanes;
};

__device__ __forceinline__ bool is_fast(const Channel& ch) { return is_fast_scale(ch.scale); }

template <class Body, class Constants>
__device__ __forceinline__ void go(Body& body, const Share& mine, const Constants& ch, typename Body::Sums& sums) {
  constexpr int n = Body::kVector, kAtOnce = Body::kAtOnce / n;  // vectors that are read before the first is used
  if constexpr (n > 1) {
    for (int i = mine.first; i < mine.last; i += mine.stride * kAtOnce) {
      typename Body::template Operands<n> operands[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (i + u * mine.stride < mine.last) operands[u] = body.template load<n>(i + u * mine.stride);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (i + u * mine.stride < mine.last) body.template apply<n>(i + u * mine.stride, operands[u], ch, sums);
    }
  }
  for (int k = mine.lane; k < mine.count; k += mine.lanes) {
    const int i = k < mine.before ? k : mine.rest + (k - mine.before) * mine.step;
    body.template apply<1>(i, body.template load<1>(i), ch, sums);
  }
}

// Of `size` neighbouring elements from `base` on.
__device__ __forceinline__ Share share_of_row(const Cut& cut, int vector, bool fast, int64_t base, int size, int lane) {
  const int lanes = 1 << cut.lane_bits;
  Share mine{base, 0, 0, lanes * vector, 0, 0, 1, size, lane, lanes};
  if (vector == 1 || !cut.vectors || !fast) return mine;
  const int misaligned = static_cast<int>(base % vector);
  const int before = std::min(misaligned ? vector - misaligned : 0, size);
  mine.last = before + (size - before) / vector * vector;
  mine.first = before + lane * vector;
  mine.before = before;
  mine.rest = mine.last;
  mine.count = size - (mine.last - before);
  return mine;
}

// One piece of a tensor. partial: [parts, channels] and arrived: [groups], where a group has several parts.
template <class Body>
__device__ __forceinline__ void traverse(Body& body, const Cut& cut, int piece, typename Body::Sums* partial,
                                         unsigned int* arrived) {
  using Sums = typename Body::Sums;
  const int group = piece / cut.parts, part = piece % cut.parts;
  const int thread = threadIdx.x, inner = static_cast<int>(cut.inner);  // by columns it is short
  const int columns = cut.by_columns ? cut.width * inner : 0, rows = columns ? kThreads / columns : 0;
  auto deliver = [&](int c, const Sums& sums) {
    if (cut.parts == 1)
      body.finish(c, sums);
    else
      partial[static_cast<int64_t>(part) * cut.channels + c] = sums;
  };
  const int64_t outer = cut.by_columns ? static_cast<int64_t>(part) * cut.depth : part / cut.per_row;
  const int64_t begin = cut.by_columns ? 0 : static_cast<int64_t>(part % cut.per_row) * kPiece;
  const int64_t origin = (outer * cut.channels + group * cut.width) * cut.inner + begin;
  body.begin(origin);
  const int lanes = 1 << cut.lane_bits, row_bits = kThreadBits - cut.lane_bits;  // 2^row_bits rows at a time
  const int passes = cut.by_columns ? 1 : (cut.width + (1 << row_bits) - 1) >> row_bits;
  for (int pass = 0; pass < passes; ++pass) {
    // The channel of this thread, counted within the group.
    const int own =
        cut.by_columns ? (columns ? thread % columns / inner : 0) : (pass << row_bits) + (thread >> cut.lane_bits);
    const int c = group * cut.width + own;
    const bool exists =
        own < cut.width && c < cut.channels && outer < cut.outer && (!cut.by_columns || thread < rows * columns);
    Sums sums;
    if (exists) {
      const auto ch = body.channel(c);
      Share mine;
      if (cut.by_columns) {
        const int last = static_cast<int>(std::min<int64_t>(cut.depth, cut.outer - outer));
        mine = {origin, 0, 0, 0, 0, thread % columns, cut.channels * inner, last, thread / columns, rows};
      } else {
        const int64_t size = cut.per_row == 1 ? cut.inner : std::min<int64_t>(kPiece, cut.inner - begin);
        mine = share_of_row(cut, Body::kVector, is_fast(ch), origin + own * cut.inner, static_cast<int>(size),
                            thread & (lanes - 1));
      }
      body.place(mine.base);
      go(body, mine, ch, sums);
    }
    if (!Sums::kAny) continue;
    bool first = (thread & (lanes - 1)) == 0;  // of those that have merged their sums
    int finished = own;
    if (cut.by_columns) {
      merge_columns(sums, rows, columns, inner);
      first = true;
      finished = thread;
    } else if (lanes <= kWarp) {
      merge_lanes(sums, lanes);
    } else {
      merge_block(sums);
    }
    if (first && finished < cut.width && group * cut.width + finished < cut.channels)
      deliver(group * cut.width + finished, sums);
  }
  body.end();
  if (Sums::kAny && cut.parts > 1) merge_parts(body, cut, group, partial, arrived);
}

}  // namespace fastqat::cuda
