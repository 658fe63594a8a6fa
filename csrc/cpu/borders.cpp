// The candidates of range_search by the borders between their levels; see borders.h.
#include "borders.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "elements.h"

namespace fastqat::cpu {
namespace {

constexpr float kSame = 0x1p-20f;  // borders, and scales, that differ by less, relatively, are one
constexpr size_t kMostCells = 1 << 15;

// As Borders::cost() counts; measured on AVX2. Sorting is done by one thread, the rest by all.
constexpr double kPerElement = 15.0, kPerBin = 7.0, kPerBorder = 5.0, kToSortOne = 1500.0;

// What of a sum of squares may be left of a difference for its digits to be trusted.
constexpr double kDigits = 1e-7;

struct Border {
  float value;
  uint32_t number;
};

bool close(float a, float b) { return std::fabs(a - b) <= kSame * std::fabs(b); }

// That of NaN is the first.
FASTQAT_INLINE int32_t cell_of(float v, float first, float density, float last) {
  float cell = (v - first) * density;
  cell = cell > 0.0f ? cell : 0.0f;
  return static_cast<int32_t>(cell < last ? cell : last);
}

// cells[i]: that of x[i] / unit, which is scaled[i]; returns the sum of x^2.
FASTQAT_CLONES double find_cells_of(const float* x, int64_t n, float reciprocal, float first, float density, float last,
                                    float* scaled, int32_t* cells) {
  double squares = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    scaled[i] = x[i] * reciprocal;
    cells[i] = cell_of(scaled[i], first, density, last);
  }
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return squares;
}

// bins[i]: where x[i] belongs. kSteps: the most borders in a cell, or 0 for any number.
template <int kSteps>
void find_bins_of(const float* scaled, const int32_t* cells, int64_t n, const Borders::Cell* line, const float* edges,
                  int32_t* bins) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; ++i) {
    const Borders::Cell& cell = line[cells[i]];
    uint32_t bin = cell.bin + (scaled[i] > cell.edge ? 1 : 0);
    for (int step = 1; step < kSteps; ++step) bin += scaled[i] > edges[bin] ? 1 : 0;
    while (!kSteps && scaled[i] > edges[bin]) ++bin;
    bins[i] = static_cast<int32_t>(bin);
  }
}

// A loop of its own: where the address of a store is not yet known, the loads behind it wait.
void add_to_bins(const float* x, const int32_t* which, int64_t n, Borders::Bin* bins) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; ++i) bins[which[i]] += Borders::Bin{x[i], 1.0};
}

}  // namespace

bool proportional(const std::vector<Channel>& a, const std::vector<Channel>& b) {
  const float factor = b[0].scale / a[0].scale;
  bool same = true;
  for (size_t k = 0; k < a.size(); ++k)
    same = same & is_fast_scale(b[k].scale) & close(b[k].scale, a[k].scale * factor) & (a[k].low == b[k].low) &
           (a[k].high == b[k].high);
  return same;
}

Borders::Borders(const std::vector<Channel>& candidates) : candidates_(candidates) {
  for (size_t k = 0; k < candidates.size(); ++k) {
    if (!is_fast_scale(candidates[k].scale) || !(candidates[k].low < candidates[k].high)) return;
    if (candidates[k].scale > candidates[reference_].scale) reference_ = k;
  }
  lowest_ = std::min_element(candidates.begin(), candidates.end(), [](const Channel& a, const Channel& b) {
              return a.low < b.low;
            })->low;
  for (int j = 0; j < 512; ++j) weights_.push_back(Bin{1.0, 2.0 * (lowest_ + j) + 1.0});
  const float unit = candidates[reference_].scale;
  std::vector<Border> borders;
  for (const Channel& ch : candidates)
    for (float level = ch.low + 1.0f; level <= ch.high; level += 1.0f)
      borders.push_back({ch.scale / unit * (level - 0.5f), static_cast<uint32_t>(borders.size())});
  std::sort(borders.begin(), borders.end(), [](const Border& a, const Border& b) { return a.value < b.value; });
  bin_above_.resize(borders.size());
  for (const Border& border : borders) {
    if (edges_.empty() || !close(border.value, edges_.back())) edges_.push_back(border.value);
    bin_above_[border.number] = static_cast<uint32_t>(edges_.size());
  }
  const float first = edges_.front(), last = edges_.back();
  edges_.push_back(std::numeric_limits<float>::infinity());
  find_cells(first, last);
}

// The fewest cells with at most one border in each, if kMostCells are enough.
void Borders::find_cells(float first, float last) {
  first_ = first;
  for (size_t count = 256; cells_.empty() || (steps_ > 1 && count <= kMostCells); count *= 2) {
    if (count < edges_.size()) continue;
    density_ = last > first ? static_cast<float>(count) / (last - first) : 0.0f;
    std::vector<int> within(count, 0);
    for (size_t e = 0; e + 1 < edges_.size(); ++e) ++within[cell_of(edges_[e], first_, density_, count - 1.0f)];
    steps_ = *std::max_element(within.begin(), within.end());
    cells_.resize(count);
    uint32_t bin = 0;
    for (size_t c = 0; c < count; ++c) {
      cells_[c] = {bin, edges_[bin]};
      bin += within[c];
    }
  }
}

double Borders::cost(int64_t n) const {
  return kPerElement * static_cast<double>(n) + kPerBin * static_cast<double>(edges_.size()) +
         kPerBorder * static_cast<double>(bin_above_.size());
}

double Borders::sorting_cost(const std::vector<Channel>& candidates) {
  double borders = 0.0;
  for (const Channel& ch : candidates) borders += ch.high - ch.low;
  return kToSortOne * borders;
}

void Borders::add(const float* x, int64_t n, float unit, Bin* bins, double& squares) const {
  float finite[kBlock], scaled[kBlock];
  int32_t cells[kBlock], which[kBlock];
  const float last = static_cast<float>(cells_.size()) - 1.0f;
  for (int64_t i = 0; i < n; i += kBlock) {
    const float* block = x + i;
    int64_t m = std::min(kBlock, n - i);
    double sum = find_cells_of(block, m, 1.0f / unit, first_, density_, last, scaled, cells);
    if (!std::isfinite(sum)) {
      m = std::copy_if(block, block + m, finite, [](float v) { return std::isfinite(v); }) - finite;
      block = finite;
      sum = find_cells_of(block, m, 1.0f / unit, first_, density_, last, scaled, cells);
    }
    squares += sum;
    auto find_bins = steps_ <= 1 ? find_bins_of<1> : steps_ == 2 ? find_bins_of<2> : find_bins_of<0>;
    find_bins(scaled, cells, m, cells_.data(), edges_.data(), which);
    add_to_bins(block, which, m, bins);
  }
}

void Borders::squared_errors(const std::vector<Channel>& candidates, Bin* bins, double squares, double* errors) const {
  for (size_t b = edges_.size() - 1; b-- > 0;) bins[b] += bins[b + 1];  // now of all above the lower end of the bin
  const Bin all = bins[0];
  const uint32_t* edge = bin_above_.data();
  for (size_t k = 0; k < candidates.size(); ++k) {
    const double low = candidates[k].low, high = candidates[k].high, scale = candidates[k].scale;
    const int64_t borders = static_cast<int64_t>(high - low);
    const Bin* weights = weights_.data() + static_cast<int64_t>(low - lowest_);
    Bin sums = {low * all[0], low * low * all[1]}, others = {};  // side by side: an addition waits for the last one
    int64_t i = 0;
    for (; i + 2 <= borders; i += 2) {
      sums += weights[i] * bins[edge[i]];
      others += weights[i + 1] * bins[edge[i + 1]];
    }
    if (i < borders) sums += weights[i] * bins[edge[i]];
    edge += borders;
    sums += others;
    const double error = squares - scale * (2.0 * sums[0] - scale * sums[1]);
    errors[k] = error > kDigits * squares || squares == 0.0 ? error : std::numeric_limits<double>::quiet_NaN();
  }
}

}  // namespace fastqat::cpu
