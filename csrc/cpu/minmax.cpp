// minmax: smallest and largest finite value of each channel in one pass.
#include "ops.h"
#include "reduce.h"

namespace fastqat::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Both extremes as maxima: of -x and of x.
template <class Channels>
FASTQAT_CLONES void loop(const float* x, double* const* maxima, int64_t n) {
  reduce_span<Max, 2, Channels::kRow>(n, maxima, [&](int64_t i) __attribute__((always_inline)) {
    bool finite = __builtin_fabsf(x[i]) < kInfinity;
    return std::array<float, 2>{finite ? -x[i] : -kInfinity, finite ? x[i] : -kInfinity};
  });
}

}  // namespace

void minmax_out(Tensor x, std::optional<int64_t> axis, Tensor low, Tensor high) {
  x = dense(x);
  Input in(x);
  Layout layout = layout_of(x, axis);
  auto extremes =
      reduce_channels<Max, 2>(layout, Grid::none(), [&](int64_t offset, int64_t n, auto channels, bool, auto reduced) {
        float buffer[kBlock];
        loop<decltype(channels)>(in.block(offset, n, buffer), reduced, n);
      });
  for (size_t c = 0; c < extremes.size(); ++c) {
    low.mutable_data_ptr<float>()[c] = static_cast<float>(-extremes[c][0]);
    high.mutable_data_ptr<float>()[c] = static_cast<float>(extremes[c][1]);
  }
}

}  // namespace fastqat::cpu
