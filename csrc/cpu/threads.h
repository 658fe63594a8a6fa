// Work shared among threads.
#pragma once

#include <atomic>
#include <vector>

#include "../torch_api.h"

namespace fastqat::cpu {

// f(begin, end) for ranges of up to `grain` numbers that together are [0, n), in any order.
//
// Every thread has a share of neighbours, and when it is done with it helps the others with theirs: a thread that other
// programs hold up, or on a slower core, does not hold up the rest.
template <class F>
void share_out(int64_t n, int64_t grain, const F& f) {
  struct alignas(64) Share {  // a cache line each
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t count = std::min<int64_t>(torch::stable::get_num_threads(), (n + grain - 1) / grain);
  std::vector<Share> shares(count);
  for (int64_t t = 0; t < count; ++t) {
    shares[t].next.store(t * n / count, std::memory_order_relaxed);
    shares[t].end = (t + 1) * n / count;
  }
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {  // all of them where there is one thread
    for (int64_t k = first; k < last + count - 1; ++k) {
      Share& share = shares[k % count];
      for (int64_t i; (i = share.next.fetch_add(grain, std::memory_order_relaxed)) < share.end;)
        f(i, std::min(i + grain, share.end));
    }
  });
}

}  // namespace fastqat::cpu
