// Oscillation tracking and freezing of one weight: the word it is kept in, what a step means for a tensor, and the
// event of a weight whose code has changed. No torch, no CUDA.
// fastqat/ops/triton/oscillation.py is its twin: the same names in the same order. fastqat/ops/words.py says what a
// word means, fastqat/ops/multi_tensor.py defines the rest.
//
// Between two changes of its code the frequency f and the average e of a weight decay in closed form, so that nothing
// of a weight is touched but when it changes: kept are F = f * (1 - m)^-t and A = (e - code) * (1 - m)^-t.
#pragma once

#include "math.h"

namespace fastqat {

constexpr double kLargestGrowth = 0x1p60;
constexpr int kNone = 0, kUp = 1, kDown = 2;  // directions
constexpr int kSettled = 4;                   // flags of a weight that is at its frozen code; above: pending

template <class Word>
constexpr int kCodeBits = sizeof(Word) == 1 ? 5 : 8;

// Index of the code in a word: code - qmin.
template <class Word>
FASTQAT_INLINE int32_t index_of(Word word) {
  return static_cast<int32_t>(word) & ((1 << kCodeBits<Word>)-1);
}

// Direction, and 4 where frozen.
template <class Word>
FASTQAT_INLINE int32_t flags_of(Word word) {
  return static_cast<int32_t>(word) >> kCodeBits<Word>;
}

template <class Word>
FASTQAT_INLINE Word make_word(int32_t index, int32_t flags) {
  return static_cast<Word>(index | flags << kCodeBits<Word>);
}

// base^exponent by repeated squaring: the same multiplications everywhere, and no pow.
FASTQAT_INLINE double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = result * base;
    base = base * base;
  }
  return result;
}

// One step of tracking, as all weights of a tensor see it. t counts from where the growth was last 1.
struct Moment {
  bool acts;       // the step is another than the last tracked one, so that freezes decided there act
  bool first;      // nothing was tracked before
  bool activates;  // the threshold is no longer 0: averages begin anew, at the current codes
  bool sweeps;     // any weight may be due for freezing, not only those that change
  bool use_average;
  float rescale;  // 1, or what brings the growth back to 1
  float threshold;
  double growth;          // (1 - m)^-t
  float increment;        // m * (1 - m)^-t
  float previous_growth;  // (1 - m)^-(t - 1)
  float decay;            // (1 - m)^t
  double previous_decay;  // (1 - m)^(t - 1)
};

// clock: growth, last tracked step (-1: none), and its threshold.
FASTQAT_INLINE Moment moment(int64_t step, const double* clock, double momentum, float threshold, bool use_average) {
  Moment at;
  at.use_average = use_average;
  at.threshold = threshold;
  double limit = threshold, previous_threshold = clock[2];
  int64_t elapsed = step - static_cast<int64_t>(clock[1]);
  at.acts = elapsed != 0;  // a step that was set back begins where it is
  at.first = clock[1] < 0;
  double passed = power(1.0 / (1.0 - momentum), elapsed);
  double growth = at.first ? 1.0 : clock[0] * passed;
  bool too_large = growth > kLargestGrowth;
  at.rescale = too_large ? static_cast<float>(1.0 / growth) : 1.0f;
  at.growth = too_large ? 1.0 : growth;
  at.activates = limit > 0 && previous_threshold <= 0;
  bool falls = limit > 0 && limit * passed < previous_threshold;  // faster than a frequency decays
  at.sweeps = too_large || at.activates || falls;
  double before = at.growth * (1.0 - momentum);
  at.increment = static_cast<float>(momentum * at.growth);
  at.previous_growth = static_cast<float>(before);
  at.decay = static_cast<float>(1.0 / at.growth);
  at.previous_decay = 1.0 / before;
  return at;
}

// A weight and its state, taken apart. While it is pending, `average` is the index of its own code in that step.
struct Tracked {
  int32_t index, flags;
  float frequency, average;
};

// What a step counts of a weight.
struct Event {
  bool changes, oscillates, freezes;
};

// The index of the code nearest to an average, of two the even code (an index would be odd there if qmin is). In
// double: beside a code of 200 a float keeps no more than 2^-16 of the deviation. No average, were it NaN, leaves the
// grid.
FASTQAT_INLINE int32_t frozen_index(int32_t index, double deviation, float qmin, float qmax) {
  double low = qmin, high = qmax, mean = low + index + deviation;
  mean = mean > low ? mean : low;
  mean = mean < high ? mean : high;
  return static_cast<int32_t>(__builtin_rint(mean) - low);
}

// The index that a weight has in this step, and its new state. now: index of its own code; number: it is no NaN. A
// weight that is frozen here has its own code until the next step, where the frozen one, which its word has already, is
// a change against it.
FASTQAT_INLINE int32_t record(Tracked& weight, int32_t now, bool number, const Moment& at, float qmin, float qmax,
                              Event& event) {
  event = {false, false, false};
  if (at.first) {
    weight = {now, kNone, 0.0f, 0.0f};
    return now;
  }
  bool free = weight.flags<kSettled, pending = weight.flags> kSettled;
  int32_t direction = weight.flags & 3;
  int32_t index = free ? now : weight.index;
  float last = pending ? weight.average : static_cast<float>(weight.index);
  bool changes = number && static_cast<float>(index) != last && (free || pending);
  int32_t way = static_cast<float>(index) > last ? kUp : kDown;
  bool oscillates = changes && direction != kNone && way != direction;
  weight.frequency = weight.frequency * at.rescale;
  if (oscillates) weight.frequency = weight.frequency + at.increment;
  event.changes = changes;
  event.oscillates = oscillates;
  if (!number) {
    if (free) weight.average = at.activates ? 0.0f : weight.average * at.rescale;
    return index;
  }
  if (free) {
    float average = weight.average * at.rescale;
    bool due = (changes || at.sweeps) && at.threshold > 0.0f && weight.frequency * at.decay > at.threshold;
    int32_t mean = frozen_index(weight.index, average * at.previous_decay, qmin, qmax);
    if (changes) average = average + static_cast<float>(weight.index - index) * at.previous_growth;
    if (at.activates) average = 0.0f;
    weight.average = due ? static_cast<float>(index) : average;
    weight.index = due && at.use_average && !at.activates ? mean : index;
    weight.flags = (changes ? way : direction) | (due ? kSettled : 0);
    event.freezes = due;
  } else if (pending) {
    weight.flags = kSettled;
  }
  return index;
}

}  // namespace fastqat
