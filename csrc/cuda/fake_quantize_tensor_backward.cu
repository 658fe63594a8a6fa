// fake_quantize_tensor_backward: dx from a bit of each element, and the sum for the scale from another.
#include "../math.h"
#include "table.cuh"
#include "traverse.cuh"
#include "vector.cuh"

namespace fastqat::cuda {
namespace {

struct OneSum {
  static constexpr bool kAny = true;
  double total = 0.0;
  __device__ __forceinline__ void merge(const OneSum& other) { total += other.total; }
  __device__ __forceinline__ OneSum shuffled(int distance, int lanes) const {
    return {__shfl_down_sync(kAllLanes, total, distance, lanes)};
  }
};

// kLearned: whether the scale has a gradient.
template <class X, class G, bool kLearned>
struct Masked : Elementwise {
  using Sums = std::conditional_t<kLearned, OneSum, NoSums>;
  static constexpr int kVector = kVectorOf<X, G>, kAtOnce = 16;
  template <int n>
  struct Operands {
    typename Array<G>::template Raw<n> g;
    uint32_t inside, above;  // bit k: of the k-th
  };

  const TensorBackward& entry;
  Array<X> dx;
  Array<G> g;
  int64_t base = 0;

  __device__ explicit Masked(const TensorBackward& e) : entry(e) {}
  __device__ __forceinline__ Channel channel(int64_t) const {
    Channel ch{};
    ch.scale = 1.0f;  // a fast one: vectors are welcome
    return ch;
  }
  __device__ __forceinline__ void place(int64_t base_) {
    base = base_;
    g = array<G>(entry.g, entry.g_dtype, base);
    dx = array<X>(entry.dx, entry.dx_dtype, base);
  }

  template <int n>
  __device__ __forceinline__ Operands<n> load(int i) const {
    const int64_t element = base + i;  // a multiple of n, and bits of n elements lie in one byte
    const int place = static_cast<int>(element % 8);
    Operands<n> operands;
    operands.g = g.template load<n>(i);
    operands.inside = static_cast<uint32_t>(entry.inside[element / 8]) >> place;
    operands.above = kLearned ? static_cast<uint32_t>(entry.above[element / 8]) >> place : 0u;
    return operands;
  }

  template <int n>
  __device__ __forceinline__ void apply(int i, const Operands<n>& operands, const Channel&, Sums& sums) const {
    Vector<float, n> results;
    float above = 0.0f;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float gradient = to_float(operands.g.v[k]);
      results.v[k] = operands.inside >> k & 1 ? gradient : 0.0f;
      above += operands.above >> k & 1 ? gradient : 0.0f;
    }
    dx.template store<n>(i, results);
    if constexpr (kLearned) sums.total += above;
  }

  __device__ __forceinline__ void finish(int64_t, const Sums& sums) const {
    if constexpr (kLearned) *entry.dscale = static_cast<float>(sums.total * static_cast<double>(entry.qrange[1]));
  }
};

template <class X, class G, bool kLearned>
__global__ void __launch_bounds__(kThreads)
    tensor_backward_kernel(const __grid_constant__ Table<TensorBackward, 1> table) {
  const TensorBackward& entry = table.entries[0];
  for (int piece = blockIdx.x; piece < table.pieces; piece += gridDim.x) {
    using Body = Masked<X, G, kLearned>;
    Body body(entry);
    traverse(body, entry.cut, piece, reinterpret_cast<typename Body::Sums*>(entry.partial), entry.arrived);
  }
}

}  // namespace

void fake_quantize_tensor_backward(const TensorBackward& entry, void* stream) {
  with_dtypes(entry.dx_dtype, entry.g_dtype, [&](auto x, auto g) {
    using X = typename decltype(x)::type;
    using G = typename decltype(g)::type;
    auto kernel = entry.dscale ? tensor_backward_kernel<X, G, true> : tensor_backward_kernel<X, G, false>;
    for_each_table<1>(&entry, 1, [&](const auto& table, int64_t blocks) {
      launch("fake_quantize_tensor_backward", kernel, blocks, kThreads, stream, table);
    });
  });
}

}  // namespace fastqat::cuda
