// The kernel loops of fake quantization over one span, for the ops on one tensor and on many.
#pragma once

#include <cmath>

#include "reduce.h"

namespace fastqat::cpu {

// All loops take their channels by reference and copy the fields themselves: a caller would copy them 16 bytes at a
// time, and wait until the stores of four that they were written with are done.

// y[i] = fake_quantize(x[i]). x, y: [n]
template <class Channels>
using ForwardLoop = void (*)(const float* x, float* y, int64_t n, const Channels& channels);

template <class Channels>
ForwardLoop<Channels> forward_loop(const Channels& channels, bool offset_grid);

// dx, and the sums of ds and of the shift by reduce_span. g, x, dx: [n]
template <class Channels>
using BackwardLoop = void (*)(const float* g, const float* x, float* dx, double* const* sums, int64_t n,
                              const Channels& channels);

// What one element adds to the two sums, for reduce_span.
inline __attribute__((always_inline)) std::array<Product, 2> terms_of(const Gradient& d) {
  return {Product{d.g, d.slope}, Product{d.outside, 1.0f}};
}

// Asks for what follows element i of tensors that are not read again for long: with this hint they do not push out of
// the last-level cache what is, such as results whose memory is used again and again.
inline __attribute__((always_inline)) void read_last(const float* g, const float* x, int64_t i) {
  constexpr int64_t kAhead = 96;
  __builtin_prefetch(g + i + kAhead, 0, 0);
  __builtin_prefetch(x + i + kAhead, 0, 0);
}

template <int kTerms, class Channels>
BackwardLoop<Channels> backward_loop(Path path, bool offset_grid, bool rounded_mask);

// Factor of the LSQ gradient for a tensor of this layout.
inline double lsq_factor(const Layout& layout, const Grid& grid) {
  double count = static_cast<double>(std::max<int64_t>(layout.outer * layout.inner, 1));
  return 1.0 / std::sqrt(count * std::max(grid.qmax, 1.0f));
}

// Writes the sums as gradients: divided by the scale where the fast path left it in, times the LSQ factor.
template <int kTerms>
void finish(const std::vector<std::array<double, kTerms>>& sums, const Grid& grid, double factor, float* dscale,
            float* dshift) {
  for (size_t c = 0; c < sums.size(); ++c) {
    Channel ch = grid.channel(c);
    dscale[c] = static_cast<float>(sums[c][0] / grad_scale_divisor(ch) * factor);
    if (kTerms > 1)
      dshift[c] = static_cast<float>((grid.offset_grid() ? 1.0 : -static_cast<double>(ch.scale)) * sums[c][kTerms - 1] *
                                     factor);
  }
}

}  // namespace fastqat::cpu
