// minmax: smallest and largest finite value of each channel in one pass.
#include "ops.h"
#include "reduce.h"

namespace fastqat::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Both extremes as maxima: of -x and of x. negated, plain: [n]
FASTQAT_CLONES void loop(const float* x, float* __restrict negated, float* __restrict plain, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    bool finite = __builtin_fabsf(x[i]) < kInfinity;
    negated[i] = finite ? -x[i] : -kInfinity;
    plain[i] = finite ? x[i] : -kInfinity;
  }
}

}  // namespace

void minmax_out(Tensor x, std::optional<int64_t> axis, Tensor low, Tensor high) {
  x = dense(x);
  Input in(x);
  Layout layout = layout_of(x, axis);
  auto extremes =
      reduce_channels<Max, 2>(layout, Grid::none(), [&](int64_t offset, int64_t n, auto, bool, auto& terms) {
        float buffer[kBlock];
        loop(in.block(offset, n, buffer), terms[0], terms[1], n);
      });
  for (size_t c = 0; c < extremes.size(); ++c) {
    low.mutable_data_ptr<float>()[c] = static_cast<float>(-extremes[c][0]);
    high.mutable_data_ptr<float>()[c] = static_cast<float>(extremes[c][1]);
  }
}

Tensors2 minmax(Tensor x, std::optional<int64_t> axis) {
  int64_t channels = axis ? x.size(*axis) : 1;
  Tensor low = empty({channels}, ScalarType::Float), high = empty({channels}, ScalarType::Float);
  minmax_out(x, axis, low, high);
  return {low, high};
}

}  // namespace fastqat::cpu
