// fake_quantize of many tensors in one launch.
#include "grid.cuh"
#include "table.cuh"
#include "traverse.cuh"
#include "vector.cuh"

namespace fastqat::cuda {
namespace {

template <class X, class Y>
struct Plain : Elementwise {
  static constexpr int kVector = kVectorOf<X, Y>, kAtOnce = 16;
  template <int n>
  using Operands = typename Array<X>::template Raw<n>;

  const Forward& entry;
  Array<X> x;
  Array<Y> y;

  __device__ explicit Plain(const Forward& e) : entry(e) {}
  __device__ __forceinline__ Channel channel(int64_t c) const { return channel_of(entry.grid, c); }

  __device__ __forceinline__ void place(int64_t base) {
    x = array<X>(entry.x, entry.x_dtype, base);
    y = array<Y>(entry.y, entry.y_dtype, base);
  }

  template <int n>
  __device__ __forceinline__ Operands<n> load(int i) const {
    return x.template load<n>(i);
  }

  template <int n>
  __device__ __forceinline__ void apply(int i, const Operands<n>& operands, const Channel& ch, Sums&) const {
    Vector<float, n> values;
#pragma unroll
    for (int k = 0; k < n; ++k) values.v[k] = fastqat::fake_quantize<(n > 1), true>(to_float(operands.v[k]), ch);
    y.template store<n>(i, values);
  }
};

template <class X, class Y, int kCapacity>
__global__ void __launch_bounds__(kThreads) plain_kernel(const __grid_constant__ Table<Forward, kCapacity> table) {
  for (int piece = blockIdx.x; piece < table.pieces; piece += gridDim.x) {
    const int which = table.find(piece);
    Plain<X, Y> body(table.entries[which]);
    traverse(body, body.entry.cut, piece - table.starts[which], nullptr, nullptr);
  }
}

template <class X, class Y>
void start(const Forward* entries, int count, void* stream) {
  auto with_capacity = [&](auto capacity) {
    constexpr int kCapacity = decltype(capacity)::value;
    for_each_table<kCapacity>(entries, count, [&](const auto& table, int64_t blocks) {
      launch("fake_quantize", plain_kernel<X, Y, kCapacity>, blocks, kThreads, stream, table);
    });
  };
  if (count == 1)
    with_capacity(std::integral_constant<int, 1>());
  else
    with_capacity(std::integral_constant<int, kMost>());
}

}  // namespace

void fake_quantize(const Forward* entries, int count, void* stream) {
  if (!count) return;
  with_dtypes(entries[0].x_dtype, entries[0].y_dtype, [&](auto x, auto y) {
    start<typename decltype(x)::type, typename decltype(y)::type>(entries, count, stream);
  });
}

}  // namespace fastqat::cuda
