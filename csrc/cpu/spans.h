// How a dense tensor is cut into work: spans of neighbouring elements, each with its channels.
//
// Rows: the inner dimension is long; a span lies in one channel (Uniform).
// Columns: the inner dimension is short; a span covers neighbouring (channel, inner) columns of one outer row.
// The cut depends on the tensor alone, never on the number of threads; so do the partial results of reductions.
#pragma once

#include <vector>

#include "elements.h"
#include "threads.h"

namespace fastqat::cpu {

constexpr int64_t kChunk = 8192;       // elements of one piece of work in a row, if nothing else is said
constexpr int64_t kRowsPerChunk = 64;  // outer rows of one piece of work on columns
constexpr int64_t kShortestRow = 8;    // shorter rows are handled as columns
constexpr int64_t kGrain = 16384;      // elements that are worth a thread

// The same channel for every element of a span.
struct Uniform {
  static constexpr bool kRow = true;
  Channel ch;
  bool fast;
  Channel operator[](int64_t) const { return ch; }
};

// One channel per element of a span, as arrays. scale, ...: [kBlock]
struct Columns {
  static constexpr bool kRow = false;
  const float *scale, *reciprocal, *low, *high, *shift, *below, *above;
  bool fast;
  inline __attribute__((always_inline)) Channel operator[](int64_t i) const {
    return {scale[i], reciprocal[i], low[i], high[i], shift[i], below[i], above[i]};
  }
};

struct ColumnTable {
  float field[7][kBlock];
  Columns columns;

  // Channels of columns [first, first + n), each channel `inner` columns wide.
  ColumnTable(const Grid& grid, int64_t first, int64_t n, int64_t inner) {
    bool fast = true;
    for (int64_t i = 0; i < n; ++i) {
      Channel ch = grid.channel((first + i) / inner);
      const float values[7] = {ch.scale, ch.reciprocal, ch.low, ch.high, ch.shift, ch.below, ch.above};
      for (int f = 0; f < 7; ++f) field[f][i] = values[f];
      fast = fast && is_fast_scale(ch.scale);
    }
    columns = {field[0], field[1], field[2], field[3], field[4], field[5], field[6], fast};
  }
};

// How a layout is cut; `pieces` are numbered in memory order of (row, chunk) or (row block, column tile).
struct Cut {
  Layout layout;
  int64_t chunk;  // elements of a piece in a row
  bool by_rows;
  int64_t rows, length;     // length of a row: inner, or channels * inner columns
  int64_t per_row, pieces;  // pieces of a row (of a block of rows), and in total

  explicit Cut(const Layout& l, int64_t chunk_ = kChunk) : layout(l), chunk(chunk_) {
    by_rows = l.channels == 1 || l.inner >= kShortestRow;
    if (l.channels == 1) layout = {1, 1, l.numel()};
    rows = by_rows ? layout.outer * layout.channels : layout.outer;
    length = by_rows ? layout.inner : layout.channels * layout.inner;
    per_row = (length + step() - 1) / step();
    pieces = by_rows ? rows * per_row : (rows + kRowsPerChunk - 1) / kRowsPerChunk * per_row;
  }

  int64_t step() const { return by_rows ? chunk : kBlock; }
  int64_t grain() const {
    int64_t size = std::min(length, step()) * (by_rows ? 1 : std::min(rows, kRowsPerChunk));
    return std::max<int64_t>(1, kGrain / std::max<int64_t>(size, 1));
  }
};

template <class F>
void parallel(const Cut& cut, const F& piece) {
  if (cut.layout.numel() == 0) return;
  share_out(cut.pieces, cut.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) piece(p);
  });
}

// The pieces of many tensors, shared among threads by work. Job: cut(), and piece(p), which any thread may call.
template <class Job>
void parallel_jobs(std::vector<Job>& jobs) {
  struct Start {
    size_t job;
    int64_t piece;
  };
  std::vector<Start> starts;  // of tasks with about kGrain elements each
  double done = kGrain;
  for (size_t j = 0; j < jobs.size(); ++j) {
    const Cut& cut = jobs[j].cut();
    int64_t pieces = cut.layout.numel() ? cut.pieces : 0;
    double size = pieces ? static_cast<double>(cut.layout.numel()) / static_cast<double>(pieces) : 0.0;
    for (int64_t p = 0; p < pieces; ++p) {
      if (done >= kGrain) {
        starts.push_back({j, p});
        done = 0.0;
      }
      done += size;
    }
  }
  const int64_t tasks = static_cast<int64_t>(starts.size());
  starts.push_back({jobs.size(), 0});
  share_out(tasks, 1, [&](int64_t begin, int64_t end) {
    const Start stop = starts[end];
    for (size_t j = starts[begin].job; j <= stop.job && j < jobs.size(); ++j) {
      const Cut& cut = jobs[j].cut();
      int64_t p = j == starts[begin].job ? starts[begin].piece : 0;
      int64_t last = j == stop.job ? stop.piece : cut.layout.numel() ? cut.pieces : 0;
      for (; p < last; ++p) jobs[j].piece(p);
    }
  });
}

// f(offset, n, channels) for every span of piece p, in order; n <= longest, channels is Uniform or Columns.
template <class F>
void spans_of_piece(const Cut& cut, const Grid& grid, int64_t p, int64_t longest, const F& f) {
  // Divisions only where they are needed; three of them for each of 512 rows of 72 elements were 2 us of 14.
  int64_t row = cut.per_row == 1 ? p : p / cut.per_row, start = (p - row * cut.per_row) * cut.step();
  int64_t stop = std::min(start + cut.step(), cut.length);
  if (cut.by_rows) {
    Channel ch = grid.channel(row < cut.layout.channels ? row : row % cut.layout.channels);
    Uniform uniform{ch, is_fast_scale(ch.scale)};
    for (int64_t i = start; i < stop; i += longest) f(row * cut.length + i, std::min(longest, stop - i), uniform);
  } else {
    ColumnTable table(grid, start, stop - start, cut.layout.inner);
    int64_t last = std::min(cut.rows, (row + 1) * kRowsPerChunk);
    for (int64_t r = row * kRowsPerChunk; r < last; ++r) f(r * cut.length + start, stop - start, table.columns);
  }
}

// f(offset, n) for the blocks of piece p of a tensor with one scale, in order; n <= longest.
template <class F>
void blocks_of_piece(const Cut& cut, int64_t p, int64_t longest, const F& f) {
  const int64_t stop = std::min((p + 1) * cut.step(), cut.length);
  for (int64_t i = p * cut.step(); i < stop; i += longest) f(i, std::min(longest, stop - i));
}

// The instance of a kernel loop template <bool kFast, bool kOffset, class Channels> for one span.
#define FASTQAT_PICK(loop, channels, offset_grid)                                          \
  ((channels).fast ? ((offset_grid) ? loop<true, true, std::decay_t<decltype(channels)>>   \
                                    : loop<true, false, std::decay_t<decltype(channels)>>) \
                   : ((offset_grid) ? loop<false, true, std::decay_t<decltype(channels)>>  \
                                    : loop<false, false, std::decay_t<decltype(channels)>>))

// An op that maps each element of one tensor to the element of another with the same layout.
template <class PickLoop>
void map_elements(const Tensor& from, const Tensor& to, std::optional<int64_t> axis, const Grid& grid,
                  const PickLoop& pick_loop) {
  const Input in(from);
  const Output out(to);
  const Cut cut(layout_of(from, axis));
  parallel(cut, [&](int64_t p) {
    spans_of_piece(cut, grid, p, kBlock, [&](int64_t offset, int64_t n, const auto& channels) {
      float buffer_in[kBlock], buffer_out[kBlock];
      float* result = out.block(offset, buffer_out);
      pick_loop(channels)(in.block(offset, n, buffer_in), result, n, channels);
      out.commit(offset, n, result);
    });
  });
}

}  // namespace fastqat::cpu
