// Gradients of fake_quantize for many tensors in one launch: dx, and the sums for scale and zero point or offset, with
// frozen weights, dampening and gradient estimators.
#include "../estimators.h"
#include "grid.cuh"
#include "table.cuh"
#include "traverse.cuh"
#include "vector.cuh"
#include "words.cuh"

namespace fastqat::cuda {
namespace {

// kKind: plain; damped: words and dampening; stochastic: all that there is, an element at a time. kClips: x may be
// clipped first.
template <class X, class G, Kind kKind, bool kRounded, bool kClips>
struct Gradients {
  using Sums = TwoSums;
  static constexpr bool kAll = kKind == Kind::stochastic;
  static constexpr int kVector = kAll ? 1 : kVectorOf<X, G>, kAtOnce = kKind == Kind::plain || sizeof(X) == 2 ? 16 : 8;
  template <int n>
  struct Operands {
    typename Array<G>::template Raw<n> g;
    typename Array<X>::template Raw<n> x;
    WordVector<n> words;
  };

  const Backward& entry;
  Array<X> x, dx;
  Array<G> g;
  Words words;
  int64_t base;
  float dampening = 0.0f, strength = 0.0f, peak = 0.0f;

  __device__ explicit Gradients(const Backward& e) : entry(e) {
    if (kKind != Kind::plain && entry.dampening) dampening = *entry.dampening;
    if (kAll && entry.strength) strength = *entry.strength;
    if (kAll && entry.estimator == kSigmoid) peak = sigmoid_peak(strength);
  }
  __device__ __forceinline__ Channel channel(int64_t c) const { return channel_of(entry.grid, c); }
  __device__ __forceinline__ void begin(int64_t) const {}
  __device__ __forceinline__ void end() const {}

  __device__ __forceinline__ void place(int64_t base_) {
    base = base_;
    g = array<G>(entry.g, entry.g_dtype, base);
    x = array<X>(entry.x, entry.x_dtype, base);
    dx = array<X>(entry.dx, entry.x_dtype, base);
    if (kKind != Kind::plain) words = Words(entry.words, entry.wide, base);
  }

  template <int n>
  __device__ __forceinline__ Operands<n> load(int i) const {
    Operands<n> operands;
    operands.g = g.template load<n>(i);
    operands.x = x.template load<n>(i);
    if (kKind != Kind::plain && words.data) operands.words = words.load<n>(i);
    return operands;
  }

  template <int n>
  __device__ __forceinline__ void apply(int i, const Operands<n>& operands, const Channel& ch, TwoSums& sums) const {
    Vector<float, n> results;
    float scale = 0.0f, outside = 0.0f;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float raw = to_float(operands.x.v[k]), gradient = to_float(operands.g.v[k]);
      const bool clips = kClips && entry.clip != 0.0f;
      const float v = clips ? clipped(raw, entry.clip) : raw;
      Extras extras;
      if (kKind != Kind::plain) {
        extras.dampening = dampening;
        if (words.data && words.flags_of(operands.words.v[k]) == kSettled)
          extras.held = ch.low + static_cast<float>(words.index_of(operands.words.v[k]));
      }
      if (kAll) estimate(extras, gradient, v, base + i + k, ch);
      const bool fast = n > 1 || is_fast_scale(ch.scale);
      const Gradient d =
          fast ? fastqat::fake_quantize_backward<Path::careful, true, kRounded, kKind>(gradient, v, ch, extras)
               : fastqat::fake_quantize_backward<Path::divide, true, kRounded, kKind>(gradient, v, ch, extras);
      results.v[k] = !clips || passes_clip(raw, entry.clip) ? d.dx : 0.0f;
      scale += d.scale();
      outside += d.outside;
    }
    dx.template store<n>(i, results);
    sums.first += scale;
    sums.second += outside;
  }

  // What an estimator and stochastic rounding make of an element.
  __device__ __forceinline__ void estimate(Extras& extras, float gradient, float v, int64_t element,
                                           const Channel& ch) const {
    const float t = shifted<true>(v, ch), r = t / ch.scale, s = ch.scale;
    const int64_t which = entry.estimator;
    extras.factor = which == kEwgs      ? estimator_factor<kEwgs>(gradient, r, s, strength, peak)
                    : which == kSigmoid ? estimator_factor<kSigmoid>(gradient, r, s, strength, peak)
                    : which == kPsg     ? estimator_factor<kPsg>(gradient, r, s, strength, peak)
                                        : 1.0f;
    extras.within = which == kPact ? 0.0f : 1.0f;
    extras.drawn = entry.noise.tensor_id >= 0 ? drawn(t, ch, entry.noise, element) : round_even(r);
  }

  __device__ __forceinline__ void finish(int c, const TwoSums& sums) const {
    if (!entry.dscale) return;
    const Channel ch = channel(c);
    double factor = 1.0;
    if (entry.lsq_grad_scale) {
      const double count = static_cast<double>(entry.cut.outer * entry.cut.inner);
      const double qmax = static_cast<double>(entry.grid.qrange[1]);
      factor = 1.0 / sqrt((count < 1.0 ? 1.0 : count) * (qmax < 1.0 ? 1.0 : qmax));
    }
    entry.dscale[c] = static_cast<float>(sums.first / grad_scale_divisor(ch) * factor);
    const double slope = entry.grid.offset ? 1.0 : -static_cast<double>(ch.scale);
    if (entry.dshift) entry.dshift[c] = static_cast<float>(slope * sums.second * factor);
  }
};

template <class X, class G, Kind kKind, bool kRounded, bool kClips>
__device__ __forceinline__ void differentiate(const Backward& entry, int piece) {
  Gradients<X, G, kKind, kRounded, kClips> body(entry);
  traverse(body, entry.cut, piece, reinterpret_cast<TwoSums*>(entry.partial), entry.arrived);
}

template <class X, class G, Kind kKind, int kCapacity>
__global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(const __grid_constant__ Table<Backward, kCapacity> table) {
  constexpr bool kClips = kCapacity == 1 || kKind == Kind::stochastic;  // of one tensor alone
  for (int piece = blockIdx.x; piece < table.pieces; piece += gridDim.x) {
    const int which = table.find(piece);
    const Backward& entry = table.entries[which];
    const int own = piece - table.starts[which];
    if (kKind != Kind::stochastic || entry.rounded_mask)
      differentiate<X, G, kKind, true, kClips>(entry, own);
    else if constexpr (kKind == Kind::stochastic)
      differentiate<X, G, kKind, false, kClips>(entry, own);
  }
}

template <class X, class G, Kind kKind, int kCapacity>
void start(const Backward* entries, int count, void* stream) {
  for_each_table<kCapacity>(entries, count, [&](const auto& table, int64_t blocks) {
    launch("fake_quantize_backward", backward_kernel<X, G, kKind, kCapacity>, blocks, kThreads, stream, table);
  });
}

template <class X, class G>
void start_kind(const Backward* entries, int count, Kind kind, void* stream) {
  if (kind != Kind::plain)
    start<X, G, Kind::damped, kMost>(entries, count, stream);
  else if (count == 1)
    start<X, G, Kind::plain, 1>(entries, count, stream);
  else
    start<X, G, Kind::plain, kMost>(entries, count, stream);
}

Kind kind_of(const Backward& entry) {
  if (entry.estimator != kSte || entry.noise.tensor_id >= 0 || !entry.rounded_mask) return Kind::stochastic;
  return entry.words || entry.dampening ? Kind::damped : Kind::plain;
}

}  // namespace

void fake_quantize_backward(const Backward* entries, int count, void* stream) {
  if (!count) return;
  Kind kind = Kind::plain;
  for (int i = 0; i < count; ++i) kind = std::max(kind, kind_of(entries[i]));
  if (kind == Kind::stochastic) return start<Any, Any, Kind::stochastic, kMost>(entries, count, stream);
  with_dtypes(entries[0].x_dtype, entries[0].g_dtype, [&](auto x, auto g) {
    start_kind<typename decltype(x)::type, typename decltype(g)::type>(entries, count, kind, stream);
  });
}

}  // namespace fastqat::cuda
