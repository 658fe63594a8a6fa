// quantize to integer codes, and dequantize them.
#include "grid.cuh"
#include "table.cuh"
#include "traverse.cuh"
#include "vector.cuh"

namespace fastqat {

// The low byte of a code: what int8 and uint8 keep of it.
struct Byte {
  uint8_t bits;
};

template <>
struct FromFloat<Byte> {
  static FASTQAT_INLINE Byte convert(float v) { return {static_cast<uint8_t>(static_cast<int32_t>(v))}; }
};

namespace cuda {
namespace {

// What both directions share. X, Code: Byte with a vector, or Any and int32_t with an element at a time.
template <class X, class Code>
struct Codes : Elementwise {
  static constexpr int kVector = sizeof(Code) == 1 ? kVectorOf<X, Code> : 1, kAtOnce = 16;

  const Coded& entry;
  Array<X> x;
  Array<Code> codes;
  float qmin;

  __device__ explicit Codes(const Coded& e) : entry(e), qmin(static_cast<float>(e.grid.qrange[0])) {}
  __device__ __forceinline__ Channel channel(int64_t c) const { return channel_of(entry.grid, c); }

  __device__ __forceinline__ void place(int64_t base) {
    x = array<X>(entry.x, entry.x_dtype, base);
    codes = array<Code>(entry.codes, entry.code_dtype, base);
  }
};

template <class X, class Code>
struct Quantize : Codes<X, Code> {
  using Codes<X, Code>::Codes;
  template <int n>
  using Operands = typename Array<X>::template Raw<n>;

  template <int n>
  __device__ __forceinline__ Operands<n> load(int i) const {
    return this->x.template load<n>(i);
  }

  template <int n>
  __device__ __forceinline__ void apply(int i, const Operands<n>& operands, const Channel& ch, NoSums&) const {
    const float zero = this->qmin - ch.low;
    Vector<float, n> values;
#pragma unroll
    for (int k = 0; k < n; ++k) values.v[k] = fastqat::quantize<(n > 1), true>(to_float(operands.v[k]), ch) + zero;
    this->codes.template store<n>(i, values);
  }
};

template <class X, class Code>
struct Dequantize : Codes<X, Code> {
  using Codes<X, Code>::Codes;
  template <int n>
  using Operands = typename Array<Code>::template Raw<n>;

  template <int n>
  __device__ __forceinline__ Operands<n> load(int i) const {
    return this->codes.template load<n>(i);
  }

  __device__ __forceinline__ float code(int32_t v) const { return static_cast<float>(v); }
  __device__ __forceinline__ float code(Byte v) const {
    return static_cast<float>(this->entry.code_dtype == Dtype::int8 ? static_cast<int8_t>(v.bits) : v.bits);
  }

  template <int n>
  __device__ __forceinline__ void apply(int i, const Operands<n>& operands, const Channel& ch, NoSums&) const {
    const float zero = this->qmin - ch.low;
    Vector<float, n> values;
#pragma unroll
    for (int k = 0; k < n; ++k) values.v[k] = value<true>(code(operands.v[k]) - zero, ch);
    this->x.template store<n>(i, values);
  }
};

template <class Body>
__global__ void __launch_bounds__(kThreads) codes_kernel(const __grid_constant__ Table<Coded, 1> table) {
  for (int piece = blockIdx.x; piece < table.pieces; piece += gridDim.x) {
    Body body(table.entries[0]);
    traverse(body, body.entry.cut, piece, nullptr, nullptr);
  }
}

template <template <class, class> class Body>
void start(const char* name, const Coded& entry, void* stream) {
  auto kernel = entry.code_dtype == Dtype::int32   ? codes_kernel<Body<Any, int32_t>>
                : entry.x_dtype == Dtype::bfloat16 ? codes_kernel<Body<BFloat16, Byte>>
                : entry.x_dtype == Dtype::float16  ? codes_kernel<Body<Float16, Byte>>
                                                   : codes_kernel<Body<float, Byte>>;
  for_each_table<1>(&entry, 1,
                    [&](const auto& table, int64_t blocks) { launch(name, kernel, blocks, kThreads, stream, table); });
}

}  // namespace

void quantize(const Coded& entry, void* stream) { start<Quantize>("quantize", entry, stream); }

void dequantize(const Coded& entry, void* stream) { start<Dequantize>("dequantize", entry, stream); }

}  // namespace cuda
}  // namespace fastqat
