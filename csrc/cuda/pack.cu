// pack: the low bits of integer codes as one bit stream, first code in the lowest bits; unpack: its inverse.
#include "bytes.cuh"
#include "units.cuh"

namespace fastqat::cuda {
namespace {

// Where `numel` codes of `bits` bits lie, and how their units are accessed.
struct Unit {
  int codes, bytes;            // of this unit; the last one may be shorter
  int wide_codes, wide_bytes;  // a step of an access to them

  __device__ __forceinline__ Unit(const Packing& p, int64_t u) {
    codes = static_cast<int>(std::min<int64_t>(kUnit, p.numel - u * kUnit));
    bytes = (codes * p.bits + 7) / 8;
    const bool wide = p.aligned && codes == kUnit;
    wide_codes = wide ? kUnit : 1;
    wide_bytes = wide ? p.bits & -p.bits : 1;  // the largest power of 2 that divides the distance between units
  }
};

// The low bytes of the codes of a unit.
__device__ __forceinline__ uint64_t read_codes(const uint8_t* codes, const Unit& unit) {
  return read(codes, unit.codes, unit.wide_codes);
}
__device__ __forceinline__ uint64_t read_codes(const int32_t* codes, const Unit& unit) {
  uint64_t word = 0;
#pragma unroll
  for (int k = 0; k < kUnit; ++k)
    if (k < unit.codes) word |= static_cast<uint64_t>(codes[k] & 0xff) << (8 * k);
  return word;
}

template <class Code>
__global__ void __launch_bounds__(kThreads) pack_kernel(Packing p) {
  const uint64_t mask = (1u << p.bits) - 1;
  for_each_unit((p.numel + kUnit - 1) / kUnit, [&](int64_t u) {
    const Unit unit(p, u);
    const uint64_t codes = read_codes(static_cast<const Code*>(p.codes) + u * kUnit, unit);
    uint64_t word = 0;
#pragma unroll
    for (int k = 0; k < kUnit; ++k) word |= (codes >> (8 * k) & mask) << (k * p.bits);
    write(static_cast<uint8_t*>(p.packed) + u * p.bits, unit.bytes, word, unit.wide_bytes);
  });
}

// `sign` is the sign bit for signed codes, else 0: (v ^ sign) - sign extends the sign.
__global__ void __launch_bounds__(kThreads) unpack_kernel(Packing p, uint32_t sign) {
  const uint64_t mask = (1u << p.bits) - 1;
  for_each_unit((p.numel + kUnit - 1) / kUnit, [&](int64_t u) {
    const Unit unit(p, u);
    const uint64_t word = read(static_cast<const uint8_t*>(p.packed) + u * p.bits, unit.bytes, unit.wide_bytes);
    uint64_t codes = 0;
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      const uint32_t code = static_cast<uint32_t>(word >> (k * p.bits) & mask);
      codes |= static_cast<uint64_t>(((code ^ sign) - sign) & 0xff) << (8 * k);
    }
    write(static_cast<uint8_t*>(p.codes) + u * kUnit, unit.codes, codes, unit.wide_codes);
  });
}

}  // namespace

void pack(const Packing& p, void* stream) {
  if (!p.numel) return;
  auto kernel = p.code_dtype == Dtype::int32 ? pack_kernel<int32_t> : pack_kernel<uint8_t>;
  launch("pack", kernel, blocks_of(ceil_div(p.numel, kUnit)), kThreads, stream, p);
}

void unpack(const Packing& p, void* stream) {
  if (!p.numel) return;
  const uint32_t sign = p.code_dtype == Dtype::int8 ? 1u << (p.bits - 1) : 0;
  launch("unpack", unpack_kernel, blocks_of(ceil_div(p.numel, kUnit)), kThreads, stream, p, sign);
}

}  // namespace fastqat::cuda
