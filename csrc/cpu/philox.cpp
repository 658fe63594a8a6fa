// philox_uniform: counter-based uniform numbers, the same on every backend and for any number of threads.
#include "elements.h"
#include "noise.h"
#include "ops.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FASTQAT_AVX2_AT_RUN_TIME
#include <immintrin.h>
#endif

namespace fastqat::cpu {
namespace {

// philox() of n counters, a multiple of 8. u: [4 * n]
#ifdef FASTQAT_AVX2_AT_RUN_TIME
__attribute__((target("default")))
#endif
void draw_counters(uint64_t seed, uint64_t block, uint32_t step, uint32_t tensor_id, float* u, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Philox numbers = philox(seed, block + static_cast<uint64_t>(i), step, tensor_id);
    for (int lane = 0; lane < 4; ++lane) u[4 * i + lane] = uniform(numbers.lane[lane]);
  }
}

#ifdef FASTQAT_AVX2_AT_RUN_TIME
// uniform() of four counters, each in the lower halves of the same 64-bit lane of four registers. u: [16]
__attribute__((target("avx2"), always_inline)) inline void store_uniforms(const __m256i (&c)[4], float* u) {
  const __m256i first = _mm256_blend_epi32(c[0], _mm256_slli_epi64(c[1], 32), 0xaa);
  const __m256i second = _mm256_blend_epi32(c[2], _mm256_slli_epi64(c[3], 32), 0xaa);
  const __m256i even = _mm256_unpacklo_epi64(first, second), odd = _mm256_unpackhi_epi64(first, second);
  const __m256i ordered[2] = {_mm256_permute2x128_si256(even, odd, 0x20), _mm256_permute2x128_si256(even, odd, 0x31)};
  for (int half = 0; half < 2; ++half) {
    const __m256 bits = _mm256_cvtepi32_ps(_mm256_srli_epi32(ordered[half], 8));
    _mm256_storeu_ps(u + 8 * half, _mm256_mul_ps(bits, _mm256_set1_ps(0x1p-24f)));
  }
}

// The same, four counters in a register and two registers at a time, with the one instruction that multiplies 32-bit
// numbers to 64-bit ones; g++ does not find it, and takes twice as long. The upper half of a 64-bit lane is anything.
__attribute__((target("avx2"))) void draw_counters(uint64_t seed, uint64_t block, uint32_t step, uint32_t tensor_id,
                                                   float* u, int64_t n) {
  const __m256i factor0 = _mm256_set1_epi64x(Philox::kFactor0), factor1 = _mm256_set1_epi64x(Philox::kFactor1);
  __m256i keys0[Philox::kRounds], keys1[Philox::kRounds];
  for (uint32_t round = 0; round < Philox::kRounds; ++round) {
    keys0[round] = _mm256_set1_epi64x(Philox::key0(seed, round));
    keys1[round] = _mm256_set1_epi64x(Philox::key1(seed, round));
  }
  for (int64_t i = 0; i < n; i += 8) {
    __m256i c[2][4];
    for (int part = 0; part < 2; ++part) {
      const int64_t first = static_cast<int64_t>(block) + i + 4 * part;
      c[part][0] = _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_set_epi64x(3, 2, 1, 0));
      c[part][1] = _mm256_srli_epi64(c[part][0], 32);
      c[part][2] = _mm256_set1_epi64x(step);
      c[part][3] = _mm256_set1_epi64x(tensor_id);
    }
#pragma GCC unroll 10
    for (uint32_t round = 0; round < Philox::kRounds; ++round)
      for (auto& [c0, c1, c2, c3] : c) {
        const __m256i p0 = _mm256_mul_epu32(c0, factor0), p1 = _mm256_mul_epu32(c2, factor1);
        c0 = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1, keys0[round]));
        c2 = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3, keys1[round]));
        c1 = p1;
        c3 = p0;
      }
    for (int part = 0; part < 2; ++part) store_uniforms(c[part], u + 4 * (i + 4 * part));
  }
}
#endif

}  // namespace

void Uniforms::draw(int64_t first, int64_t n, float* u) const {
  constexpr int64_t kStep = 32;  // numbers of 8 counters
  const uint64_t block = static_cast<uint64_t>(first / 4);
  const int64_t whole = n / kStep * kStep, rest = n - whole;
  draw_counters(seed, block, step, tensor_id, u, whole / 4);
  if (rest == 0) return;
  float last[kStep];
  draw_counters(seed, block + static_cast<uint64_t>(whole / 4), step, tensor_id, last, kStep / 4);
  std::memcpy(u + whole, last, rest * sizeof(float));
}

void philox_uniform_out(Tensor step, int64_t seed, int64_t tensor_id, int64_t numel, Tensor u) {
  float* out = u.mutable_data_ptr<float>();
  const Uniforms uniforms(seed, step, tensor_id);
  torch::stable::parallel_for(0, (numel + kBlock - 1) / kBlock, 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock;
    uniforms.draw(first, std::min(end * kBlock, numel) - first, out + first);
  });
}

}  // namespace fastqat::cpu
