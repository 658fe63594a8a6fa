// Reductions over the elements of each channel in an order that depends on the tensor alone.
//
// A span writes its terms into buffers; they are reduced lane by lane in float32 for a few additions, then in float64:
// the bits of the result are the same for any number of threads and any instruction set.
#pragma once

#include <array>
#include <limits>

#include "spans.h"

namespace fastqat::cpu {

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

struct Sum {
  static constexpr float kIdentity = 0.0f;
  template <class T>
  static inline __attribute__((always_inline)) T merge(T a, T b) {
    return a + b;
  }
};

struct Max {
  static constexpr float kIdentity = -std::numeric_limits<float>::infinity();
  template <class T>
  static inline __attribute__((always_inline)) T merge(T a, T b) {
    return a > b ? a : b;
  }
};

// Reduces terms [kBlock], of which n are set, to one float32 per lane: kAccumulators vectors of lanes, each of at most
// kBlock / kLanes / kAccumulators additions, then a tree over them. Returns false if a lane is NaN.
constexpr int kAccumulators = 8;
static_assert(kBlock % (kLanes * kAccumulators) == 0);

template <class Op>
FASTQAT_CLONES bool reduce_block(float* terms, int64_t n, float* lanes) {
  constexpr int64_t kStride = kLanes * kAccumulators;
  int64_t padded = (n + kStride - 1) / kStride * kStride;
  for (int64_t i = n; i < padded; ++i) terms[i] = Op::kIdentity;
  Lanes acc[kAccumulators];
  std::memcpy(acc, terms, sizeof(acc));
  for (int64_t i = kStride; i < padded; i += kStride)
    for (int a = 0; a < kAccumulators; ++a) {
      Lanes v;
      std::memcpy(&v, terms + i + a * kLanes, sizeof(v));
      acc[a] = Op::merge(acc[a], v);
    }
  for (int width = kAccumulators / 2; width > 0; width /= 2)
    for (int a = 0; a < width; ++a) acc[a] = Op::merge(acc[a], acc[a + width]);
  bool numbers = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes[lane] = acc[0][lane];
    numbers = numbers & (lanes[lane] == lanes[lane]);
  }
  return numbers;
}

// into[i] = merge(into[i], terms[i]) for i in [0, n).
template <class Op, class T>
FASTQAT_CLONES void merge_columns(const float* terms, T* into, int64_t n) {
  for (int64_t i = 0; i < n; ++i) into[i] = Op::merge(into[i], static_cast<T>(terms[i]));
}

// Reduces kTerms quantities per channel. f(offset, n, channels, careful, terms) fills terms[q][0..n) for one span. In
// rows it is called with careful = false first, and again with true where a sum of the span is NaN: a quick f may give
// NaN for what it cannot do. Result: float64 [channels][kTerms].
template <class Op, int kTerms, class F>
std::vector<std::array<double, kTerms>> reduce_channels(const Layout& layout, const Grid& grid, const F& f) {
  using Terms = std::array<double, kTerms>;
  Terms identity;
  identity.fill(Op::kIdentity);
  Cut cut(layout);
  int64_t width = cut.by_rows ? 1 : std::min(kBlock, cut.length);  // results of a piece
  std::vector<Terms> partial(cut.layout.numel() ? cut.pieces * width : 0, identity);
  parallel(cut, [&](int64_t p) {
    alignas(64) float terms[kTerms][kBlock];
    double merged[kTerms][kBlock];  // one float64 per lane of a row, or per column
    int64_t count = cut.by_rows ? kLanes : width;
    for (int q = 0; q < kTerms; ++q) std::fill_n(merged[q], count, static_cast<double>(Op::kIdentity));
    spans_of_piece(cut, grid, p, kBlock, [&](int64_t offset, int64_t n, auto channels) {
      float lanes[kTerms][kLanes];
      bool numbers = true;
      f(offset, n, channels, !cut.by_rows, terms);
      if (cut.by_rows) {
        for (int q = 0; q < kTerms; ++q) numbers = reduce_block<Op>(terms[q], n, lanes[q]) && numbers;
        if (!numbers) {
          f(offset, n, channels, true, terms);
          for (int q = 0; q < kTerms; ++q) reduce_block<Op>(terms[q], n, lanes[q]);
        }
      }
      for (int q = 0; q < kTerms; ++q)
        merge_columns<Op>(cut.by_rows ? lanes[q] : terms[q], merged[q], cut.by_rows ? kLanes : n);
    });
    for (int q = 0; q < kTerms; ++q)
      for (int64_t i = 0; i < count; ++i) {
        double& result = partial[p * width + (cut.by_rows ? 0 : i)][q];
        result = Op::merge(result, merged[q][i]);
      }
  });

  std::vector<Terms> total(layout.channels, identity);
  for (int64_t p = 0; p < (partial.empty() ? 0 : cut.pieces); ++p) {
    int64_t row = p / cut.per_row, start = p % cut.per_row * cut.step();
    int64_t count = cut.by_rows ? 1 : std::min(width, cut.length - start);
    for (int64_t i = 0; i < count; ++i) {
      Terms& t = total[cut.by_rows ? row % cut.layout.channels : (start + i) / cut.layout.inner];
      for (int q = 0; q < kTerms; ++q) t[q] = Op::merge(t[q], partial[p * width + i][q]);
    }
  }
  return total;
}

}  // namespace fastqat::cpu
