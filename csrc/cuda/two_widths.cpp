// Ops on a weight that is wanted at two bit-widths.
#include "glue.h"

namespace fastqat::cuda {
namespace {

// x as a kernel takes it, and two results of it, the second perhaps not asked for. Those of two dtypes are computed as
// float32, and rounded once.
class Pair {
 public:
  Pair(const Tensor& x, const Tensor& first, const Tensor& second)
      : has_second_(second.numel()),
        dtype_(!has_second_ || first.scalar_type() == second.scalar_type() ? first.scalar_type() : ScalarType::Float),
        x_(of_dtype(dense(x), computed_dtype(x, dtype_))),
        first_(first, x_, dtype_) {
    if (has_second_) second_.emplace(second, x_, dtype_);
  }

  template <class Entry>
  void describe(Entry& entry, std::optional<int64_t> axis) const {
    entry.x = x_.data_ptr();
    entry.first = first_.own.data_ptr();
    entry.second = second_ ? second_->own.data_ptr() : nullptr;
    entry.x_dtype = dtype_of(x_);
    entry.y_dtype = dtype_of(first_.own);
    const bool aligned = is_aligned(x_) && is_aligned(first_.own) && (!second_ || is_aligned(second_->own));
    entry.cut = make_cut(layout_of(x_, axis), vector_of(entry.x_dtype, entry.y_dtype), aligned);
  }

  void deliver() {
    first_.deliver();
    if (second_) second_->deliver();
  }

 private:
  bool has_second_;
  ScalarType dtype_;
  Tensor x_;
  Result first_;
  std::optional<Result> second_;
};

// The two rows of a parameter of the grids, [2, channels]; null where there is none.
struct Rows {
  FloatVector both;
  int64_t channels = 0;

  explicit Rows(const OptionalTensor& t) : both(t), channels(t ? t->size(1) : 0) {}
  const float* row(int64_t k) const { return both.data ? both.data + k * channels : nullptr; }
};

}  // namespace

void fake_quantize_two_widths(Tensor x, Tensor scales, OptionalTensor zero_points, OptionalTensor offsets,
                              Tensor qranges, std::optional<int64_t> axis, double eps, Tensor first, Tensor second) {
  if (!x.numel()) return;
  Device device(x);
  const Rows scale{OptionalTensor(scales)}, zero_point(zero_points), offset(offsets);
  qranges = torch::stable::contiguous(qranges);
  Pair pair(x, first, second);
  TwoWidths entry{};
  pair.describe(entry, axis);
  for (int64_t k = 0; k < 2; ++k)
    entry.grids[k] = {scale.row(k), zero_point.row(k), offset.row(k), qranges.const_data_ptr<int32_t>() + 2 * k,
                      static_cast<float>(eps)};
  fake_quantize_two_widths(entry, device.stream());
  pair.deliver();
}

void dorefa_fake_quantize(Tensor x, Tensor low, Tensor high, Tensor qmax, Tensor sums, Tensor first, Tensor second) {
  if (!x.numel()) return;
  Device device(x);
  Pair pair(x, first, second);
  Dorefa entry{};
  pair.describe(entry, std::nullopt);
  entry.low = low.const_data_ptr<float>();
  entry.high = high.const_data_ptr<float>();
  entry.qmax = qmax.const_data_ptr<int32_t>();
  if (sums.numel()) {
    entry.sums = reinterpret_cast<unsigned long long*>(sums.mutable_data_ptr<int64_t>());
    const int64_t widths = entry.second ? 2 : 1;
    clear(entry.sums, widths * 2 * static_cast<int64_t>(sizeof(int64_t)), device.stream());
  }
  dorefa_fake_quantize(entry, device.stream());
  pair.deliver();
}

void dorefa_fake_quantize_backward(Tensor g, Tensor x, Tensor low, Tensor high, Tensor factor, Tensor dx) {
  if (!x.numel()) return;
  Device device(x);
  const Tensor own = of_dtype(dense(x), computed_dtype(x, g.scalar_type())), incoming = with_strides_of(own, g);
  Result result(dx, own, own.scalar_type());
  DorefaBackward entry{};
  entry.g = incoming.data_ptr();
  entry.x = own.data_ptr();
  entry.dx = result.own.data_ptr();
  entry.low = low.const_data_ptr<float>();
  entry.high = high.const_data_ptr<float>();
  entry.factor = factor.numel() ? factor.const_data_ptr<float>() : nullptr;
  entry.x_dtype = dtype_of(own);
  entry.g_dtype = dtype_of(incoming);
  entry.cut = make_cut(layout_of(own, std::nullopt), vector_of(entry.x_dtype, entry.g_dtype),
                       is_aligned(own) && is_aligned(incoming) && is_aligned(result.own));
  const Tensor parts = empty({entry.cut.pieces() * static_cast<int64_t>(sizeof(DorefaPart))}, ScalarType::Byte, x);
  entry.parts = static_cast<DorefaPart*>(parts.data_ptr());
  dorefa_fake_quantize_backward(entry, device.stream());
  result.deliver();
}

}  // namespace fastqat::cuda
