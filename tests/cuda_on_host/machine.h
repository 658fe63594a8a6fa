// Runs the blocks of a kernel on one CPU thread: each thread of a block is a fiber, which runs until it waits for
// others.
//
// A schedule says which thread goes on, and in which order blocks are taken. What CUDA leaves undefined is an error
// here: a barrier that not all threads of a block reach, an exchange among lanes of which one does not come, a write
// outside of shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace fastqat::cuda_on_host {

using Place = std::source_location;
constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr unsigned kVotes = kWarp;  // in the place of a lane: which lanes have a value other than 0

// What a thread waits for: all of its block (mask 0), or the lanes of its warp in a mask, each with a value.
struct Wait {
  const char* what = nullptr;
  Place place;
  uint32_t mask = 0;
  uint64_t value = 0;   // what it brings, and then what it gets
  unsigned source = 0;  // the lane whose value it wants, or kVotes
};

// Runs a kernel; call(arguments) is one thread of it. Throws what is wrong with it.
void run(const char* kernel, int64_t blocks, int threads, void (*call)(const void*), const void* arguments);

// The rest is for the thread that runs.

// Leaves the kernel for good. What its threads hold is not destroyed: they hold nothing.
[[noreturn]] void fail(const std::string& what);

// Waits for all threads of the block, or for the lanes of a mask; returns what it gets from them.
uint64_t meet(const Wait& wait);

// In a random order, lets another thread go first, often of another block: here blocks learn from each other. The
// fixed orders hold threads back as long as they can anyway.
void interrupt();

// Memory of the block, all ones at first; the same for the same type.
void* shared(const void* type, size_t size);

unsigned lane();

}  // namespace fastqat::cuda_on_host
