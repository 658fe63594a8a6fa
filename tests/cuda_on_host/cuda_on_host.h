// What csrc/cuda/*.cu take from CUDA, for a C++ compiler: CUDA's names over machine.h, and what launch.cuh promises.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace fastqat::cuda_on_host {

// What a lane gets of a number of 4 or 8 bytes: the value of lane `source`, or its own where none is `allowed`.
template <class T>
T exchange(const char* what, Place place, unsigned mask, int width, T v, unsigned source, bool allowed) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  if (!mask) fail(std::string(what) + ": the mask is empty");
  if (width < 1 || width > static_cast<int>(kWarp) || !std::has_single_bit(static_cast<unsigned>(width)))
    fail(std::string(what) + ": width " + std::to_string(width));
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(v));
  bits = meet({what, place, mask, bits, allowed ? source : lane()});
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

template <class T>
constexpr bool kAtomic = std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;

// Other threads may come before it and after it.
template <class T, class F>
T atomically(T* at, const F& f) {
  static_assert(kAtomic<T>);
  interrupt();
  T before = *at;
  *at = f(before);
  interrupt();
  return before;
}

}  // namespace fastqat::cuda_on_host

inline void __syncthreads(std::source_location place = std::source_location::current()) {
  fastqat::cuda_on_host::meet({"__syncthreads", place});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, std::source_location place = std::source_location::current()) {
  fastqat::cuda_on_host::exchange("__syncwarp", place, mask, 32, 0, 0, false);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location place = std::source_location::current()) {
  return fastqat::cuda_on_host::exchange("__ballot_sync", place, mask, 32, predicate ? 1u : 0u,
                                         fastqat::cuda_on_host::kVotes, true);
}

template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32,
              std::source_location place = std::source_location::current()) {
  const unsigned first = fastqat::cuda_on_host::lane() & -static_cast<unsigned>(width);
  return fastqat::cuda_on_host::exchange("__shfl_sync", place, mask, width, v, first + (lane & (width - 1)), true);
}

template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32,
                   std::source_location place = std::source_location::current()) {
  const unsigned source = fastqat::cuda_on_host::lane() + delta;
  const unsigned last = fastqat::cuda_on_host::lane() | (static_cast<unsigned>(width) - 1);
  return fastqat::cuda_on_host::exchange("__shfl_down_sync", place, mask, width, v, source, source <= last);
}

// Earlier groups of `width` lanes can be read as well, later ones not: so it is in CUDA.
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32,
                  std::source_location place = std::source_location::current()) {
  const unsigned source = fastqat::cuda_on_host::lane() ^ static_cast<unsigned>(bits);
  const unsigned last = fastqat::cuda_on_host::lane() | (static_cast<unsigned>(width) - 1);
  return fastqat::cuda_on_host::exchange("__shfl_xor_sync", place, mask, width, v, source, source <= last);
}

inline void __threadfence() {}  // nothing is reordered here, and blocks learn from each other by atomics

template <class T>
T atomicAdd(T* at, std::type_identity_t<T> v) {
  return fastqat::cuda_on_host::atomically(at, [v](T old) { return static_cast<T>(old + v); });
}
template <class T>
T atomicMin(T* at, std::type_identity_t<T> v) {
  return fastqat::cuda_on_host::atomically(at, [v](T old) { return v < old ? v : old; });
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> v) {
  return fastqat::cuda_on_host::atomically(at, [v](T old) { return v > old ? v : old; });
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> v) {
  return fastqat::cuda_on_host::atomically(at, [v](T old) { return static_cast<T>(old | v); });
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> v) {
  return fastqat::cuda_on_host::atomically(at, [v](T) { return v; });
}

inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __popc(unsigned v) { return std::popcount(v); }

namespace fastqat::cuda {

// The T of this block. Each type exists once in a kernel.
template <class T>
T& shared() {
  static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_default_constructible_v<T>);
  static const char type = 0;
  return *static_cast<T*>(cuda_on_host::shared(&type, sizeof(T)));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, void*,
            Arguments&&... arguments) {
  using Kept = std::tuple<void (*)(Parameters...), std::decay_t<Parameters>...>;
  const Kept kept(kernel, arguments...);
  auto call = [](const void* from) {
    std::apply([](auto run, const auto&... values) { run(values...); }, *static_cast<const Kept*>(from));
  };
  cuda_on_host::run(name, blocks, threads, call, &kept);
}

inline void set_to_zero(void* data, int64_t bytes, void*) { std::memset(data, 0, static_cast<size_t>(bytes)); }

inline int multiprocessors() { return 2; }

}  // namespace fastqat::cuda
