// Reductions over the elements of each channel in an order that depends on the tensor alone.
//
// A kernel loop merges terms lane by lane in float32 over one block, and then its lanes in float64; blocks are merged
// in memory order. So the bits of the result are the same for any number of threads and any instruction set.
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

struct Nothing {
  inline __attribute__((always_inline)) void operator()(int64_t) const {}
};

// Reduces the first kTerms of the array terms_of(i), for i in [start, stop), to a number per lane, each of a kLanes-th
// of the elements. For use in a kernel loop: terms_of may store results; before(i) is called before kLanes elements
// from i on. lanes: [kTerms][kLanes]
template <class Op, int kTerms, class TermsOf, class Before = Nothing>
inline __attribute__((always_inline)) void reduce_lanes(int64_t start, int64_t stop, float (*lanes)[kLanes],
                                                        const TermsOf& terms_of, const Before& before = {}) {
  const int64_t whole = stop - (stop - start) % kLanes;
  float rest[std::max(kTerms, 1)][kLanes];  // apart: what is written at any index is not kept in registers
  for (int q = 0; q < kTerms; ++q) std::fill_n(lanes[q], kLanes, Op::kIdentity);
  for (int q = 0; q < kTerms; ++q) std::fill_n(rest[q], kLanes, Op::kIdentity);
  auto merge = [&](int64_t i, float (*into)[kLanes], int64_t lane) __attribute__((always_inline)) {
    auto terms = terms_of(i);
    for (int q = 0; q < kTerms; ++q) into[q][lane] = Op::merge(into[q][lane], terms[q]);
  };
  for (int64_t i = start; i < whole; i += kLanes) {
    before(i);
#pragma GCC ivdep
    for (int64_t lane = 0; lane < kLanes; ++lane) merge(i + lane, lanes, lane);
  }
  for (int64_t i = whole; i < stop; ++i) merge(i, rest, i - whole);
  for (int q = 0; q < kTerms; ++q)
    for (int lane = 0; lane < kLanes; ++lane) lanes[q][lane] = Op::merge(lanes[q][lane], rest[q][lane]);
}

// Merges numbers in pairs: a chain takes longer than a short row itself. As vectors, since g++ takes arrays apart here.
template <class Op, int kCount>
inline __attribute__((always_inline)) double fold(const double* numbers) {
  if constexpr (kCount == 1) {
    return numbers[0];
  } else {
    typedef double Half __attribute__((vector_size(kCount / 2 * sizeof(double))));  // an alias would be a plain double
    static_assert(sizeof(Half) == kCount / 2 * sizeof(double));
    Half halves[2];
    std::memcpy(halves, numbers, sizeof halves);
    double folded[kCount / 2];
    Half merged = Op::merge(halves[0], halves[1]);
    std::memcpy(folded, &merged, sizeof merged);
    return fold<Op, kCount / 2>(folded);
  }
}

// The same to float64: of a row one number; of columns, the term of each. reduced: [kTerms][1 or n]
template <class Op, int kTerms, bool kRow, class TermsOf, class Before = Nothing>
inline __attribute__((always_inline)) void reduce_span(int64_t n, double* const* reduced, const TermsOf& terms_of,
                                                       const Before& before = {}) {
  if (!kRow) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      auto terms = terms_of(i);
      for (int q = 0; q < kTerms; ++q) reduced[q][i] = terms[q];
    }
    return;
  }
  double total[std::max(kTerms, 1)];
  std::fill_n(total, kTerms, static_cast<double>(Op::kIdentity));
  for (int64_t start = 0; start < n; start += kBlock) {
    float lanes[std::max(kTerms, 1)][kLanes];
    reduce_lanes<Op, kTerms>(start, std::min(start + kBlock, n), lanes, terms_of, before);
    for (int q = 0; q < kTerms; ++q) {
      double wide[kLanes];
      std::copy_n(lanes[q], kLanes, wide);
      total[q] = Op::merge(total[q], fold<Op, kLanes>(wide));
    }
  }
  for (int q = 0; q < kTerms; ++q) reduced[q][0] = total[q];
}

// into[i] = merge(into[i], from[i]) for i in [0, n).
template <class Op>
FASTQAT_CLONES void merge_into(const double* from, double* into, int64_t n) {
  for (int64_t i = 0; i < n; ++i) into[i] = Op::merge(into[i], from[i]);
}

// kTerms quantities per channel of one tensor, reduced piece by piece; f(offset, n, channels, careful, reduced) calls
// reduce_span for one span. In rows careful is false first, and true in a second call where the result is NaN: a quick
// f may give NaN for what it cannot do.
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
    double buffer[kTerms][kBlock], merged[kTerms][kBlock];  // one number of a row, or one per column
    double* reduced[kTerms];
    for (int q = 0; q < kTerms; ++q) {
      reduced[q] = buffer[q];
      std::fill_n(merged[q], width_, static_cast<double>(Op::kIdentity));
    }
    spans_of_piece(cut_, grid, p, longest_, [&](int64_t offset, int64_t n, const auto& channels) {
      f(offset, n, channels, !cut_.by_rows, reduced);
      if (!cut_.by_rows) {
        for (int q = 0; q < kTerms; ++q) merge_into<Op>(reduced[q], merged[q], n);
        return;
      }
      bool numbers = true;
      for (int q = 0; q < kTerms; ++q) numbers = numbers && reduced[q][0] == reduced[q][0];
      if (!numbers) f(offset, n, channels, true, reduced);
      for (int q = 0; q < kTerms; ++q) merged[q][0] = Op::merge(merged[q][0], reduced[q][0]);
    });
    for (int64_t i = 0; i < width_; ++i)
      for (int q = 0; q < kTerms; ++q) partial_[p * width_ + i][q] = merged[q][i];
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
