// Squared errors of many candidate grids from the borders between their levels.
//
// With the level l of each of n elements on a grid of scale s,
//
//   sum (x - s l)^2  =  sum x^2  -  2 s sum x l  +  s^2 sum l^2,
//
// and l is `low` plus the number of borders s (j - 1/2), low < j <= high, that lie below x. With X(b) and N(b), the sum
// and the number of the elements above b,
//
//   sum x l  =  low sum x  +  sum over j of X(s (j - 1/2))
//   sum l^2  =  low^2 n  +  sum over j of (2 j - 1) N(s (j - 1/2)).
//
// The borders of all candidates cut the line into bins. An element is added to its bin, once, instead of being
// quantized by each candidate; X and N are sums over bins. Everything that is summed is float64, where the difference
// keeps enough digits; where it does not, squared_errors() says so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../math.h"

namespace fastqat::cpu {

// Whether the scales of b are those of a times a factor, and the levels the same.
bool proportional(const std::vector<Channel>& a, const std::vector<Channel>& b);

// The borders of the candidate grids of one channel, in units of one of their scales: proportional candidates share
// them.
class Borders {
 public:
  // candidates: [count]. Not usable() where a scale is extreme, or not a number.
  explicit Borders(const std::vector<Channel>& candidates);

  bool usable() const { return !cells_.empty(); }

  // Whether they are the borders of these candidates.
  bool serve(const std::vector<Channel>& candidates) const { return proportional(candidates_, candidates); }

  // Time to bring n elements of a channel into bins and to read the errors from them, where one evaluation of one
  // candidate grid for one element takes 1; and to make these borders.
  double cost(int64_t n) const;
  static double sorting_cost(const std::vector<Channel>& candidates);

  // An interval of the line; all have one width. The bin in which it begins, and the upper end of that.
  struct Cell {
    uint32_t bin;
    float edge;
  };

  // Sum and number of elements.
  typedef double Bin __attribute__((vector_size(16)));

  // Adds the finite ones of n elements to the bins and to squares, the sum of x^2. x: [n]; bins: [size()]
  void add(const float* x, int64_t n, float unit, Bin* bins, double& squares) const;

  int64_t size() const { return static_cast<int64_t>(edges_.size()); }

  // The scale in whose units an element of a channel is compared with the borders.
  float unit(const std::vector<Channel>& candidates) const { return candidates[reference_].scale; }

  // errors: [count], NaN where too few digits are left. Destroys the bins.
  void squared_errors(const std::vector<Channel>& candidates, Bin* bins, double squares, double* errors) const;

 private:
  void find_cells(float first, float last);

  std::vector<Channel> candidates_;
  size_t reference_ = 0;             // the candidate with the largest scale
  std::vector<float> edges_;         // distinct borders in ascending order, and infinity: the upper ends of the bins
  std::vector<uint32_t> bin_above_;  // of each border of each candidate, in ascending order
  float lowest_ = 0;                 // of all levels
  std::vector<Bin> weights_;         // for each level j above it: 1, 2 j - 1
  std::vector<Cell> cells_;
  float first_ = 0, density_ = 0;  // the first cell begins there; cells to a unit
  int steps_ = 0;                  // borders in a cell, at most
};

}  // namespace fastqat::cpu
