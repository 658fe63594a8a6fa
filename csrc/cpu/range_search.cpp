// range_search: squared errors of many candidate grids from one read of x.
#include "../range_search.h"

#include "elements.h"
#include "ops.h"

namespace fastqat::cpu {
namespace {

constexpr int64_t kTile = 2048;       // elements that stay in the first-level cache while all candidates pass over them
constexpr int64_t kPieceTiles = 4;    // tiles of one piece of work; partial errors are kept per piece
constexpr int kCandidatesAtOnce = 4;  // independent sums hide the latency of the additions

FASTQAT_CLONES void loop(const float* x, int64_t n, const Candidate* c, double* errors) {
  float e0 = 0, e1 = 0, e2 = 0, e3 = 0;
#pragma omp simd reduction(+ : e0, e1, e2, e3)
  for (int64_t i = 0; i < n; ++i) {
    e0 = add_squared_error(e0, x[i], c[0]);
    e1 = add_squared_error(e1, x[i], c[1]);
    e2 = add_squared_error(e2, x[i], c[2]);
    e3 = add_squared_error(e3, x[i], c[3]);
  }
  errors[0] += e0;
  errors[1] += e1;
  errors[2] += e2;
  errors[3] += e3;
}

// Copies elements [first, first + n) of channel c, in memory order, to tile; returns how many are finite, and stay.
int64_t gather(const Input& in, const Layout& layout, int64_t c, int64_t first, int64_t n, float* tile) {
  float buffer[kBlock];
  for (int64_t done = 0; done < n;) {
    int64_t o = (first + done) / layout.inner, i = (first + done) % layout.inner;
    int64_t run = std::min({n - done, layout.inner - i, kBlock});
    const float* from = in.block((o * layout.channels + c) * layout.inner + i, run, buffer);
    std::memcpy(tile + done, from, run * sizeof(float));
    done += run;
  }
  return std::remove_if(tile, tile + n, [](float v) { return !(__builtin_fabsf(v) < __builtin_inff()); }) - tile;
}

}  // namespace

void range_search_out(Tensor x, Tensor scales, OptionalTensor zero_points, Tensor qrange, std::optional<int64_t> axis,
                      Tensor errors) {
  x = dense(x);
  Input in(x);
  Layout layout = layout_of(x, axis);
  Grid grid(scales, zero_points, {}, qrange, 0.0);
  const int64_t channels = layout.channels, count = scales.size(0);
  const int64_t padded = (count + kCandidatesAtOnce - 1) / kCandidatesAtOnce * kCandidatesAtOnce;
  const int64_t length = layout.outer * layout.inner, piece_size = kTile * kPieceTiles;
  const int64_t per_channel = channels ? (length + piece_size - 1) / piece_size : 0;
  std::vector<double> partial(channels * per_channel * padded, 0.0);

  torch::stable::parallel_for(0, channels * per_channel, 1, [&](int64_t begin, int64_t end) {
    std::vector<Candidate> candidates(padded, Candidate{1.0f, 1.0f, kMagic, kMagic});
    std::vector<float> tile(kTile);
    for (int64_t p = begin; p < end; ++p) {
      int64_t c = p / per_channel, start = p % per_channel * piece_size;
      for (int64_t k = 0; k < count; ++k) candidates[k] = make_candidate(grid.channel(k * channels + c));
      for (int64_t i = start; i < std::min(start + piece_size, length); i += kTile) {
        int64_t n = gather(in, layout, c, i, std::min(kTile, length - i), tile.data());
        for (int64_t k = 0; k < padded; k += kCandidatesAtOnce)
          loop(tile.data(), n, candidates.data() + k, partial.data() + p * padded + k);
      }
    }
  });

  float* out = errors.mutable_data_ptr<float>();
  for (int64_t k = 0; k < count; ++k)
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t p = c * per_channel; p < (c + 1) * per_channel; ++p) total += partial[p * padded + k];
      out[k * channels + c] = static_cast<float>(total);
    }
}

}  // namespace fastqat::cpu
