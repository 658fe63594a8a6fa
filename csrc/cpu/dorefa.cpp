// dorefa_fake_quantize: a weight on the levels of one bit-width or two, and the sums of its codes, from one read of it;
// dorefa_fake_quantize_backward.
#include "../dorefa.h"

#include "ops.h"
#include "reduce.h"

namespace fastqat::cpu {
namespace {

// In a loop of its own, which takes less time than what it is part of would take in one loop with it: g++ has 16
// registers. end, one: see tanh()
FASTQAT_CLONES void tanh_loop(const float* x, float* t, int64_t n, float end, float one) {
  for (int64_t i = 0; i < n; ++i) t[i] = fastqat::tanh(x[i], end, one);
}

// t: [n]
void tanh_block(const float* x, float* t, int64_t n) {
  static volatile const float end = kTanhEnd, one = 1.0f;  // or they would be handed on as constants
  tanh_loop(x, t, n, end, one);
}

// What one tensor is quantized with. n: divisor of 2^bits - 1, of one width or two
struct Levels {
  Normalizer by;
  Channel n[2];
};

enum class Sums {
  none,
  quick,    // NaN where there is one in t
  careful,  // a NaN counts as 0
};

// t: tanh(x); y: [widths][n]; sums: of each width those of r and of r^2, by lanes; exact in a block for up to 8 bits.
template <int kWidths, Sums kSums>
FASTQAT_CLONES void levels_loop(const float* t, float* const* y, double* const* sums, int64_t n, Levels levels) {
  constexpr int kTerms = kSums == Sums::none ? 0 : 2 * kWidths;
  float *first = y[0], *second = y[kWidths - 1];
  reduce_span<Sum, kTerms, true>(n, sums, [&](int64_t i) __attribute__((always_inline)) {
    float u = normalized<false>(t[i], levels.by);  // a division takes no longer than the three steps beside it
    std::array<float, 2 * kWidths> terms{};
    for (int k = 0; k < kWidths; ++k) {
      float r = dorefa_level(u, levels.n[k]);
      (k == 0 ? first : second)[i] = dorefa_value(r, levels.n[k]);
      if (kSums == Sums::careful) r = r == r ? r : 0.0f;
      terms[2 * k] = r;
      terms[2 * k + 1] = r * r;
    }
    return terms;
  });
}

// One width that is asked for.
struct Width {
  Result result;
  Output out;
  int64_t row;  // of sums

  Width(const Tensor& y, const Tensor& x, int64_t row_) : result(y, x), out(result.own), row(row_) {}
};

template <int kWidths>
struct Forward {
  Input x;
  const Levels& levels;
  const std::vector<Width>& widths;

  template <Sums kSums>
  void block(int64_t offset, int64_t n, double* const* sums) const {
    float buffer_x[kBlock], t[kBlock], buffers_y[kWidths][kBlock];
    float* y[kWidths];
    for (int k = 0; k < kWidths; ++k) y[k] = widths[k].out.block(offset, buffers_y[k]);
    tanh_block(x.block(offset, n, buffer_x), t, n);
    levels_loop<kWidths, kSums>(t, y, sums, n, levels);
    for (int k = 0; k < kWidths; ++k) widths[k].out.commit(offset, n, y[k]);
  }

  void run(int64_t numel) const {
    const Cut cut({1, 1, numel});
    parallel(cut, [&](int64_t p) {
      blocks_of_piece(cut, p, kBlock, [&](int64_t offset, int64_t n) { block<Sums::none>(offset, n, nullptr); });
    });
  }

  // sums: [2, 2]
  void run(int64_t numel, int64_t* sums) const {
    const auto totals = reduce_channels<Sum, 2 * kWidths>(
        {1, 1, numel}, Grid::none(), [&](int64_t offset, int64_t n, auto, bool careful, double* const* reduced) {
          careful ? block<Sums::careful>(offset, n, reduced) : block<Sums::quick>(offset, n, reduced);
        });
    for (int k = 0; k < 2 * kWidths; ++k) sums[2 * widths[k / 2].row + k % 2] = static_cast<int64_t>(totals[0][k]);
  }
};

template <int kWidths>
void forward(const Tensor& x, const Levels& levels, const std::vector<Width>& widths, const Tensor& sums) {
  const Forward<kWidths> work{Input(x), levels, widths};
  sums.numel() ? work.run(x.numel(), sums.mutable_data_ptr<int64_t>()) : work.run(x.numel());
}

}  // namespace

void dorefa_fake_quantize(Tensor x, Tensor low, Tensor high, Tensor qmax, Tensor sums, Tensor first, Tensor second) {
  x = dense(x);
  const int32_t* n = qmax.const_data_ptr<int32_t>();
  Levels levels{make_normalizer(low.const_data_ptr<float>()[0], high.const_data_ptr<float>()[0]), {}};
  std::vector<Width> widths;
  for (int64_t k = 0; k < 2; ++k) {
    const Tensor& y = k == 0 ? first : second;
    if (y.numel() == 0) continue;
    levels.n[widths.size()] = divisor(static_cast<float>(n[k]));
    widths.emplace_back(y, x, k);
  }
  if (widths.empty()) return;
  (widths.size() == 1 ? forward<1> : forward<2>)(x, levels, widths, sums);
  for (Width& width : widths) width.result.deliver();
}

namespace {

constexpr int64_t kBlocks = kChunk / kBlock;
constexpr int64_t kAhead = 128;  // elements of g to ask for at a time, while tanh leaves the memory idle

// Of a piece of work: sum of g t, and the elements with |x| = m in each of its blocks.
struct Partial {
  double sum = 0.0;
  std::array<int32_t, kBlocks> ties{};
};

// t: tanh(x); sums: of g t, [kLanes], added to. Returns the number of elements with |x| = m; share: what they take off
// their g, where it is known.
template <bool kShare>
FASTQAT_CLONES int32_t gradient_loop(const float* g, const float* x, const float* t, float* dx, double* sums, int64_t n,
                                     Normalizer by, float factor, float share) {
  double total[kLanes];
  int32_t ties[kLanes] = {};
  std::copy_n(sums, kLanes, total);
  auto element = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
    bool finite = is_finite(x[i]), tied = __builtin_fabsf(x[i]) == by.m;
    float incoming = finite ? g[i] : 0.0f, at = finite ? t[i] : 0.0f;
    float through = kShare && tied ? through_largest(x[i], share) : 0.0f;
    dx[i] = dorefa_dx<false>(incoming, at, through, factor, by);
    total[lane] += static_cast<double>(incoming * at);
    ties[lane] += tied;
  };
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
#pragma GCC ivdep
    for (int64_t lane = 0; lane < kLanes; ++lane) element(i + lane, lane);
  for (int64_t i = whole; i < n; ++i) element(i, i - whole);
  std::copy_n(total, kLanes, sums);
  int32_t count = 0;
  for (int32_t lane : ties) count += lane;
  return count;
}

struct Backward {
  Input g, x;
  Output dx;
  Normalizer by;
  float factor;

  template <bool kShare>
  int32_t block(int64_t offset, int64_t n, float share, double* sums) const {
    float buffer_g[kBlock], buffer_x[kBlock], t[kBlock], buffer_dx[kBlock];
    const float* from = x.block(offset, n, buffer_x);
    float* to = dx.block(offset, buffer_dx);
    for (int64_t at = 0; at < n; at += kAhead) {
      const int64_t count = std::min(kAhead, n - at);
      g.prefetch(offset + at, count);
      tanh_block(from + at, t + at, count);
    }
    int32_t ties = gradient_loop<kShare>(g.block(offset, n, buffer_g), from, t, to, sums, n, by, factor, share);
    dx.commit(offset, n, to);
    return ties;
  }

  // All elements as if none were the largest.
  Partial piece(const Cut& cut, int64_t p) const {
    Partial partial;
    double sums[kLanes] = {};
    int32_t* ties = partial.ties.data();
    blocks_of_piece(cut, p, kBlock, [&](int64_t offset, int64_t n) { *ties++ = block<false>(offset, n, 0.0f, sums); });
    for (double lane : sums) partial.sum += lane;
    return partial;
  }

  // Once more the blocks that have some.
  void mend(const Cut& cut, int64_t p, const Partial& partial, float share) const {
    double unused[kLanes] = {};
    const int32_t* ties = partial.ties.data();
    blocks_of_piece(cut, p, kBlock, [&](int64_t offset, int64_t n) {
      if (*ties++) block<true>(offset, n, share, unused);
    });
  }
};

void fill_with_zeros(const Output& out, const Cut& cut) {
  parallel(cut, [&](int64_t p) {
    blocks_of_piece(cut, p, kBlock, [&](int64_t offset, int64_t n) {
      float buffer[kBlock];
      float* to = out.block(offset, buffer);
      std::fill_n(to, n, 0.0f);
      out.commit(offset, n, to);
    });
  });
}

}  // namespace

void dorefa_fake_quantize_backward(Tensor g, Tensor x, Tensor low, Tensor high, Tensor factor, Tensor dx) {
  x = dense(x);
  g = with_strides_of(x, g);
  Result result(dx, x);
  const Backward backward{Input(g), Input(x), Output(result.own),
                          make_normalizer(low.const_data_ptr<float>()[0], high.const_data_ptr<float>()[0]),
                          factor.numel() ? factor.const_data_ptr<float>()[0] : 1.0f};
  const Cut cut({1, 1, x.numel()});
  if (backward.by.m == 0.0f) {
    fill_with_zeros(backward.dx, cut);
    return result.deliver();
  }
  std::vector<Partial> partial(x.numel() ? cut.pieces : 0);
  parallel(cut, [&](int64_t p) { partial[p] = backward.piece(cut, p); });
  double sum = 0.0;
  int64_t ties = 0;
  for (const Partial& part : partial) {
    sum += part.sum;
    for (int32_t count : part.ties) ties += count;
  }
  sum /= static_cast<double>(backward.by.largest.scale);  // of g u now
  const float share = static_cast<float>(sum / static_cast<double>(std::max<int64_t>(ties, 1)));
  parallel(cut, [&](int64_t p) { backward.mend(cut, p, partial[p], share); });
  result.deliver();
}

}  // namespace fastqat::cpu
