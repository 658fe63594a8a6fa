// What the glue hands to the kernels: tables of plain pointers into the memory of one device, and the functions that
// start them. No torch, no CUDA header.
#pragma once

#include <cstdint>

#include "cut.h"

namespace fastqat::cuda {

enum class Dtype : int32_t { float32, bfloat16, float16, int8, uint8, int32, int16 };

// Elements that a thread takes at a time, where float tensors of these dtypes are read or written together.
inline int64_t vector_of(Dtype a, Dtype b) { return a == Dtype::float32 && b == Dtype::float32 ? 4 : 8; }

// A quantization grid. scale, zero_point or offset (or null): [channels]; qrange: [2].
struct GridPointers {
  const float *scale, *zero_point, *offset;
  const int32_t* qrange;
  float eps;
};

// Stochastic rounding at *step; on where tensor_id >= 0.
struct NoisePointers {
  const int64_t* step;
  uint64_t seed;
  int64_t tensor_id;
};

// What the blocks that work on one tensor tell each other; zeros before the launch.
struct Meeting {
  unsigned long long events[3];  // transitions, oscillations, freezes
  unsigned int arrived;          // pieces that are done
  unsigned int unused;
};

// One tensor to quantize-dequantize. x, y: dense, of the same strides; so are words, frequency and average. Where the
// words are wide the cut has no vectors.
struct Forward {
  const void* x;
  void* y;
  GridPointers grid;
  Cut cut;
  NoisePointers noise;
  void* words;  // uint8_t, or int16_t where `wide`; it and the next two may be null where there are no elements
  float *frequency, *average;
  int64_t* counts;
  double* clock;  // null: not tracked
  const float* threshold;
  Meeting* meeting;
  double momentum;
  Dtype x_dtype, y_dtype;
  bool wide, use_average, advance;
};

// One tensor's gradients. g, x, dx, words: dense, of the same strides.
struct Backward {
  const void *g, *x;
  void* dx;
  GridPointers grid;
  Cut cut;
  NoisePointers noise;
  const void* words;                  // see Forward; null: none is frozen
  const float *strength, *dampening;  // or null
  float *dscale, *dshift;             // [channels], or null
  double* partial;                    // [parts, channels, 2] where some group has several parts
  unsigned int* arrived;              // [groups], zeros before the launch
  int64_t estimator;
  Dtype x_dtype, g_dtype;
  float clip;  // 0: none
  bool wide, rounded_mask, lsq_grad_scale;
};

// One tensor to quantize-dequantize on two grids. x, first, second: dense, of the same strides.
struct TwoWidths {
  const void* x;
  void *first, *second;
  GridPointers grids[2];
  Cut cut;
  Dtype x_dtype, y_dtype;
};

// A weight of DoReFa at one or two bit-widths. x, first, second: dense, of the same strides. low, high: [1]; see
// fastqat/ops/schema.py.
struct Dorefa {
  const void* x;
  void *first, *second;  // second: null where one width is wanted
  const float *low, *high;
  const int32_t* qmax;       // [2]
  unsigned long long* sums;  // [2, 2], zeros before the launch; or null
  Cut cut;
  Dtype x_dtype, y_dtype;
};

// What a piece of a tensor adds to the gradient of max|x|.
struct DorefaPart {
  double total = 0.0;
  unsigned int ties = 0;  // elements that are the largest
};

// Its gradient. g, x, dx: dense, of the same strides.
struct DorefaBackward {
  const void *g, *x;
  void* dx;
  const float *low, *high, *factor;  // factor: [1], or null
  DorefaPart* parts;                 // [pieces of the cut]
  Cut cut;
  Dtype x_dtype, g_dtype;
};

// A tensor and its codes, dense, of the same strides: int8, uint8 or int32. Where they are int32 the cut has no
// vectors.
struct Coded {
  const void *x, *codes;
  GridPointers grid;
  Cut cut;
  Dtype x_dtype, code_dtype;
};

// The extremes of a dense tensor. low, high: [channels]
struct MinMax {
  const void* x;
  Cut cut;
  float *low, *high;
  float* partial;         // [parts, channels, 2] where a group has several parts
  unsigned int* arrived;  // [groups], zeros before the launch
  Dtype x_dtype;
};

// Squared errors of many candidate grids for a dense tensor. errors, and what the grid has: [candidates, channels]
struct RangeSearch {
  const void* x;
  GridPointers grid;
  Layout layout;
  SearchCut cut;
  float* errors;
  double* partial;        // [channels, parts, candidates] where a channel has several parts
  unsigned int* arrived;  // [channels], zeros before the launch
  int32_t candidates;
  Dtype x_dtype;

  constexpr double* partial_of(int c, int part) const {
    return partial + (static_cast<int64_t>(c) * cut.parts + part) * candidates;
  }
};

// Integer codes, int8, uint8 or int32, and the stream of `bits` bits of each. aligned: both to 16 bytes.
struct Packing {
  void *codes, *packed;
  int64_t numel;
  int bits;
  Dtype code_dtype;
  bool aligned;
};

// One tensor with one scale, and what is wanted of it: a null pointer is not. x, y: dense, of the same strides.
struct TensorForward {
  const void* x;
  void* y;
  GridPointers grid;
  NoisePointers noise;
  int64_t numel;
  const float* limit;
  float *low, *high;  // both or none
  unsigned long long* beyond;
  uint8_t *inside, *above, *codes;
  float clip;  // 0: none
  int32_t code_bits;
  int32_t code_width;  // bytes of an access to the codes of a unit
  Dtype x_dtype, y_dtype;
  bool aligned;  // x and y, to 16 bytes
  bool rounded_mask;
};

// Its gradients from bits. g, dx: dense, of the same strides.
struct TensorBackward {
  const void* g;
  void* dx;
  const uint8_t *inside, *above;
  const int32_t* qrange;
  Cut cut;
  float* dscale;          // null: not wanted
  double* partial;        // [parts] where there are several
  unsigned int* arrived;  // [1], zero before the launch
  Dtype dx_dtype, g_dtype;
};

// Its values from packed codes.
struct TensorCodes {
  const uint8_t* codes;
  void* y;
  GridPointers grid;
  int64_t numel;
  int32_t code_bits, code_width;  // see TensorForward
  Dtype y_dtype;
  bool aligned;  // y, to 16 bytes
};

// What advance_range moves; see fastqat/ops/schema.py. zero_point: null on a symmetric grid.
struct RangeState {
  const int32_t* qrange;
  const int64_t* step;
  float *low, *high, *new_low, *new_high, *scale, *zero_point;
  int64_t* observed_step;
  float momentum, rest;  // rest: 1 - momentum
  bool always;
};

// What advance_interval moves.
struct IntervalState {
  const float *low, *high;
  const int32_t* qrange;
  const int64_t* step;
  float *gamma, *limit, *scale;
  int64_t *beyond, *seen, *observed_step;
  int64_t numel;
  double alpha;
  float stride, smallest;
  bool always;
};

// Each takes entries of the same dtypes: x and y, or x and g, of float32, bfloat16 or float16, and the second like the
// first unless that is float32.
void fake_quantize(const Forward* entries, int count, void* stream);
void fake_quantize_tracking(const Forward* entries, int count, void* stream);
void fake_quantize_backward(const Backward* entries, int count, void* stream);
void fake_quantize_two_widths(const TwoWidths& entry, void* stream);
void dorefa_fake_quantize(const Dorefa& entry, void* stream);
void dorefa_fake_quantize_backward(const DorefaBackward& entry, void* stream);

// x -> codes and codes -> x.
void quantize(const Coded& entry, void* stream);
void dequantize(const Coded& entry, void* stream);

void fake_quantize_tensor(const TensorForward& entry, void* stream);
void fake_quantize_tensor_backward(const TensorBackward& entry, void* stream);
void dequantize_tensor(const TensorCodes& entry, void* stream);
void advance_range(const RangeState& state, void* stream);
void advance_interval(const IntervalState& state, void* stream);

void minmax(const MinMax& entry, void* stream);
void range_search(const RangeSearch& search, void* stream);

// codes -> packed, and packed -> codes of int8 (signed) or uint8.
void pack(const Packing& packing, void* stream);
void unpack(const Packing& packing, void* stream);

// u: [numel], where `aligned` to 16 bytes.
void philox_uniform(const NoisePointers& noise, int64_t numel, bool aligned, float* u, void* stream);

// Sets memory to 0, in order with the stream.
void clear(void* data, int64_t bytes, void* stream);

}  // namespace fastqat::cuda
