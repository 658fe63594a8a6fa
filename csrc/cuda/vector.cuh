// Arrays of elements of any type, read and written several at a time: up to 16 bytes an access.
#pragma once

#include "../elements.h"
#include "kernels.h"
#include "launch.cuh"

namespace fastqat::cuda {

// Elements that a thread takes at a time; see vector_of() of kernels.h.
template <class A, class B>
constexpr int kVectorOf = sizeof(A) == 4 && sizeof(B) == 4 ? 4 : 8;

template <int bytes>
struct alignas(bytes) Bits {
  uint32_t word[bytes / 4];
};
template <>
struct Bits<2> {
  uint16_t word;
};
template <>
struct Bits<1> {
  uint8_t word;
};

// One access for certain: of an assignment the compiler makes four where it loses sight of the alignment.
__device__ __forceinline__ void write_at_once(Bits<16>* to, const Bits<16>& bits) {
#ifdef __CUDA_ARCH__
  const uint32_t* w = bits.word;
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(w[0]), "r"(w[1]),
               "r"(w[2]), "r"(w[3])
               : "memory");
#else
  *to = bits;
#endif
}

template <class T, int n>
struct Vector {
  T v[n];
};

template <class T>
struct Array {
  T* data;

  template <int n>
  using Raw = Vector<T, n>;

  // Elements [i, i + n); where n > 1 they begin at a multiple of n * sizeof(T), 16 at most.
  template <int n>
  __device__ __forceinline__ Raw<n> load(int64_t i) const {
    using Access = Bits<(sizeof(T) * n > 16 ? 16 : sizeof(T) * n)>;
    constexpr int count = static_cast<int>(sizeof(T) * n / sizeof(Access));
    Access bits[count];
#pragma unroll
    for (int k = 0; k < count; ++k) bits[k] = reinterpret_cast<const Access*>(data + i)[k];
    Raw<n> result;
    __builtin_memcpy(&result, bits, sizeof(result));
    return result;
  }

  template <int n, bool kAtOnce = false>
  __device__ __forceinline__ void store(int64_t i, const Vector<float, n>& values) const {
    using Access = Bits<(sizeof(T) * n > 16 ? 16 : sizeof(T) * n)>;
    constexpr int count = static_cast<int>(sizeof(T) * n / sizeof(Access));
    Raw<n> raw;
#pragma unroll
    for (int k = 0; k < n; ++k) raw.v[k] = FromFloat<T>::convert(values.v[k]);
    Access bits[count];
    __builtin_memcpy(bits, &raw, sizeof(raw));
#pragma unroll
    for (int k = 0; k < count; ++k) {
      Access* const to = reinterpret_cast<Access*>(data + i) + k;
      if constexpr (kAtOnce)
        write_at_once(to, bits[k]);
      else
        *to = bits[k];
    }
  }

  __device__ __forceinline__ float get(int64_t i) const { return to_float(data[i]); }
  __device__ __forceinline__ void set(int64_t i, float value) const { data[i] = FromFloat<T>::convert(value); }
};

// Of a type that is known at run time, an element at a time: for what is rare.
struct Any {};

template <>
struct Array<Any> {
  void* data;
  Dtype dtype;

  template <int n>
  using Raw = Vector<float, n>;

  __device__ __forceinline__ float get(int64_t i) const {
    if (dtype == Dtype::float32) return Array<float>{static_cast<float*>(data)}.get(i);
    if (dtype == Dtype::bfloat16) return Array<BFloat16>{static_cast<BFloat16*>(data)}.get(i);
    return Array<Float16>{static_cast<Float16*>(data)}.get(i);
  }
  __device__ __forceinline__ void set(int64_t i, float value) const {
    if (dtype == Dtype::float32) return Array<float>{static_cast<float*>(data)}.set(i, value);
    if (dtype == Dtype::bfloat16) return Array<BFloat16>{static_cast<BFloat16*>(data)}.set(i, value);
    Array<Float16>{static_cast<Float16*>(data)}.set(i, value);
  }
  template <int n>
  __device__ __forceinline__ Raw<n> load(int64_t i) const {
    static_assert(n == 1);
    return {{get(i)}};
  }
  template <int n>
  __device__ __forceinline__ void store(int64_t i, const Vector<float, n>& values) const {
    static_assert(n == 1);
    set(i, values.v[0]);
  }
};

// The array of an entry's pointer, from element `base` on.
template <class T>
__device__ __forceinline__ Array<T> array(const void* data, Dtype, int64_t base) {
  return {static_cast<T*>(const_cast<void*>(data)) + base};
}
template <>
__device__ __forceinline__ Array<Any> array<Any>(const void* data, Dtype dtype, int64_t base) {
  const int size = dtype == Dtype::float32 ? 4 : 2;
  return {static_cast<unsigned char*>(const_cast<void*>(data)) + base * size, dtype};
}

template <class T>
struct Type {
  using type = T;
};

// f(Type<X>, Type<Other>) for the types of x and of what is read or written with it; see the functions of kernels.h.
template <class F>
void with_dtypes(Dtype x, Dtype other, const F& f) {
  if (x == Dtype::bfloat16) return f(Type<BFloat16>(), Type<BFloat16>());
  if (x == Dtype::float16) return f(Type<Float16>(), Type<Float16>());
  if (other == Dtype::bfloat16) return f(Type<float>(), Type<BFloat16>());
  if (other == Dtype::float16) return f(Type<float>(), Type<Float16>());
  f(Type<float>(), Type<float>());
}

}  // namespace fastqat::cuda
