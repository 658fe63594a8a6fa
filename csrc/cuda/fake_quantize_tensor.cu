// fake_quantize_tensor: one tensor with one scale, and all that one read of it can give: values, extremes, a count, the
// bits that its gradient needs, and packed codes.
//
// A warp takes tiles of neighbouring elements, each lane vectors that lie a row of the warp apart. Eight elements have
// whole bytes of bits and of codes: a unit. A vector is a unit, or half of one; the other half is then in the next
// lane. What fills no tile goes by units, an element at a time, as does all where a vector may not begin or the scale
// is not a fast one. Extremes and counts are merged by atomics on integers, in which no order shows.
#include <type_traits>

#include "bytes.cuh"
#include "grid.cuh"
#include "reduce.cuh"
#include "units.cuh"

namespace fastqat::cuda {
namespace {

constexpr int kAtOnce = 16;  // elements that a thread reads before it uses them
constexpr int kTile = kWarp * kAtOnce;

// What a thread has found so far: fewer than 2^32 elements.
struct Found {
  Range range;
  unsigned int beyond = 0;
  __device__ __forceinline__ void merge(const Found& other) {
    range.merge(other.range);
    beyond += other.beyond;
  }
  __device__ __forceinline__ Found shuffled(int distance, int lanes) const {
    return {range.shuffled(distance, lanes), __shfl_down_sync(kAllLanes, beyond, distance, lanes)};
  }
};

// Of some neighbouring elements: bit k of `flags` where the k-th passes its gradient, bit kUnit + k where it lies above
// the range; their packed codes.
template <class Word>
struct Marks {
  uint32_t flags = 0;
  Word codes = 0;
};

// Widens a bound to v, which is a number. The bits of floats from 0 on are ordered as integers are, those of others the
// other way round.
__device__ __forceinline__ void lower(float* bound, float v) {
  if (v >= 0.0f)
    atomicMin(reinterpret_cast<int*>(bound), static_cast<int>(as_bits(v + 0.0f)));  // 0 in the place of -0
  else
    atomicMax(reinterpret_cast<unsigned int*>(bound), as_bits(v));
}
__device__ __forceinline__ void raise(float* bound, float v) {
  if (v >= 0.0f)
    atomicMax(reinterpret_cast<int*>(bound), static_cast<int>(as_bits(v + 0.0f)));
  else
    atomicMin(reinterpret_cast<unsigned int*>(bound), as_bits(v));
}

// What a kernel knows of; each has those before it.
enum class Wanted {
  plain,  // y, rounded to nearest, and low, high and inside, which cost so little that they are always computed
  more,   // clip, above, codes, beyond, and no y
  exact,  // stochastic rounding and the mask of what is not rounded: they need the quotient itself
};

template <class X, class Y, Wanted kWanted>
struct Pass {
  static constexpr int kVector = kVectorOf<X, Y>, kRows = kAtOnce / kVector, kRow = kWarp * kVector;
  static constexpr bool kMore = kWanted >= Wanted::more, kExact = kWanted == Wanted::exact;
  using Word = std::conditional_t<kVector == kUnit, uint64_t, uint32_t>;
  using Raw = typename Array<X>::template Raw<kVector>;

  const TensorForward& entry;
  const Channel ch;
  const Array<X> x;
  const Array<Y> y;
  const float least, most;  // what x is clamped to
  const float limit;
  const float zero;  // the integer zero point
  const bool draws;
  const uint32_t time;
  Found found;

  __device__ explicit Pass(const TensorForward& e)
      : entry(e),
        ch(channel_of(e.grid, 0)),
        x(array<X>(e.x, e.x_dtype, 0)),
        y(array<Y>(e.y, e.y_dtype, 0)),
        least(e.clip != 0.0f ? 0.0f : -kInfinity),
        most(e.clip != 0.0f ? e.clip : kInfinity),
        limit(kMore && e.beyond ? *e.limit : 0.0f),
        zero(static_cast<float>(e.grid.qrange[0]) - ch.low),
        draws(kExact && e.noise.tensor_id >= 0),
        time(draws ? static_cast<uint32_t>(*e.noise.step) : 0u) {}

  // Values of n elements, the first of which is the `place`-th of those that are marked. u: their random numbers.
  template <bool kFast, int n, class W>
  __device__ __forceinline__ Vector<float, n> look(const Vector<float, n>& raw, const Vector<float, n>& u, int place,
                                                   Marks<W>& marks) {
    Vector<float, n> t, r, levels, values;
#pragma unroll
    for (int k = 0; k < n; ++k) t.v[k] = kMore ? clamp(raw.v[k], least, most) : raw.v[k];
    if (!kMore || entry.low) {
#pragma unroll
      for (int k = 0; k < n; ++k) found.range.see(t.v[k]);
    }
    if (kMore && entry.beyond) {
#pragma unroll
      for (int k = 0; k < n; ++k) found.beyond += fabsf(t.v[k]) > limit;
    }
#pragma unroll
    for (int k = 0; k < n; ++k) t.v[k] = shifted<true>(t.v[k], ch);
    r = kExact ? exact_quotients<kFast>(t, ch) : t;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      if (!kExact) r.v[k] = kFast ? ratio<true>(t.v[k], ch) : t.v[k] / ch.scale;
      const float rounded = draws ? floorf(r.v[k] + u.v[k]) : round_even(r.v[k]);
      levels.v[k] = clamp(rounded, ch.low, ch.high);
      values.v[k] = value<true>(levels.v[k], ch);
      if (!kExact || entry.rounded_mask) r.v[k] = rounded;
    }
    if (!kMore || entry.inside || entry.above) {
#pragma unroll
      for (int k = 0; k < n; ++k) {  // what is infinite is outside anyway, so that without a clip all others pass it
        const bool passes = !kMore || ((raw.v[k] > least) & (raw.v[k] < most));
        const uint32_t inside = passes & (clamp(r.v[k], ch.low, ch.high) == r.v[k]), above = kMore && r.v[k] > ch.high;
        marks.flags |= inside << (place + k) | above << (kUnit + place + k);
      }
    }
    if (kMore && entry.codes) {
      const uint32_t mask = (1u << entry.code_bits) - 1;
#pragma unroll
      for (int k = 0; k < n; ++k) {
        const float lev = levels.v[k], known = lev == lev ? lev : clamp(0.0f, ch.low, ch.high);
        const uint32_t code = static_cast<uint32_t>(static_cast<int32_t>(known + zero)) & mask;
        marks.codes |= static_cast<W>(code) << ((place + k) * entry.code_bits);
      }
    }
    return values;
  }

  // Unit u, or the first elements of it.
  __device__ __forceinline__ void mark(int64_t u, int count, const Marks<uint64_t>& marks) const {
    if (entry.inside) entry.inside[u] = static_cast<uint8_t>(marks.flags);
    if (kMore && entry.above) entry.above[u] = static_cast<uint8_t>(marks.flags >> kUnit);
    if (kMore && entry.codes)
      write(entry.codes + u * entry.code_bits, (count * entry.code_bits + 7) / 8, marks.codes,
            count == kUnit ? entry.code_width : 1);
  }

  __device__ __forceinline__ void unit(int64_t u) {
    const int64_t first = u * kUnit;
    const int count = static_cast<int>(std::min<int64_t>(kUnit, entry.numel - first));
    Marks<uint64_t> marks;
#pragma unroll 1
    for (int k = 0; k < count; ++k) {
      const Vector<float, 1> raw{{x.get(first + k)}}, number{{draws ? uniform_of(entry.noise, first + k) : 0.0f}};
      const Vector<float, 1> result = look<false>(raw, number, k, marks);
      if (!kMore || entry.y) y.set(first + k, result.v[0]);
    }
    mark(u, count, marks);
  }

  // A vector of this lane.
  __device__ __forceinline__ Marks<Word> row(int64_t first, const Raw& read) {
    Vector<float, kVector> raw, numbers{};
    Marks<Word> marks;
#pragma unroll
    for (int k = 0; k < kVector; ++k) raw.v[k] = to_float(read.v[k]);
    if (draws) {
#pragma unroll
      for (int half = 0; half < kVector; half += 4) {
        const Philox four = philox(entry.noise.seed, static_cast<uint64_t>((first + half) / 4), time,
                                   static_cast<uint32_t>(entry.noise.tensor_id));
#pragma unroll
        for (int k = 0; k < 4; ++k) numbers.v[half + k] = uniform(four.lane[k]);
      }
    }
    const Vector<float, kVector> values = look<true>(raw, numbers, 0, marks);
    if (!kMore || entry.y) y.template store<kVector, true>(first, values);
    return marks;
  }

  // Where a vector is half a unit: of two rows an even lane keeps the first, the next lane the second, and each gives
  // the other away.
  __device__ __forceinline__ Marks<uint64_t> exchanged(const Marks<Word>& one, const Marks<Word>& two, bool odd) const {
    Marks<uint64_t> both;
    if (entry.inside || (kMore && entry.above)) {
      const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? one.flags : two.flags, 1);
      both.flags = odd ? got | two.flags << kVector : one.flags | got << kVector;
    }
    if (kMore && entry.codes) {
      const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? one.codes : two.codes, 1);
      const uint64_t first = odd ? got : one.codes, second = odd ? two.codes : got;
      both.codes = first | second << (kVector * entry.code_bits);
    }
    return both;
  }

  // All lanes of a warp come here.
  __device__ __forceinline__ void tile(int64_t number) {
    const int lane = threadIdx.x % kWarp;
    const int64_t first = number * kTile + lane * kVector, units = number * (kTile / kUnit);
    Raw read[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) read[k] = x.template load<kVector>(first + k * kRow);
    __syncwarp();  // all loads are on their way before the first is waited for
    if constexpr (kVector == kUnit) {
#pragma unroll
      for (int k = 0; k < kRows; ++k) mark(units + k * kWarp + lane, kUnit, row(first + k * kRow, read[k]));
    } else {
      const int odd = lane % 2;
#pragma unroll
      for (int k = 0; k < kRows; k += 2) {
        const Marks<Word> one = row(first + k * kRow, read[k]), two = row(first + (k + 1) * kRow, read[k + 1]);
        mark(units + (k + odd) * (kWarp / 2) + lane / 2, kUnit, exchanged(one, two, odd));
      }
    }
  }

  __device__ __forceinline__ void deliver() {
    if (!entry.low && !entry.beyond) return;
    merge_block(found);
    if (threadIdx.x) return;
    if (entry.low && found.range.low <= found.range.high) {
      lower(entry.low, found.range.low);
      raise(entry.high, found.range.high);
    }
    if (entry.beyond && found.beyond) atomicAdd(entry.beyond, static_cast<unsigned long long>(found.beyond));
  }
};

template <class X, class Y, Wanted kWanted>
__global__ void __launch_bounds__(kThreads) tensor_kernel(const __grid_constant__ TensorForward entry) {
  Pass<X, Y, kWanted> pass(entry);
  const int64_t tiles = entry.aligned && is_fast_scale(pass.ch.scale) ? entry.numel / kTile : 0;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp; t < tiles; t += warps)
    pass.tile(t);
  const int64_t done = tiles * (kTile / kUnit), units = (entry.numel + kUnit - 1) / kUnit;
  for_each_unit(units - done, [&](int64_t u) { pass.unit(done + u); });
  pass.deliver();
}

Wanted wanted_of(const TensorForward& entry) {
  if (entry.noise.tensor_id >= 0 || !entry.rounded_mask) return Wanted::exact;
  const bool more = entry.clip != 0.0f || entry.above || entry.codes || entry.beyond || !entry.y;
  return more ? Wanted::more : Wanted::plain;
}

}  // namespace

void fake_quantize_tensor(const TensorForward& entry, void* stream) {
  if (!entry.numel) return;
  const Wanted wanted = wanted_of(entry);
  with_dtypes(entry.x_dtype, entry.y_dtype, [&](auto x, auto y) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    auto kernel = wanted == Wanted::exact  ? tensor_kernel<X, Y, Wanted::exact>
                  : wanted == Wanted::more ? tensor_kernel<X, Y, Wanted::more>
                                           : tensor_kernel<X, Y, Wanted::plain>;
    launch("fake_quantize_tensor", kernel, blocks_of(ceil_div(entry.numel, kAtOnce)), kThreads, stream, entry);
  });
}

}  // namespace fastqat::cuda
