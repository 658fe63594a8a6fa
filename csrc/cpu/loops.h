// The kernel loops of fake quantization over one span, for the ops on one tensor and on many.
#pragma once

#include <cmath>

#include "reduce.h"

namespace fastqat::cpu {

// All loops take their channels by reference and copy the fields themselves: a caller would copy them 16 bytes at a
// time, and wait until the stores of four that they were written with are done.

// Of one span: y = fake_quantize(x). bfloat16 goes through no buffer: a loop that reads from memory, computes and
// writes all the time keeps the memory busy, where one thing after the other does not. n <= kBlock, but for float32 to
// float32
template <class Channels>
void forward_span(const Input& x, const Output& y, int64_t offset, int64_t n, const Channels& channels,
                  bool offset_grid);

// The same of piece p.
inline void forward_piece(const Input& x, const Output& y, const Cut& cut, const Grid& grid, int64_t p) {
  const bool in_place = x.dtype == ScalarType::Float && y.dtype == ScalarType::Float;
  spans_of_piece(cut, grid, p, in_place ? kChunk : kBlock, [&](int64_t offset, int64_t n, const auto& channels) {
    forward_span(x, y, offset, n, channels, grid.offset_grid());
  });
}

// dx, and the sums of ds and of the shift by reduce_span. g, x, dx: [n]
template <class Channels, class G = float, class X = float>
using BackwardLoop = void (*)(const G* g, const X* x, X* dx, double* const* sums, int64_t n, const Channels& channels);

// What one element adds to the two sums, for reduce_span.
inline __attribute__((always_inline)) std::array<Product, 2> terms_of(const Gradient& d) {
  return {Product{d.g, d.slope}, Product{d.outside, 1.0f}};
}

// Asks for what follows element i of tensors that are not read again for long: with this hint they do not push out of
// the last-level cache what is, such as results whose memory is used again and again.
template <class G, class X>
inline __attribute__((always_inline)) void read_last(const G* g, const X* x, int64_t i) {
  constexpr int64_t kAhead = 384;  // bytes
  __builtin_prefetch(g + i + kAhead / sizeof(G), 0, 0);
  __builtin_prefetch(x + i + kAhead / sizeof(X), 0, 0);
}

// careful: after the fast path has met a NaN.
template <class Channels>
Path path_of(const Channels& channels, bool careful) {
  return !channels.fast ? Path::divide : careful ? Path::careful : Path::fast;
}

template <int kTerms, class Channels>
BackwardLoop<Channels> backward_loop(Path path, bool offset_grid, bool rounded_mask);

// Of one span, as forward_span: dx, and the sums by reduce_span.
template <int kTerms, class Channels>
void backward_span(const Input& g, const Input& x, const Output& dx, int64_t offset, int64_t n,
                   const Channels& channels, bool careful, bool offset_grid, bool rounded_mask, double* const* sums);

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
