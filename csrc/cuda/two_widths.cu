// fake_quantize of one tensor on two grids, from one read of it.
#include "grid.cuh"
#include "table.cuh"
#include "traverse.cuh"
#include "vector.cuh"

namespace fastqat::cuda {
namespace {

struct TwoChannels {
  Channel first, second;
};

// Vectors are for two fast scales; else single elements are divided.
__device__ __forceinline__ bool is_fast(const TwoChannels& ch) {
  return is_fast_scale(ch.first.scale) && is_fast_scale(ch.second.scale);
}

template <class X, class Y>
struct Both : Elementwise {
  static constexpr int kVector = kVectorOf<X, Y>, kAtOnce = 16;
  template <int n>
  using Operands = typename Array<X>::template Raw<n>;

  const TwoWidths& entry;
  Array<X> x;
  Array<Y> first, second;

  __device__ explicit Both(const TwoWidths& e) : entry(e) {}
  __device__ __forceinline__ TwoChannels channel(int64_t c) const {
    return {channel_of(entry.grids[0], c), channel_of(entry.grids[1], c)};
  }

  __device__ __forceinline__ void place(int64_t base) {
    x = array<X>(entry.x, entry.x_dtype, base);
    first = array<Y>(entry.first, entry.y_dtype, base);
    second = array<Y>(entry.second, entry.y_dtype, base);
  }

  template <int n>
  __device__ __forceinline__ Operands<n> load(int i) const {
    return x.template load<n>(i);
  }

  template <int n>
  __device__ __forceinline__ void apply(int i, const Operands<n>& operands, const TwoChannels& ch, Sums&) const {
    write(first, i, operands, ch.first);
    write(second, i, operands, ch.second);
  }

  template <int n>
  __device__ __forceinline__ void write(const Array<Y>& y, int i, const Vector<X, n>& operands,
                                        const Channel& ch) const {
    Vector<float, n> values;
#pragma unroll
    for (int k = 0; k < n; ++k) values.v[k] = fastqat::fake_quantize<(n > 1), true>(to_float(operands.v[k]), ch);
    y.template store<n>(i, values);
  }
};

template <class X, class Y>
__global__ void __launch_bounds__(kThreads, 4) two_widths_kernel(const __grid_constant__ Table<TwoWidths, 1> table) {
  const TwoWidths& entry = table.entries[0];
  Both<X, Y> body(entry);
  for (int piece = blockIdx.x; piece < table.pieces; piece += gridDim.x)
    traverse(body, entry.cut, piece, nullptr, nullptr);
}

}  // namespace

void fake_quantize_two_widths(const TwoWidths& entry, void* stream) {
  with_dtypes(entry.x_dtype, entry.y_dtype, [&](auto x, auto y) {
    auto kernel = two_widths_kernel<typename decltype(x)::type, typename decltype(y)::type>;
    for_each_table<1>(&entry, 1, [&](const auto& table, int64_t blocks) {
      launch("fake_quantize_two_widths", kernel, blocks, kThreads, stream, table);
    });
  });
}

}  // namespace fastqat::cuda
