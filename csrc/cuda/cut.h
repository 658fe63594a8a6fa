// How a dense tensor is cut into pieces, each the work of one block of threads. No torch, no CUDA header.
//
// A tensor is [outer, channels, inner] in memory. A group of channels is finished together, from its `parts` pieces in
// their order; the cut depends on the tensor alone, so that sums have the same bits for any number of blocks.
//   rows     a row [inner] has one channel, and 2^lane_bits threads. Rows that are short: a piece has `width`
//   neighbouring
//            rows. Rows that are long: a piece has up to kPiece elements of one.
//   columns  for a short inner dimension: a piece has the columns (channel, inner) of `width` channels, a thread for
//            each, and `depth` outer rows.
#pragma once

#include <stdexcept>

#include "../layout.h"

namespace fastqat::cuda {

constexpr int kThreadBits = 8, kThreads = 1 << kThreadBits;  // of a block
constexpr int kWarpBits = 5, kWarp = 1 << kWarpBits;
constexpr int kPiece = 4096;            // elements of a piece, about
constexpr int64_t kLongRow = 1024;      // longer rows have a block of their own
constexpr int64_t kShortestRow = 8;     // shorter rows are handled as columns
constexpr int64_t kShortestRows = 512;  // as are those of so few channels that a piece would have no more elements
constexpr int64_t kPeeledRow = 64;      // rows this long take vectors even where they do not begin at one
constexpr int64_t kMostPieces = 1 << 30;
constexpr int64_t kMostColumns = 1 << 18;  // so that elements of a piece are counted in 32 bits

struct Cut {
  int64_t outer, inner;
  int32_t channels;
  int32_t groups;  // 1 at least, so that a tensor of no elements has its step, too
  int32_t parts;   // 1 at least, so that sums over nothing are written, too
  int32_t by_columns;
  int32_t width;      // channels of a group
  int32_t per_row;    // pieces of a row
  int32_t depth;      // outer rows of a piece by columns
  int32_t lane_bits;  // 2^lane_bits threads share a row
  int32_t vectors;    // whether they take several elements at a time

  constexpr int64_t pieces() const { return static_cast<int64_t>(groups) * parts; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pieces are counted in 32 bits, which is enough for 2^42 elements.
inline int32_t counted(int64_t number) {
  if (number > kMostPieces) throw std::runtime_error("fastqat: a tensor with too many elements for one launch");
  return static_cast<int32_t>(number);
}

// vector: elements that a thread takes at a time; aligned: whether memory allows it.
inline Cut make_cut(Layout layout, int64_t vector, bool aligned) {
  if (layout.channels == 1) layout = {1, 1, layout.numel()};
  const auto [outer, channels, inner] = layout;
  const int32_t count = counted(channels);
  Cut cut{outer, inner, count, count, 1, 0, 1, 1, 1, kThreadBits, aligned};
  int64_t parts = outer;
  if (inner > kLongRow || channels == 1) {
    cut.per_row = counted(std::max<int64_t>(1, ceil_div(inner, kPiece)));
    parts = outer * cut.per_row;
  } else if (outer > 1 && inner <= kThreads && channels * inner <= kMostColumns &&
             (inner < kShortestRow || channels * inner < kShortestRows)) {
    cut.by_columns = 1;
    cut.width = std::max<int32_t>(1, std::min<int32_t>(count, kThreads / std::max<int64_t>(inner, 1)));
    cut.depth = static_cast<int32_t>(std::max<int64_t>(1, kPiece / std::max<int64_t>(cut.width * inner, 1)));
    cut.groups = counted(ceil_div(channels, cut.width));
    parts = ceil_div(outer, cut.depth);
  } else {
    cut.vectors = aligned && (inner % vector == 0 || inner >= kPeeledRow);
    cut.width = static_cast<int32_t>(std::min<int64_t>(std::max(count, 1), kPiece / std::max<int64_t>(inner, 1)));
    cut.groups = counted(ceil_div(channels, cut.width));
    int64_t wanted = ceil_div(inner, cut.vectors ? vector : 1);
    for (cut.lane_bits = 0; (1 << cut.lane_bits) < wanted && cut.lane_bits < kWarpBits;) ++cut.lane_bits;
  }
  cut.groups = std::max(1, cut.groups);
  cut.parts = counted(std::max<int64_t>(1, parts));
  counted(cut.pieces());
  return cut;
}

// How range_search cuts a tensor, whose elements take so long that a piece may be small, and its sums so much memory
// that there must not be too many.
struct SearchCut {
  int64_t size;     // elements of a part of a channel
  int32_t parts;    // of a channel
  int32_t sharing;  // warps for each part, a power of two, all of a block where there are several; 0: one thread
  int32_t pieces;   // each the work of one block, unless it is one of threads
};

constexpr int kHeld = 16;  // elements that a thread holds
constexpr int kTile = 32 * kHeld;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kSearchPieces = 2048;

inline SearchCut make_search_cut(const Layout& layout) {
  const int64_t length = layout.outer * layout.inner, channels = counted(layout.channels);
  if (length <= kHeld) return {kHeld, 1, 0, counted(channels)};
  const int64_t most = std::max<int64_t>(1, kSearchPieces / std::max<int64_t>(1, channels));
  const int64_t size = ceil_div(ceil_div(length, std::min(most, ceil_div(length, kPiece))), kTile) * kTile;
  SearchCut cut{size, counted(ceil_div(length, size)), 1, 0};
  while (cut.sharing < kWarps && cut.sharing * kTile < length) cut.sharing *= 2;
  cut.pieces = counted(ceil_div(channels, kWarps / cut.sharing) * cut.parts);
  return cut;
}

}  // namespace fastqat::cuda
