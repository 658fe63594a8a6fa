// range_search: squared errors of many candidate grids from one read of x.
#include "../range_search.h"

#include <cmath>

#include "borders.h"
#include "ops.h"
#include "reduce.h"

namespace fastqat::cpu {
namespace {

constexpr int64_t kTile = kBlock;   // elements that stay in the first-level cache while all candidates pass over them
constexpr int64_t kPieceTiles = 8;  // tiles of one piece of work; partial errors are kept per piece
constexpr int64_t kBinnedPiece = 65536;  // elements of one where they are brought into bins
constexpr int kCandidatesAtOnce = 4;     // independent sums hide the latency of the additions

// Adds the errors of kCandidatesAtOnce. No lane of float32 takes more than kTile / kLanes = 64 terms, none of them
// negative, so that the sum is within 68 * 2^-24 of that in float64, and the same on every instruction set. n <= kTile
FASTQAT_CLONES void loop(const float* x, int64_t n, const Candidate* c, double* errors) {
  double tile[kCandidatesAtOnce];
  double* const sums[kCandidatesAtOnce] = {&tile[0], &tile[1], &tile[2], &tile[3]};
  const Candidate a = c[0], b = c[1], d = c[2], e = c[3];
  auto square = [](float v) __attribute__((always_inline)) { return Product{v, v}; };
  reduce_span<Sum, kCandidatesAtOnce, true>(n, sums, [&](int64_t i) __attribute__((always_inline)) {
    return std::array<Product, kCandidatesAtOnce>{square(residual_of(x[i], a)), square(residual_of(x[i], b)),
                                                  square(residual_of(x[i], d)), square(residual_of(x[i], e))};
  });
  for (int k = 0; k < kCandidatesAtOnce; ++k) errors[k] += tile[k];
}

// Elements [first, last) of one channel, in memory order.
struct Part {
  const Input& in;
  const Layout& layout;
  int64_t channel, first, last;

  // f(x, n) for kTile of them at a time. tile: [kTile]
  template <class F>
  void tiles(float* tile, const F& f) const {
    for (int64_t i = first; i < last; i += kTile) {
      int64_t n = std::min(kTile, last - i);
      f(gather(i, n, tile), n);
    }
  }

 private:
  // n elements from the i-th on: in place where they lie together as float32, else in tile.
  const float* gather(int64_t i, int64_t n, float* tile) const {
    float buffer[kBlock];
    for (int64_t done = 0; done < n;) {
      int64_t o = (i + done) / layout.inner, at = (i + done) % layout.inner;
      int64_t run = std::min({n - done, layout.inner - at, in.dtype == ScalarType::Float ? kTile : kBlock});
      const float* from = in.block((o * layout.channels + channel) * layout.inner + at, run, buffer);
      if (run == n && from != buffer) return from;
      std::memcpy(tile + done, from, run * sizeof(float));
      done += run;
    }
    return tile;
  }
};

// Evaluates every candidate for every element. errors: [candidates]
void add_directly(const Part& part, const std::vector<Channel>& candidates, float* tile, double* errors) {
  const size_t padded = (candidates.size() + kCandidatesAtOnce - 1) / kCandidatesAtOnce * kCandidatesAtOnce;
  std::vector<Candidate> constants(padded, Candidate{1.0f, 1.0f, kMagic, kMagic});
  std::transform(candidates.begin(), candidates.end(), constants.begin(), make_candidate);
  std::vector<double> sums(padded, 0.0);
  part.tiles(tile, [&](const float* x, int64_t n) {
    n = std::copy_if(x, x + n, tile, [](float v) { return std::isfinite(v); }) - tile;
    for (size_t k = 0; k < padded; k += kCandidatesAtOnce) loop(tile, n, &constants[k], &sums[k]);
  });
  std::copy_n(sums.begin(), candidates.size(), errors);
}

// Brings every element into a bin; see borders.h.
void add_by_borders(const Part& part, const Borders& borders, const std::vector<Channel>& candidates, float* tile,
                    double* errors) {
  std::vector<Borders::Bin> bins(borders.size());
  double squares = 0.0;
  const float unit = borders.unit(candidates);
  part.tiles(tile, [&](const float* x, int64_t n) { borders.add(x, n, unit, bins.data(), squares); });
  borders.squared_errors(candidates, bins.data(), squares, errors);

  std::vector<Channel> unclear;
  std::vector<size_t> which;
  for (size_t k = 0; k < candidates.size(); ++k)
    if (std::isnan(errors[k])) unclear.push_back(candidates[k]), which.push_back(k);
  if (unclear.empty()) return;
  std::vector<double> found(unclear.size());
  add_directly(part, unclear, tile, found.data());
  for (size_t i = 0; i < which.size(); ++i) errors[which[i]] = found[i];
}

// The borders of these candidates, where sharing them among all channels saves time.
std::optional<Borders> worthwhile_borders(const std::vector<Channel>& candidates, int64_t channels, int64_t length) {
  const double pieces = std::ceil(static_cast<double>(length) / kBinnedPiece) * static_cast<double>(channels);
  const double directly = static_cast<double>(channels * length) * static_cast<double>(candidates.size());
  const double sorting = Borders::sorting_cost(candidates);
  if (sorting >= directly) return {};
  Borders borders(candidates);
  const double cost = sorting + pieces * borders.cost(std::min(length, kBinnedPiece));
  return borders.usable() && cost < directly ? std::optional(std::move(borders)) : std::nullopt;
}

}  // namespace

void range_search_out(Tensor x, Tensor scales, OptionalTensor zero_points, Tensor qrange, std::optional<int64_t> axis,
                      Tensor errors) {
  x = dense(x);
  Input in(x);
  Layout layout = layout_of(x, axis);
  Grid grid(scales, zero_points, {}, qrange, 0.0);
  const int64_t channels = layout.channels, count = scales.size(0), length = layout.outer * layout.inner;
  if (!channels || !count) return;
  auto candidates_of = [&](int64_t c) {
    std::vector<Channel> candidates(count);
    for (int64_t k = 0; k < count; ++k) candidates[k] = grid.channel(k * channels + c);
    return candidates;
  };
  std::optional<Borders> borders;
  if (const auto first = candidates_of(0); proportional(first, candidates_of(channels - 1)))  // so are most, most often
    borders = worthwhile_borders(first, channels, length);
  const int64_t piece_size = borders ? kBinnedPiece : kTile * kPieceTiles,
                per_channel = (length + piece_size - 1) / piece_size;
  std::vector<double> partial(channels * per_channel * count, 0.0);

  share_out(channels * per_channel, 1, [&](int64_t begin, int64_t end) {
    float tile[kTile];
    for (int64_t p = begin; p < end; ++p) {
      const int64_t c = p / per_channel, start = p % per_channel * piece_size;
      const Part part{in, layout, c, start, std::min(start + piece_size, length)};
      const std::vector<Channel> candidates = candidates_of(c);
      double* sums = partial.data() + p * count;
      if (borders && borders->serve(candidates))
        add_by_borders(part, *borders, candidates, tile, sums);
      else
        add_directly(part, candidates, tile, sums);
    }
  });

  float* out = errors.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t k = 0; k < count; ++k) {
      double total = 0.0;
      for (int64_t p = c * per_channel; p < (c + 1) * per_channel; ++p) total += partial[p * count + k];
      out[k * channels + c] = static_cast<float>(total);
    }
}

}  // namespace fastqat::cpu
