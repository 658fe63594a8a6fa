// Many tensors in one launch: their entries travel as an argument of the kernel, so that nothing is kept on the device
// between launches, and a captured graph holds what it needs.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "launch.cuh"

namespace fastqat::cuda {

// Entries of a launch: 53 weights are a MobileNetV2, 54 a ResNet-50. The arguments of a kernel may have 32764 bytes
// since CUDA 12.1, and 4096 before.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kMost = 15;
constexpr size_t kMostBytes = 4096;
#else
constexpr int kMost = 60;
constexpr size_t kMostBytes = 32764;
#endif
constexpr int kBlocksEach = 8;  // blocks for each multiprocessor: as many as may reside, and more

template <class Entry, int kCapacity>
struct Table {
  int32_t count;
  int32_t pieces;
  int32_t starts[kCapacity];  // first piece of each entry
  Entry entries[kCapacity];

  // Index of the entry that has this piece.
  __device__ __forceinline__ int find(int piece) const {
    int low = 0, high = count;
    while (high - low > 1) {
      int middle = (low + high) / 2;
      (starts[middle] <= piece ? low : high) = middle;
    }
    return low;
  }
};

// start(table, blocks) for tables of kCapacity entries at most, in order.
template <int kCapacity, class Entry, class Start>
void for_each_table(const Entry* entries, int count, const Start& start) {
  const int64_t most_blocks = static_cast<int64_t>(multiprocessors()) * kBlocksEach;
  static_assert(sizeof(Table<Entry, kCapacity>) <= kMostBytes);
  for (int first = 0; first < count; first += kCapacity) {
    Table<Entry, kCapacity> table;
    table.count = std::min(kCapacity, count - first);
    int64_t pieces = 0;
    for (int i = 0; i < table.count; ++i) {
      table.entries[i] = entries[first + i];
      table.starts[i] = static_cast<int32_t>(pieces);
      pieces += counted(table.entries[i].cut.pieces());
      counted(pieces);
    }
    table.pieces = static_cast<int32_t>(pieces);
    if (pieces) start(table, std::min(pieces, most_blocks));
  }
}

}  // namespace fastqat::cuda
