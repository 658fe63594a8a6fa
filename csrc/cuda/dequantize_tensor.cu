// dequantize_tensor: the values of packed codes, for a tensor with one scale.
#include "bytes.cuh"
#include "grid.cuh"
#include "units.cuh"

namespace fastqat::cuda {
namespace {

constexpr int kAtOnce = 4;  // vectors whose codes a thread reads before it uses them

template <class Y>
struct Values {
  static constexpr int kVector = kVectorOf<Y, Y>;

  const TensorCodes& entry;
  const Channel ch;
  const Array<Y> y;
  const float zero;  // the integer zero point
  const uint32_t mask, sign;

  __device__ explicit Values(const TensorCodes& e)
      : entry(e),
        ch(channel_of(e.grid, 0)),
        y(array<Y>(e.y, e.y_dtype, 0)),
        zero(static_cast<float>(e.grid.qrange[0]) - ch.low),
        mask((1u << e.code_bits) - 1),
        sign(e.grid.qrange[0] < 0 ? 1u << (e.code_bits - 1) : 0u) {}

  // Codes of vector v in the lowest bits. kWide: bytes of a unit, which is whole and read at once; 0: any unit.
  template <int kWide>
  __device__ __forceinline__ uint64_t codes(int64_t v) const {
    const int64_t unit = v * kVector / kUnit;
    const uint8_t* from = entry.codes + unit * entry.code_bits;
    uint64_t word;
    if constexpr (kWide > 0) {
      word = read_bytes<kWide>(from, kWide);
    } else {
      const int count = static_cast<int>(std::min<int64_t>(kUnit, entry.numel - unit * kUnit));
      word = read(from, (count * entry.code_bits + 7) / 8, count == kUnit ? entry.code_width : 1);
    }
    return word >> static_cast<int>(v * kVector - unit * kUnit) * entry.code_bits;
  }

  __device__ __forceinline__ void write(int64_t v, uint64_t word) const {
    Vector<float, kVector> values;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const uint32_t code = static_cast<uint32_t>(word >> (k * entry.code_bits)) & mask;
      values.v[k] = value<true>(static_cast<float>(static_cast<int32_t>((code ^ sign) - sign)) - zero, ch);
    }
    const int64_t first = v * kVector;
    if (entry.aligned && first + kVector <= entry.numel) return y.template store<kVector, true>(first, values);
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      if (first + k < entry.numel) y.set(first + k, values.v[k]);
  }

  // Vectors from `first` to `last`, shared by all threads.
  template <int kWide>
  __device__ __forceinline__ void go(int64_t first, int64_t last) const {
    const int64_t all = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t v = first + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; v < last; v += all * kAtOnce) {
      uint64_t words[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (v + u * all < last) words[u] = codes<kWide>(v + u * all);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (v + u * all < last) write(v + u * all, words[u]);
    }
  }
};

template <class Y>
__global__ void __launch_bounds__(kThreads) dequantize_tensor_kernel(const __grid_constant__ TensorCodes entry) {
  const Values<Y> values(entry);
  const int64_t vectors = (entry.numel + values.kVector - 1) / values.kVector;
  const int64_t whole = entry.numel / kUnit * (kUnit / values.kVector);  // those of whole units
  const int wide = entry.code_width == entry.code_bits ? entry.code_width : 0;
  if (wide == 8) values.template go<8>(0, whole);
  if (wide == 4) values.template go<4>(0, whole);
  if (wide == 2) values.template go<2>(0, whole);
  if (wide == 1) values.template go<1>(0, whole);
  values.template go<0>(wide ? whole : 0, vectors);
}

}  // namespace

void dequantize_tensor(const TensorCodes& entry, void* stream) {
  if (!entry.numel) return;
  auto kernel = entry.y_dtype == Dtype::bfloat16  ? dequantize_tensor_kernel<BFloat16>
                : entry.y_dtype == Dtype::float16 ? dequantize_tensor_kernel<Float16>
                                                  : dequantize_tensor_kernel<float>;
  launch("dequantize_tensor", kernel,
         blocks_of(ceil_div(entry.numel, kAtOnce * vector_of(entry.y_dtype, entry.y_dtype))), kThreads, stream, entry);
}

}  // namespace fastqat::cuda
