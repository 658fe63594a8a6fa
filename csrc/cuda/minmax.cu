// minmax: smallest and largest finite value of each channel in one pass.
#include "../math.h"
#include "table.cuh"
#include "traverse.cuh"
#include "vector.cuh"

namespace fastqat::cuda {
namespace {

template <class X>
struct Extremes {
  using Sums = Range;
  static constexpr int kVector = kVectorOf<X, X>, kAtOnce = 16;
  template <int n>
  using Operands = typename Array<X>::template Raw<n>;

  const MinMax& entry;
  Array<X> x;

  __device__ explicit Extremes(const MinMax& e) : entry(e) {}
  __device__ __forceinline__ Channel channel(int64_t) const {
    Channel ch{};
    ch.scale = 1.0f;  // a fast one: vectors are welcome
    return ch;
  }
  __device__ __forceinline__ void begin(int64_t) const {}
  __device__ __forceinline__ void end() const {}
  __device__ __forceinline__ void place(int64_t base) { x = array<X>(entry.x, entry.x_dtype, base); }

  template <int n>
  __device__ __forceinline__ Operands<n> load(int i) const {
    return x.template load<n>(i);
  }

  template <int n>
  __device__ __forceinline__ void apply(int, const Operands<n>& operands, const Channel&, Range& range) const {
#pragma unroll
    for (int k = 0; k < n; ++k) range.see(to_float(operands.v[k]));
  }

  __device__ __forceinline__ void finish(int c, const Range& range) const {
    entry.low[c] = range.low;
    entry.high[c] = range.high;
  }
};

template <class X>
__global__ void __launch_bounds__(kThreads) minmax_kernel(const __grid_constant__ Table<MinMax, 1> table) {
  const MinMax& entry = table.entries[0];
  for (int piece = blockIdx.x; piece < table.pieces; piece += gridDim.x) {
    Extremes<X> body(entry);
    traverse(body, entry.cut, piece, reinterpret_cast<Range*>(entry.partial), entry.arrived);
  }
}

}  // namespace

void minmax(const MinMax& entry, void* stream) {
  auto kernel = entry.x_dtype == Dtype::bfloat16  ? minmax_kernel<BFloat16>
                : entry.x_dtype == Dtype::float16 ? minmax_kernel<Float16>
                                                  : minmax_kernel<float>;
  for_each_table<1>(
      &entry, 1, [&](const auto& table, int64_t blocks) { launch("minmax", kernel, blocks, kThreads, stream, table); });
}

}  // namespace fastqat::cuda
