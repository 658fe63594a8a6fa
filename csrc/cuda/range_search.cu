// range_search: squared errors of many candidate grids from one read of x.
//
// A warp takes a tile of one channel into registers, lets all candidates pass over it, and keeps the sum of each. The
// warps that share a channel, or a part of a long one, take its tiles in turn.
#include "../range_search.h"
#include "grid.cuh"
#include "reduce.cuh"
#include "units.cuh"
#include "vector.cuh"

namespace fastqat::cuda {
namespace {

constexpr int kAtOnce = 4;            // candidates that are summed together
constexpr int kMostCandidates = 128;  // for one read of x
constexpr int kOfThread = 8;          // for one thread

// Of each warp.
struct Candidates {
  Candidate of[kWarps][kMostCandidates];
};
struct Errors {
  double of[kWarps][kMostCandidates];

  // Of neighbouring warps, in their order.
  __device__ __forceinline__ double total(int warp, int warps, int k) const {
    double sum = 0.0;
#pragma unroll 1
    for (int w = warp; w < warp + warps; ++w) sum += of[w][k];
    return sum;
  }
};

// Candidates that pass over x at the same time, from number `first` on.
__device__ __forceinline__ int candidates_from(const RangeSearch& search, int first) {
  return std::min(int{kMostCandidates}, search.candidates - first);
}

// Elements begin, begin + kStep, ... of channel c, as far as they lie before `last`; bit j of the result: x[j] counts,
// being there and finite.
template <class X, int kStep>
__device__ __forceinline__ unsigned int load(const RangeSearch& search, int64_t c, int64_t begin, int64_t last,
                                             float (&x)[kHeld]) {
  const int64_t inner = search.layout.inner, skip = (search.layout.channels - 1) * inner;  // to the next outer row
  const int64_t outer = begin / inner, left = last - begin;
  const int outer_step = inner > kStep ? 0 : kStep / static_cast<int>(inner);
  const int64_t inner_step = kStep - outer_step * inner, step = kStep + outer_step * skip;
  const auto from = array<X>(search.x, search.x_dtype, c * inner);
  int64_t at = begin + outer * skip, i = begin - outer * inner;
  unsigned int counts = 0;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    x[j] = j * kStep < left ? from.get(at) : __builtin_nanf("");
    counts |= (fabsf(x[j]) < __builtin_inff() ? 1u : 0u) << j;
    i += inner_step;
    at += step;
    if (i >= inner) {
      i -= inner;
      at += skip;
    }
  }
  return counts;
}

// The sums of a warp for kAtOnce candidates: lane k, of that of number k % kAtOnce. In each step a lane keeps half of
// its candidates and hands the other half over.
__device__ __forceinline__ float total_of_warp(float (&sums)[kAtOnce]) {
#pragma unroll
  for (int half = kAtOnce / 2; half > 0; half /= 2) {
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int k = 0; k < half; ++k) {
      const float kept = upper ? sums[k + half] : sums[k], given = upper ? sums[k] : sums[k + half];
      sums[k] = kept + __shfl_xor_sync(kAllLanes, given, half);
    }
  }
  float total = sums[0];
#pragma unroll
  for (int distance = kAtOnce; distance < kWarp; distance *= 2) total += __shfl_xor_sync(kAllLanes, total, distance);
  return total;
}

// Adds what a tile has to the errors of `count` candidates. rows: of a lane's elements, behind which nobody has any;
// kAll: all count.
template <bool kAll>
__device__ __forceinline__ void add_errors(const float (&x)[kHeld], unsigned int counts, int64_t rows,
                                           const Candidate* candidates, int count, double* errors) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int k = 0; k < count; k += kAtOnce) {
    float sums[kAtOnce] = {};
    Candidate own[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) own[u] = candidates[k + u];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (!kAll && j >= rows) break;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (kAll || (counts >> j & 1)) sums[u] = add_squared_error(sums[u], x[j], own[u]);
    }
    const float total = total_of_warp(sums);
    if (lane < kAtOnce) errors[k + lane] += static_cast<double>(total);
  }
}

// The errors of `count` candidates from number `first` on, over this warp's tiles of a part of channel c.
template <class X>
__device__ __forceinline__ void search_part(const RangeSearch& search, int c, int part, int first, int count) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Candidate* const candidates = shared<Candidates>().of[warp];
  double* const errors = shared<Errors>().of[warp];
  const int padded = (count + kAtOnce - 1) / kAtOnce * kAtOnce;
#pragma unroll 1
  for (int k = lane; k < padded; k += kWarp) {
    const int number = first + std::min(k, count - 1);  // behind the last one, that one again
    candidates[k] = make_candidate(channel_of(search.grid, number * search.layout.channels + c));
    errors[k] = 0.0;
  }
  __syncwarp();
  const int64_t begin = part * search.cut.size;
  const int64_t last = std::min(begin + search.cut.size, search.layout.outer * search.layout.inner);
  const int sharing = search.cut.sharing;
  for (int64_t tile = begin + warp % sharing * kTile; tile < last; tile += sharing * kTile) {
    float x[kHeld];
    const unsigned int counts = load<X, kWarp>(search, c, tile + lane, last, x);
    const int64_t rows = (last - tile + kWarp - 1) / kWarp;
    if (__ballot_sync(kAllLanes, counts != (1u << kHeld) - 1) == 0)
      add_errors<true>(x, counts, rows, candidates, count, errors);
    else if (__ballot_sync(kAllLanes, counts != 0))
      add_errors<false>(x, counts, rows, candidates, count, errors);
  }
}

// Writes what the warps have found: as results of channel c, or, where `partial` is given, as those of a part of it.
__device__ __forceinline__ void deliver(const RangeSearch& search, int c, int first, int count, double* partial) {
  const auto& errors = shared<Errors>();
  const int sharing = search.cut.sharing, threads = sharing * kWarp, first_warp = threadIdx.x / threads * sharing;
  for (int k = threadIdx.x % threads; k < count; k += threads) {
    const double error = errors.total(first_warp, sharing, k);
    if (partial)
      partial[k] = error;
    else
      search.errors[(first + k) * search.layout.channels + c] = static_cast<float>(error);
  }
}

// Sums the parts of channel c, by all warps of a block.
__device__ __forceinline__ void merge_parts(const RangeSearch& search, int c) {
  const int warp = threadIdx.x / kWarp;
  double* const errors = shared<Errors>().of[warp];
  for (int first = 0; first < search.candidates; first += kMostCandidates) {
    const int count = candidates_from(search, first);
    for (int k = threadIdx.x % kWarp; k < count; k += kWarp) {
      double sum = 0.0;
      for (int part = warp; part < search.cut.parts; part += kWarps) sum += search.partial_of(c, part)[first + k];
      errors[k] = sum;
    }
    __syncthreads();
    deliver(search, c, first, count, nullptr);
    __syncthreads();
  }
}

template <class X>
__global__ void __launch_bounds__(kThreads, 3) range_search_kernel(const __grid_constant__ RangeSearch search) {
  const SearchCut& cut = search.cut;
  for (int piece = blockIdx.x; piece < cut.pieces; piece += gridDim.x) {
    const int part = piece % cut.parts;
    const int c = piece / cut.parts * (kWarps / cut.sharing) + static_cast<int>(threadIdx.x) / kWarp / cut.sharing;
    for (int first = 0; first < search.candidates; first += kMostCandidates) {
      const int count = candidates_from(search, first);
      const bool exists = c < search.layout.channels;
      if (exists) search_part<X>(search, c, part, first, count);
      __syncthreads();
      if (exists) deliver(search, c, first, count, cut.parts > 1 ? search.partial_of(c, part) + first : nullptr);
      __syncthreads();
    }
    if (cut.parts > 1 && arrives_last(&search.arrived[c], cut.parts)) merge_parts(search, c);
  }
}

// Channels that are shorter than what a thread holds: each thread takes one, and some candidates.
template <class X>
__global__ void __launch_bounds__(kThreads)
    short_range_search_kernel(const __grid_constant__ RangeSearch search, int64_t units) {
  const int64_t channels = search.layout.channels, length = search.layout.outer * search.layout.inner;
  for_each_unit(units, [&](int64_t unit) {
    const int64_t c = unit % channels;
    const int first = static_cast<int>(unit / channels) * kOfThread;
    float x[kHeld];
    const unsigned int counts = length ? load<X, 1>(search, c, 0, length, x) : 0;
    for (int k = first; k < std::min(first + kOfThread, search.candidates); ++k) {
      const Candidate candidate = make_candidate(channel_of(search.grid, k * channels + c));
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kHeld; ++j)
        if (counts >> j & 1) sum = add_squared_error(sum, x[j], candidate);
      search.errors[k * channels + c] = sum;
    }
  });
}

template <class X>
void start(const RangeSearch& search, void* stream) {
  constexpr const char* kName = "range_search";
  if (search.cut.sharing) return launch(kName, range_search_kernel<X>, search.cut.pieces, kThreads, stream, search);
  const int64_t units = ceil_div(search.candidates, kOfThread) * search.layout.channels;
  launch(kName, short_range_search_kernel<X>, blocks_of(units), kThreads, stream, search, units);
}

}  // namespace

void range_search(const RangeSearch& search, void* stream) {
  if (!search.cut.pieces || !search.candidates) return;
  auto start_of = search.x_dtype == Dtype::bfloat16  ? start<BFloat16>
                  : search.x_dtype == Dtype::float16 ? start<Float16>
                                                     : start<float>;
  start_of(search, stream);
}

}  // namespace fastqat::cuda
