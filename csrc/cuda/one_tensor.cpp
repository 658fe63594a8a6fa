// Ops on one tensor with one scale.
#include "glue.h"

namespace fastqat::cuda {
namespace {

// What an empty tensor does not ask for is null.
template <class T>
T* asked(const Tensor& t) {
  return t.numel() ? t.mutable_data_ptr<T>() : nullptr;
}

// Bytes of an access to the codes of eight elements, the first of which lie at `codes`: the largest power of 2 that
// divides their number, and the address.
int32_t code_width(const Tensor& codes, int64_t bits) {
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(codes.data_ptr()));
  const int64_t either = address | bits;
  return static_cast<int32_t>(either & -either);
}

}  // namespace

void fake_quantize_tensor(Tensor x, FASTQAT_TENSOR_GRID, double clip, bool rounded_mask, int64_t seed,
                          int64_t tensor_id, Tensor step, Tensor limit, int64_t code_bits, Tensor low, Tensor high,
                          Tensor beyond, Tensor inside, Tensor above, Tensor codes, Tensor y) {
  if (!x.numel()) return;
  Device device(x);
  const DeviceGrid grid(scale, zero_point, offset, qrange, eps);
  const Tensor own = of_dtype(dense(x), y.numel() ? computed_dtype(x, y.scalar_type()) : x.scalar_type());
  std::optional<Result> result;
  if (y.numel()) result.emplace(y, own);
  TensorForward entry{};
  entry.x = own.data_ptr();
  entry.y = result ? result->own.data_ptr() : nullptr;
  entry.grid = grid.pointers();
  entry.noise = tensor_id < 0 ? kNoNoise : noise_of(seed, step, tensor_id);
  entry.numel = own.numel();
  entry.low = asked<float>(low);
  entry.high = asked<float>(high);
  entry.beyond = reinterpret_cast<unsigned long long*>(asked<int64_t>(beyond));
  entry.limit = entry.beyond ? limit.const_data_ptr<float>() : nullptr;
  entry.inside = asked<uint8_t>(inside);
  entry.above = asked<uint8_t>(above);
  entry.codes = asked<uint8_t>(codes);
  entry.clip = static_cast<float>(clip);
  entry.code_bits = static_cast<int32_t>(code_bits);
  entry.code_width = entry.codes ? code_width(codes, code_bits) : 1;
  entry.x_dtype = dtype_of(own);
  entry.y_dtype = result ? dtype_of(result->own) : entry.x_dtype;
  entry.aligned = is_aligned(own) && (!result || is_aligned(result->own));
  entry.rounded_mask = rounded_mask;
  fake_quantize_tensor(entry, device.stream());
  if (result) result->deliver();
}

void fake_quantize_tensor_backward(Tensor g, Tensor inside, Tensor above, Tensor qrange, Tensor dx, Tensor dscale) {
  Device device(g);
  Result result(dx, dx, computed_dtype(dx, g.scalar_type()));
  const Tensor own = with_strides_of(dx, g);
  TensorBackward entry{};
  entry.g = own.data_ptr();
  entry.dx = result.own.data_ptr();
  entry.inside = inside.const_data_ptr<uint8_t>();
  entry.above = above.const_data_ptr<uint8_t>();
  entry.qrange = qrange.const_data_ptr<int32_t>();
  entry.dscale = asked<float>(dscale);
  entry.dx_dtype = dtype_of(result.own);
  entry.g_dtype = dtype_of(own);
  entry.cut = make_cut({1, 1, own.numel()}, vector_of(entry.dx_dtype, entry.g_dtype),
                       is_aligned(own) && is_aligned(result.own));
  const bool meets = entry.dscale && entry.cut.parts > 1;
  const Meetings<double> meetings(meets ? entry.cut.parts : 0, meets, device, g);
  entry.partial = meetings.partial;
  entry.arrived = meetings.arrived;
  fake_quantize_tensor_backward(entry, device.stream());
  result.deliver();
}

void dequantize_tensor(Tensor codes, FASTQAT_TENSOR_GRID, int64_t code_bits, Tensor y) {
  if (!y.numel()) return;
  Device device(codes);
  const DeviceGrid grid(scale, zero_point, offset, qrange, eps);
  dequantize_tensor({codes.const_data_ptr<uint8_t>(), y.data_ptr(), grid.pointers(), y.numel(),
                     static_cast<int32_t>(code_bits), code_width(codes, code_bits), dtype_of(y), is_aligned(y)},
                    device.stream());
}

void advance_range(Tensor qrange, Tensor step, bool always, double momentum, Tensor low, Tensor high, Tensor new_low,
                   Tensor new_high, Tensor observed_step, Tensor scale, Tensor zero_point) {
  Device device(low);
  RangeState state{};
  state.qrange = qrange.const_data_ptr<int32_t>();
  state.step = step.const_data_ptr<int64_t>();
  state.low = low.mutable_data_ptr<float>();
  state.high = high.mutable_data_ptr<float>();
  state.new_low = new_low.mutable_data_ptr<float>();
  state.new_high = new_high.mutable_data_ptr<float>();
  state.scale = scale.mutable_data_ptr<float>();
  state.zero_point = asked<float>(zero_point);
  state.observed_step = observed_step.mutable_data_ptr<int64_t>();
  state.momentum = static_cast<float>(momentum);
  state.rest = static_cast<float>(1.0 - momentum);
  state.always = always;
  advance_range(state, device.stream());
}

void advance_interval(Tensor low, Tensor high, Tensor qrange, Tensor step, bool always, int64_t numel, double alpha,
                      double stride, double smallest, Tensor gamma, Tensor beyond, Tensor seen, Tensor observed_step,
                      Tensor limit, Tensor scale) {
  Device device(low);
  IntervalState state{};
  state.low = low.const_data_ptr<float>();
  state.high = high.const_data_ptr<float>();
  state.qrange = qrange.const_data_ptr<int32_t>();
  state.step = step.const_data_ptr<int64_t>();
  state.gamma = gamma.mutable_data_ptr<float>();
  state.limit = limit.mutable_data_ptr<float>();
  state.scale = scale.mutable_data_ptr<float>();
  state.beyond = beyond.mutable_data_ptr<int64_t>();
  state.seen = seen.mutable_data_ptr<int64_t>();
  state.observed_step = observed_step.mutable_data_ptr<int64_t>();
  state.numel = numel;
  state.alpha = alpha;
  state.stride = static_cast<float>(stride);
  state.smallest = static_cast<float>(smallest);
  state.always = always;
  advance_interval(state, device.stream());
}

}  // namespace fastqat::cuda
