// Reductions over the elements of each channel in an order that depends on the tensor alone.
//
// A kernel loop merges terms lane by lane in float32 over one block; blocks are merged in float64, in memory order. So
// the bits of the result are the same for any number of threads and any instruction set.
#pragma once

#include <array>
#include <limits>

#include "spans.h"

namespace fastqat::cpu {

constexpr int kLanes = 16;

// A term that is added without being rounded first: one instruction, where a product and a sum are two.
struct Product {
  float a, b;
  inline __attribute__((always_inline)) operator float() const { return a * b; }
};

struct Sum {
  static constexpr float kIdentity = 0.0f;
  static inline __attribute__((always_inline)) float merge(float sum, Product term) {
    return __builtin_fmaf(term.a, term.b, sum);
  }
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

// Reduces the first kTerms of the array terms_of(i), for n elements, to reduced[q]: of a row one number per lane, each
// of a kLanes-th of the elements; of columns, the term of each. For use in a kernel loop: terms_of may store results.
template <class Op, int kTerms, bool kRow, class Number, class TermsOf>
inline __attribute__((always_inline)) void reduce_span(int64_t n, Number* const* reduced, const TermsOf& terms_of) {
  if (!kRow) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      auto terms = terms_of(i);
      for (int q = 0; q < kTerms; ++q) reduced[q][i] = terms[q];
    }
    return;
  }
  Number blocks[std::max(kTerms, 1)][kLanes];
  for (int q = 0; q < kTerms; ++q) std::fill_n(blocks[q], kLanes, static_cast<Number>(Op::kIdentity));
  for (int64_t start = 0; start < n; start += kBlock) {
    float lanes[std::max(kTerms, 1)][kLanes];
    for (int q = 0; q < kTerms; ++q) std::fill_n(lanes[q], kLanes, Op::kIdentity);
    auto merge = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
      auto terms = terms_of(i);
      for (int q = 0; q < kTerms; ++q) lanes[q][lane] = Op::merge(lanes[q][lane], terms[q]);
    };
    const int64_t stop = std::min(start + kBlock, n), whole = stop - (stop - start) % kLanes;
    for (int64_t i = start; i < whole; i += kLanes)
#pragma GCC ivdep
      for (int64_t lane = 0; lane < kLanes; ++lane) merge(i + lane, lane);
    for (int64_t i = whole; i < stop; ++i) merge(i, i - whole);
    for (int q = 0; q < kTerms; ++q)
      for (int lane = 0; lane < kLanes; ++lane)
        blocks[q][lane] = Op::merge(blocks[q][lane], static_cast<Number>(lanes[q][lane]));
  }
  for (int q = 0; q < kTerms; ++q) std::copy_n(blocks[q], kLanes, reduced[q]);
}

inline bool all_numbers(const double* lanes) {
  bool numbers = true;
  for (int lane = 0; lane < kLanes; ++lane) numbers = numbers & (lanes[lane] == lanes[lane]);
  return numbers;
}

// into[i] = merge(into[i], from[i]) for i in [0, n).
template <class Op>
FASTQAT_CLONES void merge_into(const double* from, double* into, int64_t n) {
  for (int64_t i = 0; i < n; ++i) into[i] = Op::merge(into[i], from[i]);
}

// kTerms quantities per channel of one tensor, reduced piece by piece; f(offset, n, channels, careful, reduced) calls
// reduce_span for one span. In rows careful is false first, and true in a second call where a lane is NaN: a quick f
// may give NaN for what it cannot do.
template <class Op, int kTerms>
class Reduction {
 public:
  using Terms = std::array<double, kTerms>;

  // longest: elements of a span, a multiple of kBlock that divides kChunk. It changes no result.
  explicit Reduction(const Layout& layout, int64_t longest = kBlock)
      : channels_(layout.channels),
        cut_(layout),
        longest_(longest),
        width_(cut_.by_rows ? 1 : std::min(kBlock, cut_.length)) {
    identity_.fill(Op::kIdentity);
    partial_.assign(cut_.layout.numel() ? cut_.pieces * width_ : 0, identity_);
  }

  const Cut& cut() const { return cut_; }

  // Any thread may do any piece.
  template <class F>
  void piece(const Grid& grid, int64_t p, const F& f) {
    double buffer[kTerms][kBlock], merged[kTerms][kBlock];  // a number per lane of a row, or per column
    double* reduced[kTerms];
    int64_t count = cut_.by_rows ? kLanes : width_;
    for (int q = 0; q < kTerms; ++q) {
      reduced[q] = buffer[q];
      std::fill_n(merged[q], count, static_cast<double>(Op::kIdentity));
    }
    spans_of_piece(cut_, grid, p, longest_, [&](int64_t offset, int64_t n, auto channels) {
      f(offset, n, channels, !cut_.by_rows, reduced);
      bool numbers = true;
      for (int q = 0; q < kTerms && cut_.by_rows; ++q) numbers = all_numbers(reduced[q]) && numbers;
      if (!numbers) f(offset, n, channels, true, reduced);
      for (int q = 0; q < kTerms; ++q) merge_into<Op>(reduced[q], merged[q], cut_.by_rows ? kLanes : n);
    });
    for (int q = 0; q < kTerms; ++q) {
      if (cut_.by_rows)  // the lanes in pairs: a chain of additions would take longer than a short row itself
        for (int64_t half = kLanes / 2; half > 0; half /= 2)
          for (int64_t i = 0; i < half; ++i) merged[q][i] = Op::merge(merged[q][i], merged[q][i + half]);
      for (int64_t i = 0; i < width_; ++i) {
        double& result = partial_[p * width_ + i][q];
        result = Op::merge(result, merged[q][i]);
      }
    }
  }

  // After all pieces. Result: float64 [channels][kTerms].
  std::vector<Terms> total() const {
    std::vector<Terms> total(channels_, identity_);
    if (partial_.empty()) return total;
    auto merge = [&](int64_t channel, const Terms& part) {
      for (int q = 0; q < kTerms; ++q) total[channel][q] = Op::merge(total[channel][q], part[q]);
    };
    if (cut_.by_rows) {  // without divisions: rows may be short and many
      const Terms* part = partial_.data();
      for (int64_t o = 0; o < cut_.layout.outer; ++o)
        for (int64_t c = 0; c < cut_.layout.channels; ++c)
          for (int64_t k = 0; k < cut_.per_row; ++k) merge(c, *part++);
      return total;
    }
    for (int64_t p = 0; p < cut_.pieces; ++p) {
      int64_t start = p % cut_.per_row * cut_.step(), count = std::min(width_, cut_.length - start);
      for (int64_t i = 0; i < count; ++i) merge((start + i) / cut_.layout.inner, partial_[p * width_ + i]);
    }
    return total;
  }

 private:
  int64_t channels_;
  Cut cut_;
  int64_t longest_;
  int64_t width_;  // results of a piece
  Terms identity_;
  std::vector<Terms> partial_;
};

// The reduction of one tensor, all pieces of it.
template <class Op, int kTerms, class F>
std::vector<std::array<double, kTerms>> reduce_channels(const Layout& layout, const Grid& grid, const F& f,
                                                        int64_t longest = kBlock) {
  Reduction<Op, kTerms> reduction(layout, longest);
  parallel(reduction.cut(), [&](int64_t p) { reduction.piece(grid, p, f); });
  return reduction.total();
}

}  // namespace fastqat::cpu
