// advance_range, advance_interval: the ranges of the next step.
#include "../ranges.h"

#include "ops.h"

namespace fastqat::cpu {
namespace {

float& value_of(const Tensor& t) { return t.mutable_data_ptr<float>()[0]; }

// Whether the step is another than the one observed last, which it becomes.
bool is_new(const Tensor& step, bool always, const Tensor& observed_step) {
  int64_t now = step.const_data_ptr<int64_t>()[0];
  int64_t& observed = observed_step.mutable_data_ptr<int64_t>()[0];
  bool fresh = always || now != observed;
  observed = now;
  return fresh;
}

}  // namespace

void advance_range(Tensor qrange, Tensor step, bool always, double momentum, Tensor low, Tensor high, Tensor new_low,
                   Tensor new_high, Tensor observed_step, Tensor scale, Tensor zero_point) {
  const int32_t* codes = qrange.const_data_ptr<int32_t>();
  const float qmin = static_cast<float>(codes[0]), qmax = static_cast<float>(codes[1]);
  if (is_new(step, always, observed_step)) {
    const float kept = static_cast<float>(momentum), rest = static_cast<float>(1.0 - momentum);
    value_of(low) = moving_average(value_of(low), value_of(new_low), kept, rest);
    value_of(high) = moving_average(value_of(high), value_of(new_high), kept, rest);
    value_of(new_low) = __builtin_inff();
    value_of(new_high) = -__builtin_inff();
  }
  const bool symmetric = zero_point.numel() == 0;
  value_of(scale) = scale_of_range(value_of(low), value_of(high), qmin, qmax, symmetric);
  if (!symmetric) value_of(zero_point) = zero_point_of_range(value_of(low), value_of(scale), qmin);
}

void advance_interval(Tensor low, Tensor high, Tensor qrange, Tensor step, bool always, int64_t numel, double alpha,
                      double stride, double smallest, Tensor gamma, Tensor beyond, Tensor seen, Tensor observed_step,
                      Tensor limit, Tensor scale) {
  const float qmax = static_cast<float>(qrange.const_data_ptr<int32_t>()[1]);
  int64_t& outside = beyond.mutable_data_ptr<int64_t>()[0];
  int64_t& all = seen.mutable_data_ptr<int64_t>()[0];
  if (is_new(step, always, observed_step)) {
    value_of(gamma) = moved_gamma(value_of(gamma), outside, all, alpha, qmax, static_cast<float>(stride),
                                  static_cast<float>(smallest));
    outside = all = 0;
  }
  const float largest = largest_magnitude(value_of(low), value_of(high));
  if (largest > 0.0f) all += numel;
  value_of(limit) = value_of(gamma) * largest;
  value_of(scale) = value_of(limit) / qmax;
}

}  // namespace fastqat::cpu
