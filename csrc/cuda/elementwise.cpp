// Ops whose elements have nothing to do with each other: quantize and dequantize, pack and unpack, philox_uniform.
#include "glue.h"

namespace fastqat::cuda {
namespace {

// x and codes: dense, of the same strides.
void convert(void (*kernel)(const Coded&, void*), const Device& device, const Tensor& x, const Tensor& codes,
             const DeviceGrid& grid, std::optional<int64_t> axis) {
  const Dtype x_dtype = dtype_of(x), code_dtype = dtype_of(codes);
  const bool vectors = code_dtype != Dtype::int32 && is_aligned(x) && is_aligned(codes);
  const Cut cut = make_cut(layout_of(x, axis), vector_of(x_dtype, code_dtype), vectors);
  kernel({x.data_ptr(), codes.data_ptr(), grid.pointers(), cut, x_dtype, code_dtype}, device.stream());
}

Packing packing(const Tensor& codes, const Tensor& packed, int64_t bits) {
  return {codes.data_ptr(),       packed.data_ptr(), codes.numel(),
          static_cast<int>(bits), dtype_of(codes),   is_aligned(codes) && is_aligned(packed)};
}

}  // namespace

void quantize_out(Tensor x, FASTQAT_GRID, ScalarType, Tensor codes) {
  Device device(x);
  const DeviceGrid grid(scale, zero_point, offset, qrange, eps);
  x = dense(x);
  write_into(codes, x, [&](const Tensor& to) { convert(quantize, device, x, to, grid, axis); });
}

void dequantize_out(Tensor codes, FASTQAT_GRID, ScalarType, Tensor y) {
  Device device(codes);
  const DeviceGrid grid(scale, zero_point, offset, qrange, eps);
  codes = dense(codes);
  write_into(y, codes, [&](const Tensor& to) { convert(dequantize, device, to, codes, grid, axis); });
}

void pack_out(Tensor codes, int64_t bits, Tensor packed) {
  Device device(codes);
  codes = torch::stable::contiguous(codes);
  pack(packing(codes, packed, bits), device.stream());
}

void unpack_out(Tensor packed, int64_t bits, int64_t, bool, Tensor codes) {
  Device device(packed);
  packed = torch::stable::contiguous(packed);
  unpack(packing(codes, packed, bits), device.stream());
}

void philox_uniform_out(Tensor step, int64_t seed, int64_t tensor_id, int64_t numel, Tensor u) {
  Device device(step);
  philox_uniform(noise_of(seed, step, tensor_id), numel, is_aligned(u), u.mutable_data_ptr<float>(), device.stream());
}

}  // namespace fastqat::cuda
