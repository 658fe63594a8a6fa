// A block of threads: what each of them waits for, which may run, and the block's shared memory.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "fiber.h"
#include "machine.h"

namespace fastqat::cuda_on_host {

constexpr size_t kFence = 256;
constexpr int kPoison = 0xff, kFenceByte = 0x77;

enum class Order : int { ascending, descending, random };

inline bool same(const Wait& a, const Wait& b) {
  return a.what == b.what && a.mask == b.mask && a.place.line() == b.place.line() &&
         a.place.column() == b.place.column() && a.place.file_name() == b.place.file_name();
}

// The memory behind shared<T>() of one block: poison between fences.
struct Shared {
  const void* type;
  size_t size;
  std::unique_ptr<char[]> memory;

  Shared(const void* type_, size_t size_) : type(type_), size(size_), memory(new char[size + 3 * kFence]) {
    std::memset(memory.get(), kFenceByte, size + 3 * kFence);
    std::memset(data(), kPoison, size);
  }
  char* data() const { return memory.get() + 2 * kFence - reinterpret_cast<uintptr_t>(memory.get()) % kFence; }
  bool is_fenced() const {
    auto fence = [](char byte) { return byte == kFenceByte; };
    return std::all_of(data() - kFence, data(), fence) && std::all_of(data() + size, data() + size + kFence, fence);
  }
};

struct Block;
struct Thread {
  Block* block;
  unsigned number;
  Fiber* fiber = nullptr;  // once it has begun
  bool ended = false, waits = false;
  Wait wait;
};

struct Block {
  unsigned number = 0, arrived = 0, ended = 0;
  Order order = Order::ascending;  // of its threads
  std::vector<Thread> threads;
  std::array<uint32_t, kMostThreads / kWarp> runnable{}, exchanging{};  // a bit for each lane of a warp
  std::vector<Shared> shared;

  bool alive() const { return ended < threads.size(); }

  void begin(unsigned number_, unsigned size, Order order_) {
    number = number_;
    order = order_;
    arrived = ended = 0;
    threads.clear();
    shared.clear();
    for (unsigned t = 0; t < size; ++t) {
      threads.push_back({.block = this, .number = t, .wait = {}});
      may_run(threads.back());
    }
  }

  void may_run(Thread& thread) {
    thread.waits = false;
    runnable[thread.number / kWarp] |= 1u << thread.number % kWarp;
  }

  // Takes a thread that can run: the first, the last, or the first from a random one on; null: there is none.
  Thread* take(unsigned random) {
    const unsigned warps = (static_cast<unsigned>(threads.size()) + kWarp - 1) / kWarp;
    for (unsigned k = 0; k < warps; ++k) {
      const unsigned w = order == Order::ascending    ? k
                         : order == Order::descending ? warps - 1 - k
                                                      : (random + k) % warps;
      if (!runnable[w]) continue;
      const unsigned turn = order == Order::random ? random / kMostThreads % kWarp : 0;
      const unsigned lane = order == Order::descending
                                ? 31 - std::countl_zero(runnable[w])
                                : (std::countr_zero(std::rotr(runnable[w], turn)) + turn) % kWarp;
      runnable[w] &= ~(1u << lane);
      return &threads[w * kWarp + lane];
    }
    return nullptr;
  }
};

}  // namespace fastqat::cuda_on_host
