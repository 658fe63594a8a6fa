// Small kernels, right and wrong, by which the tests judge the machine itself.
#include <array>
#include <stdexcept>

#include "launch.cuh"

namespace fastqat::cuda {
namespace {

constexpr int kThreads = 256;

struct Numbers {
  float of[kThreads];
};

// y[t] = x[t + rounds], cyclically, by as many turns through shared memory. `left_out`: one barrier of the two
template <int left_out>
__global__ void turn(const float* x, float* y, int rounds) {
  const int t = threadIdx.x;
  auto& shared_numbers = shared<Numbers>();
  float v = x[t];
  for (int k = 0; k < rounds; ++k) {
    shared_numbers.of[t] = v;
    if (left_out != 1) __syncthreads();
    v = shared_numbers.of[(t + 1) % kThreads];
    if (left_out != 2) __syncthreads();
  }
  y[t] = v;
}

// y[g] = the sum of x over all blocks, by the block that comes last: a loop over the grid, atomics, and a ticket.
template <bool kBarrier>
__global__ void sum_by_the_last(const int* x, unsigned* parts, unsigned* arrived, int* y, int n) {
  struct Ticket {
    unsigned value;
  };
  auto& ticket = shared<Ticket>();
  for (int piece = blockIdx.x; piece * kThreads < n; piece += gridDim.x) {
    const int i = piece * kThreads + threadIdx.x;
    if (i < n) atomicAdd(&parts[piece], static_cast<unsigned>(x[i]));
  }
  __threadfence();
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) ticket.value = atomicAdd(arrived, 1u);
  __syncthreads();
  if (ticket.value != gridDim.x - 1 || threadIdx.x != 0) return;
  for (int piece = 0; piece * kThreads < n; ++piece) *y += static_cast<int>(parts[piece]);
}

// y[t] = what a shuffle of t + 100 gives, of the kind and with the operand and width given.
__global__ void shuffle(float* y, int kind, int operand, int width) {
  const float v = threadIdx.x + 100.0f;
  y[threadIdx.x] = kind == 0   ? __shfl_sync(0xffffffffu, v, operand, width)
                   : kind == 1 ? __shfl_down_sync(0xffffffffu, v, operand, width)
                               : __shfl_xor_sync(0xffffffffu, v, operand, width);
}

// 64 bits, a ballot, and a barrier of half a warp.
__global__ void exchanges(unsigned long long* y) {
  const unsigned t = threadIdx.x;
  struct Lanes {
    unsigned of[32];
  };
  auto& lanes = shared<Lanes>();
  unsigned long long wide = __shfl_xor_sync(0xffffffffu, (1ull << 40) + t, 1);
  unsigned odd = __ballot_sync(0xffffffffu, t % 2), low = 0;
  lanes.of[t] = t;
  if (t < 16) {
    __syncwarp(0xffffu);
    low = lanes.of[15 - t];
  }
  y[t] = wide + (t == 0 ? odd : 0) + low;
}

// Mistakes by number. y: [32], 4 bytes behind an address that 16 divides
__global__ void mistake(float* y, int number) {
  const unsigned t = threadIdx.x;
  struct alignas(16) Four {
    float of[4];
  };
  auto& numbers = shared<Numbers>();
  if (number == 0 && t < 20) __syncthreads();
  if (number == 1) {
    if (t == 7) return;
    __syncthreads();
  }
  if (number == 2) {
    if (t % 2)
      __syncthreads();
    else
      __syncthreads();
  }
  if (number == 3 && t != 9) y[t] = __shfl_down_sync(0xffffffffu, 1.0f, 1);
  if (number == 4) y[t] = __shfl_sync(0x0000ffffu, 1.0f, 0);
  if (number == 5) y[t] = __shfl_xor_sync(0xffffffffu, 1.0f, 1, 24);
  if (number == 6) numbers.of[t + kThreads] = 0.0f;
  if (number == 7) std::memset(numbers.of + kThreads - 31 + t, 0, 4);
  if (number == 8) *reinterpret_cast<Four*>(y) = Four{};
  if (number == 9) y[t] = static_cast<float>(1 << (t + 1));
  if (number == 10) shared<std::array<Numbers, 48>>();
  if (number == 11) y[t] = t < 16 ? __shfl_sync(0xffffu, 1.0f, 20) : numbers.of[t];  // not an error: poison
  if (number == 12) y[t] = t < 16 ? __shfl_sync(0xffffffffu, 1.0f, 0) : __shfl_sync(0xffffffffu, 1.0f, 0);
  if (number == 13 && t == 0) __syncwarp(0);
  if (number == 14 && t == 31) y[1 << 28] = 0.0f;
}

template <class F>
const char* error_of(const F& run) {
  static std::string message;
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace
}  // namespace fastqat::cuda

using namespace fastqat::cuda;

#define FASTQAT_PROBE extern "C" __attribute__((visibility("default"))) const char*

FASTQAT_PROBE probe_turn(const float* x, float* y, int rounds, int left_out) {
  return error_of([&] {
    launch("turn", left_out == 0 ? turn<0> : left_out == 1 ? turn<1> : turn<2>, 1, kThreads, nullptr, x, y, rounds);
  });
}
FASTQAT_PROBE probe_sum(const int* x, unsigned* parts, unsigned* arrived, int* y, int n, int blocks, int barrier) {
  return error_of([&] {
    launch("sum_by_the_last", barrier ? sum_by_the_last<true> : sum_by_the_last<false>, blocks, kThreads, nullptr, x,
           parts, arrived, y, n);
  });
}
FASTQAT_PROBE probe_shuffle(float* y, int kind, int operand, int width) {
  return error_of([&] { launch("shuffle", shuffle, 1, 32, nullptr, y, kind, operand, width); });
}
FASTQAT_PROBE probe_exchanges(unsigned long long* y) {
  return error_of([&] { launch("exchanges", exchanges, 1, 32, nullptr, y); });
}
FASTQAT_PROBE probe_mistake(float* y, int number) {
  return error_of([&] { launch("mistake", mistake, 1, 32, nullptr, y, number); });
}
FASTQAT_PROBE probe_launch(int64_t blocks, int threads) {
  return error_of([&] { launch("nothing", +[](int) {}, blocks, threads, nullptr, 0); });
}
