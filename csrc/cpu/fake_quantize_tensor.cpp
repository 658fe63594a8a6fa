// fake_quantize_tensor: all that one read of an activation or a gradient with one scale can give.
//
// Stages, each a loop that the compiler vectorises, pass over a block in the first-level cache one after the other;
// what is not wanted is not done. What training asks for most is one loop: plain_loop(), and round_in_registers().
#include <optional>

#include "bits.h"
#include "noise.h"
#include "ops.h"
#include "reduce.h"
#include "stochastic.h"

namespace fastqat::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The larger one; a NaN in b is passed over.
struct Largest : Max {
  template <class T>
  static inline __attribute__((always_inline)) T merge(T a, T b) {
    return b > a ? b : a;
  }
};

using Extremes = float (*)[kLanes];  // of -x and of x: [2][kLanes], largest of each lane
using PlainLoop = void (*)(const float* x, float* y, float* tested, Extremes extremes, int64_t n, Channel ch);

// What masks look at.
enum class Tested { nothing, rounded, unrounded };

// y, and what masks look at: a byte for each element would cost more in this loop than another loop over `tested` does.
// For fast scales.
template <bool kOffset, Tested kTested>
FASTQAT_CLONES void plain_loop(const float* x, float* y, float* tested, Extremes extremes, int64_t n, Channel ch) {
  reduce_lanes<Largest, 2>(0, n, extremes, [&](int64_t i) __attribute__((always_inline)) {
    float t = shifted<kOffset>(x[i], ch), lev;
    if (kTested == Tested::rounded) {
      tested[i] = round_even(ratio<true>(t, ch));
      lev = clamp(tested[i], ch.low, ch.high);
    } else if (kTested == Tested::unrounded) {
      tested[i] = t / ch.scale;
      lev = clamp(round_even(tested[i]), ch.low, ch.high);
    } else {
      lev = level<true>(t, ch);
    }
    y[i] = value<kOffset>(lev, ch);
    return std::array<float, 2>{-x[i], x[i]};
  });
}

// Of the finite elements.
FASTQAT_CLONES void extremes_loop(const float* x, Extremes extremes, int64_t n) {
  reduce_lanes<Largest, 2>(0, n, extremes, [&](int64_t i) __attribute__((always_inline)) {
    bool counts = __builtin_fabsf(x[i]) < kInfinity;
    return std::array<float, 2>{counts ? -x[i] : -kInfinity, counts ? x[i] : -kInfinity};
  });
}

FASTQAT_CLONES void clip_loop(const float* x, float* to, int64_t n, float clip) {
  for (int64_t i = 0; i < n; ++i) to[i] = clipped(x[i], clip);
}

FASTQAT_CLONES int32_t count_loop(const float* x, int64_t n, float limit) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += __builtin_fabsf(x[i]) > limit;
  return count;
}

template <bool kOffset>
FASTQAT_CLONES void ratio_loop(const float* x, float* r, int64_t n, Channel ch) {
  for (int64_t i = 0; i < n; ++i) r[i] = shifted<kOffset>(x[i], ch) / ch.scale;
}

// Rounded to nearest; a fast one is saturated beyond the range.
template <bool kFast, bool kOffset>
FASTQAT_CLONES void round_loop(const float* x, float* rounded, int64_t n, Channel ch) {
  for (int64_t i = 0; i < n; ++i) rounded[i] = round_even(ratio<kFast>(shifted<kOffset>(x[i], ch), ch));
}

// Rounded at random. u: [n], in [0, 1); rounded may be u
template <bool kOffset>
FASTQAT_CLONES void draw_loop(const float* x, const float* u, float* rounded, int64_t n, Channel ch) {
  for (int64_t i = 0; i < n; ++i) rounded[i] = __builtin_floorf(shifted<kOffset>(x[i], ch) / ch.scale + u[i]);
}

// The value of what is rounded at random, where nothing else is asked of it.
template <bool kOffset>
FASTQAT_CLONES void draw_value_loop(const float* x, const float* u, float* y, int64_t n, Channel ch) {
  for (int64_t i = 0; i < n; ++i) {
    float rounded = __builtin_floorf(shifted<kOffset>(x[i], ch) / ch.scale + u[i]);
    y[i] = value<kOffset>(clamp(rounded, ch.low, ch.high), ch);
  }
}

template <bool kOffset>
FASTQAT_CLONES void value_loop(const float* rounded, float* y, int64_t n, Channel ch) {
  for (int64_t i = 0; i < n; ++i) y[i] = value<kOffset>(clamp(rounded[i], ch.low, ch.high), ch);
}

// The low bits of the codes; zero: the zero point, which is the code of NaN.
FASTQAT_CLONES void code_loop(const float* rounded, uint8_t* codes, int64_t n, float low, float high, float zero) {
  for (int64_t i = 0; i < n; ++i) {
    float lev = clamp(rounded[i] == rounded[i] ? rounded[i] : 0.0f, low, high);
    codes[i] = static_cast<uint8_t>(static_cast<int32_t>(lev + zero));
  }
}

FASTQAT_CLONES void inside_loop(const float* tested, uint8_t* inside, int64_t n, float low, float high) {
  for (int64_t i = 0; i < n; ++i) inside[i] = (tested[i] >= low) & (tested[i] <= high);
}

FASTQAT_CLONES void above_loop(const float* tested, uint8_t* above, int64_t n, float high) {
  for (int64_t i = 0; i < n; ++i) above[i] = tested[i] > high;
}

FASTQAT_CLONES void passes_loop(const float* x, uint8_t* inside, int64_t n, float clip) {
  for (int64_t i = 0; i < n; ++i) inside[i] = inside[i] & passes_clip(x[i], clip);
}

// What a piece has seen.
struct Seen {
  float largest[2][kLanes];  // of -x and of x
  int64_t beyond = 0;

  Seen() { std::fill_n(largest[0], 2 * kLanes, -kInfinity); }

  void add(const float (&extremes)[2][kLanes]) {
    for (int q = 0; q < 2; ++q)
      for (int lane = 0; lane < kLanes; ++lane) largest[q][lane] = Largest::merge(largest[q][lane], extremes[q][lane]);
  }

  float of(int q) const {
    float result = -kInfinity;
    for (float lane : largest[q]) result = Largest::merge(result, lane);
    return result;
  }
};

// The results that are asked for; null is not.
struct Wanted {
  float *low, *high;
  int64_t* beyond;
  uint8_t *inside, *above, *codes;
  bool y;
  int code_bits;
};

class Forward {
 public:
  Forward(const Tensor& x, const Tensor& y, const Grid& grid, std::optional<Uniforms> noise, float clip,
          bool rounded_mask, float limit, const Wanted& wanted)
      : in_(x),
        out_(y),
        ch_(grid.channel(0)),
        noise_(noise),
        clip_(clip),
        limit_(limit),
        wanted_(wanted),
        offset_grid_(grid.offset_grid()),
        fast_(is_fast_scale(ch_.scale)) {
    const bool needs_rounded = wanted.y || wanted.codes || (rounded_mask && (wanted.inside || wanted.above));
    tested_ = !wanted.inside && !wanted.above ? Tested::nothing : rounded_mask ? Tested::rounded : Tested::unrounded;
    plain_ = wanted.y && fast_ && clip == 0.0f && !noise && !wanted.codes;
    only_drawn_ = wanted.y && noise && !wanted.inside && !wanted.above && !wanted.codes;
    in_registers_ = only_drawn_ && !offset_grid_ && can_round_in_registers();
    rounds_ = needs_rounded && !plain_ && !only_drawn_;
  }

  // Without buffers a piece is one block.
  int64_t longest_block() const {
    const bool in_place = in_.dtype == ScalarType::Float && out_.dtype == ScalarType::Float;
    const bool one_loop = in_registers_ ? clip_ == 0.0f : plain_ && tested_ == Tested::nothing && !wanted_.beyond;
    return in_place && one_loop ? kChunk : kBlock;
  }

  // n <= longest_block()
  void block(int64_t offset, int64_t n, Seen& seen) const {
    float buffer_x[kBlock], clipped_x[kBlock];
    const float* original = in_.block(offset, n, buffer_x);
    const float* x = original;
    if (clip_ != 0.0f) {
      clip_loop(original, clipped_x, n, clip_);
      x = clipped_x;
    }
    if (in_registers_) return draw_in_registers(x, offset, n, seen);
    if (wanted_.beyond) seen.beyond += count_loop(x, n, limit_);
    if (plain_) return plain(x, offset, n, seen);
    if (wanted_.low) {
      float extremes[2][kLanes];
      extremes_loop(x, extremes, n);
      seen.add(extremes);
    }
    if (only_drawn_) return draw_values(x, offset, n);
    float rounded[kBlock], unrounded[kBlock];
    if (rounds_) round(x, rounded, offset, n);
    if (tested_ == Tested::unrounded) (offset_grid_ ? ratio_loop<true> : ratio_loop<false>)(x, unrounded, n, ch_);
    masks(original, tested_ == Tested::rounded ? rounded : unrounded, offset, n);
    results(rounded, offset, n);
  }

 private:
  void plain(const float* x, int64_t offset, int64_t n, Seen& seen) const {
    float buffer[kBlock], tested[kBlock], extremes[2][kLanes];
    float* y = out_.block(offset, buffer);
    const auto loop = tested_ == Tested::nothing   ? plain_loop_for<Tested::nothing>()
                      : tested_ == Tested::rounded ? plain_loop_for<Tested::rounded>()
                                                   : plain_loop_for<Tested::unrounded>();
    loop(x, y, tested, extremes, n, ch_);
    out_.commit(offset, n, y);
    masks(x, tested, offset, n);
    if (!wanted_.low) return;
    float highest = -kInfinity;
    for (int q = 0; q < 2; ++q)
      for (float lane : extremes[q]) highest = Largest::merge(highest, lane);
    if (highest == kInfinity) extremes_loop(x, extremes, n);
    seen.add(extremes);
  }

  template <Tested kTested>
  PlainLoop plain_loop_for() const {
    return offset_grid_ ? plain_loop<true, kTested> : plain_loop<false, kTested>;
  }

  void draw_in_registers(const float* x, int64_t offset, int64_t n, Seen& seen) const {
    float buffer[kBlock];
    float* y = out_.block(offset, buffer);
    seen.beyond += round_in_registers(*noise_, ch_, limit_, offset, n, x, y, wanted_.low ? seen.largest : nullptr);
    out_.commit(offset, n, y);
  }

  void draw_values(const float* x, int64_t offset, int64_t n) const {
    float u[kBlock], buffer[kBlock];
    float* y = out_.block(offset, buffer);
    noise_->draw(offset, n, u);
    (offset_grid_ ? draw_value_loop<true> : draw_value_loop<false>)(x, u, y, n, ch_);
    out_.commit(offset, n, y);
  }

  // rounded: [n], not clamped
  void round(const float* x, float* rounded, int64_t offset, int64_t n) const {
    if (noise_) {
      noise_->draw(offset, n, rounded);
      (offset_grid_ ? draw_loop<true> : draw_loop<false>)(x, rounded, rounded, n, ch_);
    } else {
      const auto loop = fast_ ? (offset_grid_ ? round_loop<true, true> : round_loop<true, false>)
                              : (offset_grid_ ? round_loop<false, true> : round_loop<false, false>);
      loop(x, rounded, n, ch_);
    }
  }

  void masks(const float* original, const float* tested, int64_t offset, int64_t n) const {
    alignas(64) uint8_t bytes[kBlock];
    if (wanted_.inside) {
      inside_loop(tested, bytes, n, ch_.low, ch_.high);
      if (clip_ != 0.0f) passes_loop(original, bytes, n, clip_);
      pack_block(bytes, n, 1, wanted_.inside + offset / kUnit);
    }
    if (wanted_.above) {
      above_loop(tested, bytes, n, ch_.high);
      pack_block(bytes, n, 1, wanted_.above + offset / kUnit);
    }
  }

  void results(const float* rounded, int64_t offset, int64_t n) const {
    if (wanted_.codes) {
      alignas(64) uint8_t codes[kBlock];
      code_loop(rounded, codes, n, ch_.low, ch_.high, offset_grid_ ? 0.0f : ch_.shift);
      pack_block(codes, n, wanted_.code_bits, wanted_.codes + offset / kUnit * wanted_.code_bits);
    }
    if (wanted_.y) {
      float buffer[kBlock];
      float* y = out_.block(offset, buffer);
      (offset_grid_ ? value_loop<true> : value_loop<false>)(rounded, y, n, ch_);
      out_.commit(offset, n, y);
    }
  }

  Input in_;
  Output out_;
  Channel ch_;
  std::optional<Uniforms> noise_;
  float clip_, limit_;
  Wanted wanted_;
  Tested tested_;
  bool offset_grid_, fast_, plain_, only_drawn_, in_registers_, rounds_;
};

template <class T>
T* unless_empty_data(const Tensor& t) {
  return t.numel() ? t.mutable_data_ptr<T>() : nullptr;
}

}  // namespace

void fake_quantize_tensor(Tensor x, FASTQAT_TENSOR_GRID, double clip, bool rounded_mask, int64_t seed,
                          int64_t tensor_id, Tensor step, Tensor limit, int64_t code_bits, Tensor low, Tensor high,
                          Tensor beyond, Tensor inside, Tensor above, Tensor codes, Tensor y) {
  x = dense(x);
  const Grid grid(scale, zero_point, offset, qrange, eps);
  const bool wants_y = y.numel() > 0;
  Result result(wants_y ? y : x, x);
  const Wanted wanted{unless_empty_data<float>(low),
                      unless_empty_data<float>(high),
                      unless_empty_data<int64_t>(beyond),
                      unless_empty_data<uint8_t>(inside),
                      unless_empty_data<uint8_t>(above),
                      unless_empty_data<uint8_t>(codes),
                      wants_y,
                      static_cast<int>(code_bits)};
  const auto noise = tensor_id >= 0 ? std::optional<Uniforms>(Uniforms(seed, step, tensor_id)) : std::nullopt;
  const Forward forward(x, result.own, grid, noise, static_cast<float>(clip), rounded_mask,
                        wanted.beyond ? limit.const_data_ptr<float>()[0] : 0.0f, wanted);

  const Cut cut({1, 1, x.numel()});
  std::vector<Seen> seen(wanted.low || wanted.beyond ? cut.pieces : 0);
  parallel(cut, [&](int64_t p) {
    Seen here;
    blocks_of_piece(cut, p, forward.longest_block(), [&](int64_t at, int64_t n) { forward.block(at, n, here); });
    if (!seen.empty()) seen[p] = here;
  });
  if (wants_y) result.deliver();
  for (const Seen& piece : seen) {
    if (wanted.low) {
      *wanted.low = -Largest::merge(-*wanted.low, piece.of(0));
      *wanted.high = Largest::merge(*wanted.high, piece.of(1));
    }
    if (wanted.beyond) *wanted.beyond += piece.beyond;
  }
}

}  // namespace fastqat::cpu
