// multi_tensor_fake_quantize_backward: dx, ds and dz (or do) of many tensors from one pass over (g, x, words), with
// frozen weights, gradient estimators and dampening.
#include <optional>

#include "../estimators.h"
#include "multi_tensor.h"

namespace fastqat::cpu {
namespace {

// What the loop reads besides g and x, for one span. held, factor, drawn: [n]
struct Prepared {
  const float *held, *factor, *drawn;
  float within, dampening;
};

template <int kTerms, bool kRounded, Path kPath, bool kOffset, Kind kKind, class Channels>
FASTQAT_CLONES void loop(const float* g, const float* x, float* dx, double* const* sums, int64_t n,
                         const Channels& given, Prepared prepared) {
  const Channels channels = given;
  auto element = [&](int64_t i) __attribute__((always_inline)) {
    Extras extras{prepared.held[i], prepared.factor[i], prepared.within, prepared.dampening,
                  kKind == Kind::stochastic ? prepared.drawn[i] : 0.0f};
    Gradient d = fastqat::fake_quantize_backward<kPath, kOffset, kRounded, kKind>(g[i], x[i], channels[i], extras);
    dx[i] = d.dx;
    return terms_of(d);
  };
  auto before = [&](int64_t i) __attribute__((always_inline)) { read_last(g, x, i); };
  reduce_span<Sum, kTerms, Channels::kRow>(n, sums, element, before);
}

// The two kinds that training with freezing and dampening needs have a fast path, the others take `extras`.
template <int kTerms, bool kRounded, bool kOffset, class Channels>
auto of_path(Path path, Kind kind) {
  if (kind == Kind::stochastic)
    return path == Path::divide ? loop<kTerms, kRounded, Path::divide, kOffset, Kind::stochastic, Channels>
                                : loop<kTerms, kRounded, Path::careful, kOffset, Kind::stochastic, Channels>;
  if (path == Path::fast && kind == Kind::frozen)
    return loop<kTerms, kRounded, Path::fast, kOffset, Kind::frozen, Channels>;
  if (path == Path::fast && kind == Kind::damped)
    return loop<kTerms, kRounded, Path::fast, kOffset, Kind::damped, Channels>;
  return path == Path::fast      ? loop<kTerms, kRounded, Path::fast, kOffset, Kind::extras, Channels>
         : path == Path::careful ? loop<kTerms, kRounded, Path::careful, kOffset, Kind::extras, Channels>
                                 : loop<kTerms, kRounded, Path::divide, kOffset, Kind::extras, Channels>;
}

template <int kTerms, class Channels>
auto extended_loop(Path path, bool offset_grid, bool rounded_mask, Kind kind) {
  if (rounded_mask)
    return offset_grid ? of_path<kTerms, true, true, Channels>(path, kind)
                       : of_path<kTerms, true, false, Channels>(path, kind);
  return offset_grid ? of_path<kTerms, false, true, Channels>(path, kind)
                     : of_path<kTerms, false, false, Channels>(path, kind);
}

// held[i] = level of a settled weight, NaN of others. words, held: [n]
template <class Word, class Channels>
FASTQAT_CLONES void hold(const Word* words, float* held, int64_t n, const Channels& given) {
  const Channels channels = given;
  const float none = __builtin_nanf("");
  for (int64_t i = 0; i < n; ++i) {
    float last = channels[i].low + static_cast<float>(index_of(words[i]));
    held[i] = flags_of(words[i]) == kSettled ? last : none;
  }
}

// True if one of the weights is settled. words: [n]
template <class Word>
FASTQAT_CLONES bool any_settled(const Word* words, int64_t n) {
  Word found = 0;
  for (int64_t i = 0; i < n; ++i) found |= static_cast<Word>(words[i] >> kCodeBits<Word>) == kSettled;
  return found != 0;
}

// factor[i] = E. g, x, factor: [n]
template <int64_t kEstimator, class Channels>
FASTQAT_CLONES void factors(const float* g, const float* x, float* factor, int64_t n, const Channels& given,
                            bool offset_grid, float strength, float peak) {
  const Channels channels = given;
  for (int64_t i = 0; i < n; ++i) {
    Channel ch = channels[i];
    float t = offset_grid ? x[i] - ch.shift : x[i];
    factor[i] = estimator_factor<kEstimator>(g[i], t / ch.scale, ch.scale, strength, peak);
  }
}

struct Constants {
  float none[kBlock], one[kBlock];
  Constants() {
    std::fill_n(none, kBlock, __builtin_nanf(""));
    std::fill_n(one, kBlock, 1.0f);
  }
};
const Constants kConstants;

// One tensor of the call.
class Job {
 public:
  Job(const Tensor& g, const Tensor& x, Grid&& grid, std::optional<int64_t> axis, Noise&& noise, bool rounded_mask,
      int64_t estimator, const Tensor& strength, const Tensor& dampening, const Tensor& words, const Tensor& dx,
      const Tensor& dscale, const Tensor& dshift)
      : grid_(std::move(grid)),
        noise_(std::move(noise)),
        x_(x),
        g_(with_strides_of(x_, g)),
        words_(words),
        dscale_(dscale),
        dshift_(dshift),
        dx_(dx, x_),
        in_g_(g_),
        in_x_(x_),
        out_(dx_.own),
        rounded_mask_(rounded_mask),
        estimator_(estimator),
        layout_(layout_of(x_, axis)) {
    dampening_ = dampening.numel() ? dampening.const_data_ptr<float>()[0] : 0.0f;
    strength_ = strength.numel() ? strength.const_data_ptr<float>()[0] : 0.0f;
    peak_ = estimator == kSigmoid ? sigmoid_peak(strength_) : 0.0f;
    STD_TORCH_CHECK(words.numel() == 0 || same_strides(words, x_),
                    "multi_tensor_fake_quantize_backward: wanted words with the strides of their tensor");
    if (dshift.numel())
      two_.emplace(layout_);
    else
      one_.emplace(layout_);
  }

  const Cut& cut() const { return two_ ? two_->cut() : one_->cut(); }

  void piece(int64_t p) {
    if (two_)
      reduce<2>(*two_, p);
    else
      reduce<1>(*one_, p);
  }

  void finish(bool lsq_grad_scale) {
    dx_.deliver();
    double factor = lsq_grad_scale ? lsq_factor(layout_, grid_) : 1.0;
    float* ds = dscale_.numel() ? dscale_.mutable_data_ptr<float>() : nullptr;
    if (!ds) return;
    if (two_)
      cpu::finish<2>(two_->total(), grid_, factor, ds, dshift_.mutable_data_ptr<float>());
    else
      cpu::finish<1>(one_->total(), grid_, factor, ds, nullptr);
  }

 private:
  template <int kTerms>
  void reduce(Reduction<Sum, kTerms>& reduction, int64_t p) {
    reduction.piece(grid_, p, [&](int64_t offset, int64_t n, const auto& channels, bool careful, auto sums) {
      using Channels = std::decay_t<decltype(channels)>;
      if (!words_.numel() && dampening_ == 0.0f && estimator_ == kSte)
        return backward_span<kTerms>(in_g_, in_x_, out_, offset, n, channels, careful, grid_.offset_grid(),
                                     rounded_mask_, sums);
      float buffer_g[kBlock], buffer_x[kBlock], buffer_dx[kBlock];
      const float* g = in_g_.block(offset, n, buffer_g);
      const float* x = in_x_.block(offset, n, buffer_x);
      float* dx = out_.block(offset, buffer_dx);
      Path path = path_of(channels, careful);
      Prepared prepared{kConstants.none, kConstants.one, kConstants.one, estimator_ == kPact ? 0.0f : 1.0f, dampening_};
      float held[kBlock], factor[kBlock], drawn[kBlock];
      Kind kind = dampening_ != 0.0f ? Kind::damped : Kind::plain;
      if (words_.numel() && hold_span(offset, held, n, channels)) {
        prepared.held = held;
        kind = std::max(kind, Kind::frozen);
      }
      if (estimator_ != kSte) {
        kind = noise_.on() ? Kind::stochastic : Kind::extras;
        prepared.factor = factors_of_span(g, x, factor, n, channels);
      }
      if (noise_.on()) {
        noise_.draw(x, drawn, offset, n, channels, grid_.offset_grid());
        prepared.drawn = drawn;
      }
      if (kind == Kind::plain)
        backward_loop<kTerms, Channels>(path, grid_.offset_grid(), rounded_mask_)(g, x, dx, sums, n, channels);
      else
        extended_loop<kTerms, Channels>(path, grid_.offset_grid(), rounded_mask_, kind)(g, x, dx, sums, n, channels,
                                                                                        prepared);
      out_.commit(offset, n, dx);
    });
  }

  // Fills held; false, and nothing is filled, where no weight of the span is settled.
  template <class Channels>
  bool hold_span(int64_t offset, float* held, int64_t n, const Channels& channels) const {
    auto fill = [&](const auto* words) {
      bool any = any_settled(words, n);
      if (any) hold(words, held, n, channels);
      return any;
    };
    return words_.scalar_type() == ScalarType::Byte ? fill(static_cast<const uint8_t*>(words_.data_ptr()) + offset)
                                                    : fill(static_cast<const int16_t*>(words_.data_ptr()) + offset);
  }

  // The factors of the span: in the buffer, or ones.
  template <class Channels>
  const float* factors_of_span(const float* g, const float* x, float* buffer, int64_t n,
                               const Channels& channels) const {
    if (estimator_ == kPact || estimator_ == kStochastic) return kConstants.one;
    auto fill = estimator_ == kEwgs      ? factors<kEwgs, Channels>
                : estimator_ == kSigmoid ? factors<kSigmoid, Channels>
                                         : factors<kPsg, Channels>;
    fill(g, x, buffer, n, channels, grid_.offset_grid(), strength_, peak_);
    return buffer;
  }

  Grid grid_;
  Noise noise_;
  Tensor x_, g_, words_, dscale_, dshift_;
  Result dx_;
  Input in_g_, in_x_;
  Output out_;
  bool rounded_mask_;
  int64_t estimator_;
  float strength_, peak_, dampening_;
  Layout layout_;
  std::optional<Reduction<Sum, 1>> one_;
  std::optional<Reduction<Sum, 2>> two_;
};

}  // namespace

void multi_tensor_fake_quantize_backward(Tensors gs, Tensors xs, FASTQAT_GRIDS, FASTQAT_NOISE, Ints rounded_masks,
                                         Ints lsq_grad_scales, Ints estimators, Tensors strengths, Tensors dampenings,
                                         Tensors words, Tensors dxs, Tensors dscales, Tensors dshifts) {
  std::vector<Job> jobs;
  jobs.reserve(xs.size());
  for (size_t i = 0; i < xs.size(); ++i) {
    Tensor x = dense(xs[i]);
    Grid grid(scales[i], unless_empty(zero_points[i]), unless_empty(offsets[i]), qranges[i], eps[i]);
    // Only stochastic rounding draws, whatever id the tensor has.
    Noise noise(seeds[i], steps[i], estimators[i] == kStochastic ? tensor_ids[i] : -1, x);
    jobs.emplace_back(gs[i], x, std::move(grid), axis_of(axes[i]), std::move(noise), rounded_masks[i] != 0,
                      estimators[i], strengths[i], dampenings[i], words[i], dxs[i], dscales[i], dshifts[i]);
  }
  parallel_jobs(jobs);
  for (size_t i = 0; i < jobs.size(); ++i) jobs[i].finish(lsq_grad_scales[i] != 0);
}

}  // namespace fastqat::cpu
