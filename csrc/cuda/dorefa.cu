// A weight of DoReFa at one or two bit-widths from one read of it, and its gradient.
//
// The gradient has a sum over all elements, which only those with |x| = max|x| wait for: a first kernel writes dx as if
// there were none of them, and what each piece adds to the sum; a second one mends the pieces that have such elements,
// a few as a rule.
#include "../dorefa.h"
#include "table.cuh"
#include "traverse.cuh"
#include "vector.cuh"

namespace fastqat::cuda {
namespace {

// The sums of r and of r^2, for each width.
template <int kWidths>
struct Counts {
  static constexpr int kSize = 2 * kWidths;
  unsigned long long of[kSize] = {};
  __device__ __forceinline__ void merge(const Counts& other) {
    for (int k = 0; k < kSize; ++k) of[k] += other.of[k];
  }
  __device__ __forceinline__ Counts shuffled(int distance, int lanes) const {
    Counts other;
    for (int k = 0; k < kSize; ++k) other.of[k] = __shfl_down_sync(kAllLanes, of[k], distance, lanes);
    return other;
  }
};

struct Widths {
  Normalizer by;
  Channel n[2];
};

__device__ __forceinline__ bool is_fast(const Widths& widths) { return is_fast_scale(widths.by.largest.scale); }

template <class X, class Y, bool kPair, bool kSums>
struct Levels : Elementwise {
  static constexpr int kVector = kVectorOf<X, Y>, kAtOnce = 16;
  template <int n>
  using Operands = typename Array<X>::template Raw<n>;

  const Dorefa& entry;
  const Widths widths;
  Array<X> x;
  Array<Y> first, second;
  Counts<kPair ? 2 : 1> counts;

  __device__ explicit Levels(const Dorefa& e)
      : entry(e),
        widths{make_normalizer(*e.low, *e.high),
               {divisor(static_cast<float>(e.qmax[0])), divisor(static_cast<float>(e.qmax[kPair]))}} {}
  __device__ __forceinline__ Widths channel(int64_t) const { return widths; }

  __device__ __forceinline__ void place(int64_t base) {
    x = array<X>(entry.x, entry.x_dtype, base);
    first = array<Y>(entry.first, entry.y_dtype, base);
    if (kPair) second = array<Y>(entry.second, entry.y_dtype, base);
  }

  template <int n>
  __device__ __forceinline__ Operands<n> load(int i) const {
    return x.template load<n>(i);
  }

  template <int n>
  __device__ __forceinline__ void apply(int i, const Operands<n>& operands, const Widths& ch, Sums&) {
    Vector<float, n> u;
#pragma unroll
    for (int k = 0; k < n; ++k) u.v[k] = normalized<(n > 1)>(fastqat::tanh(to_float(operands.v[k])), ch.by);
    write(first, i, u, ch.n[0], counts.of);
    if (kPair) write(second, i, u, ch.n[1], counts.of + 2);
  }

  template <int n>
  __device__ __forceinline__ void write(const Array<Y>& y, int i, const Vector<float, n>& u, const Channel& width,
                                        unsigned long long* sums) const {
    Vector<float, n> values;
    uint32_t sum = 0, squares = 0;  // of a vector, for up to 14 bits
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float r = dorefa_level(u.v[k], width);
      values.v[k] = dorefa_value(r, width);
      if (kSums) {
        const auto number = static_cast<uint32_t>(fmaxf(r, 0.0f));  // 0 for NaN
        sum += number;
        squares += number * number;
      }
    }
    if (kSums) sums[0] += sum;
    if (kSums) sums[1] += squares;
    y.template store<n, (n > 1)>(i, values);
  }

  __device__ __forceinline__ void deliver() {
    merge_block(counts);
    if (threadIdx.x) return;
    for (int k = 0; k < counts.kSize; ++k) atomicAdd(entry.sums + k, counts.of[k]);
  }
};

template <class X, class Y, bool kPair, bool kSums>
__global__ void __launch_bounds__(kThreads, kPair&& kSums ? 3 : 4)
    dorefa_kernel(const __grid_constant__ Table<Dorefa, 1> table) {
  Levels<X, Y, kPair, kSums> body(table.entries[0]);
  for (int piece = blockIdx.x; piece < table.pieces; piece += gridDim.x)
    traverse(body, body.entry.cut, piece, nullptr, nullptr);
  if constexpr (kSums) body.deliver();
}

// What a thread, and then a piece, adds to the gradient of m.
struct ThroughLargest : DorefaPart {
  __device__ __forceinline__ void merge(const DorefaPart& other) {
    total += other.total;
    ties += other.ties;
  }
  __device__ __forceinline__ ThroughLargest shuffled(int distance, int lanes) const {
    ThroughLargest other;
    other.total = __shfl_down_sync(kAllLanes, total, distance, lanes);
    other.ties = __shfl_down_sync(kAllLanes, ties, distance, lanes);
    return other;
  }
};

struct Slope {
  Normalizer by;
  float factor;
  float end;  // of the magnitudes that pass a gradient
};

__device__ __forceinline__ bool is_fast(const Slope& slope) { return is_fast_scale(slope.by.largest.scale); }

__device__ __forceinline__ Slope slope_of(const DorefaBackward& entry) {
  const Normalizer by = make_normalizer(*entry.low, *entry.high);
  return {by, entry.factor ? *entry.factor : 1.0f, by.m > 0.0f ? kInfinity : 0.0f};
}

template <class X, class G>
struct Direct : Elementwise {
  static constexpr int kVector = kVectorOf<X, G>, kAtOnce = 16;
  template <int n>
  struct Operands {
    typename Array<G>::template Raw<n> g;
    typename Array<X>::template Raw<n> x;
  };

  const DorefaBackward& entry;
  const Slope slope;
  Array<X> x, dx;
  Array<G> g;
  int64_t part = 0;
  ThroughLargest found;

  __device__ explicit Direct(const DorefaBackward& e) : entry(e), slope(slope_of(e)) {}
  __device__ __forceinline__ Slope channel(int64_t) const { return slope; }

  __device__ __forceinline__ void begin(int64_t origin) {
    part = origin / kPiece;
    found = ThroughLargest();
  }
  __device__ __forceinline__ void place(int64_t base) {
    g = array<G>(entry.g, entry.g_dtype, base);
    x = array<X>(entry.x, entry.x_dtype, base);
    dx = array<X>(entry.dx, entry.x_dtype, base);
  }

  template <int n>
  __device__ __forceinline__ Operands<n> load(int i) const {
    return {g.template load<n>(i), x.template load<n>(i)};
  }

  template <int n>
  __device__ __forceinline__ void apply(int i, const Operands<n>& operands, const Slope& ch, Sums&) {
    Vector<float, n> results;
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float raw = to_float(operands.x.v[k]), gradient = to_float(operands.g.v[k]), t = fastqat::tanh(raw);
      const bool passes = fabsf(raw) < ch.end;
      const float d = dorefa_dx<(n > 1)>(gradient, t, 0.0f, ch.factor, ch.by);
      results.v[k] = passes ? d : 0.0f;
      sum += passes ? gradient * normalized<(n > 1)>(t, ch.by) : 0.0f;
      found.ties += fabsf(raw) == ch.by.m;
    }
    found.total += sum;
    dx.template store<n, (n > 1)>(i, results);
  }

  __device__ __forceinline__ void end() {
    merge_block(found);
    if (threadIdx.x == 0) entry.parts[part] = found;
  }
};

template <class X, class G>
__global__ void __launch_bounds__(kThreads)
    dorefa_backward_kernel(const __grid_constant__ Table<DorefaBackward, 1> table) {
  Direct<X, G> body(table.entries[0]);
  for (int piece = blockIdx.x; piece < table.pieces; piece += gridDim.x)
    traverse(body, body.entry.cut, piece, nullptr, nullptr);
}

// The sum over all pieces, in their order, for each element with |x| = m.
__device__ __forceinline__ float share_of(const DorefaBackward& entry) {
  auto& share = shared<float>();
  ThroughLargest all;
  for (int p = threadIdx.x; p < entry.cut.parts; p += kThreads) all.merge(entry.parts[p]);
  merge_block(all);
  if (threadIdx.x == 0) share = static_cast<float>(all.total / static_cast<double>(all.ties));
  __syncthreads();
  return share;
}

__global__ void __launch_bounds__(kThreads) dorefa_mend_kernel(const __grid_constant__ Table<DorefaBackward, 1> table) {
  const DorefaBackward& entry = table.entries[0];
  const Slope slope = slope_of(entry);
  if (!(slope.by.m > 0.0f)) return;
  const auto g = array<Any>(entry.g, entry.g_dtype, 0), x = array<Any>(entry.x, entry.x_dtype, 0);
  const auto dx = array<Any>(entry.dx, entry.x_dtype, 0);
  float share = __builtin_nanf("");
  for (int piece = blockIdx.x; piece < table.pieces; piece += gridDim.x) {
    if (!entry.parts[piece].ties) continue;
    if (share != share) share = share_of(entry);
    const int64_t first = static_cast<int64_t>(piece) * kPiece, last = std::min(first + kPiece, entry.cut.inner);
    for (int64_t i = first + threadIdx.x; i < last; i += kThreads) {
      const float raw = x.get(i);
      if (fabsf(raw) != slope.by.m) continue;
      const float through = through_largest(raw, share);
      dx.set(i, dorefa_dx<false>(g.get(i), fastqat::tanh(raw), through, slope.factor, slope.by));
    }
  }
}

template <class X, class Y>
auto kernel_of(const Dorefa& entry) {
  if (entry.second) return entry.sums ? dorefa_kernel<X, Y, true, true> : dorefa_kernel<X, Y, true, false>;
  return entry.sums ? dorefa_kernel<X, Y, false, true> : dorefa_kernel<X, Y, false, false>;
}

}  // namespace

void dorefa_fake_quantize(const Dorefa& entry, void* stream) {
  with_dtypes(entry.x_dtype, entry.y_dtype, [&](auto x, auto y) {
    auto kernel = kernel_of<typename decltype(x)::type, typename decltype(y)::type>(entry);
    for_each_table<1>(&entry, 1, [&](const auto& table, int64_t blocks) {
      launch("dorefa_fake_quantize", kernel, blocks, kThreads, stream, table);
    });
  });
}

void dorefa_fake_quantize_backward(const DorefaBackward& entry, void* stream) {
  with_dtypes(entry.x_dtype, entry.g_dtype, [&](auto x, auto g) {
    auto kernel = dorefa_backward_kernel<typename decltype(x)::type, typename decltype(g)::type>;
    for_each_table<1>(&entry, 1, [&](const auto& table, int64_t blocks) {
      launch("dorefa_fake_quantize_backward", kernel, blocks, kThreads, stream, table);
      launch("dorefa_mend", dorefa_mend_kernel, blocks, kThreads, stream, table);
    });
  });
}

}  // namespace fastqat::cuda
