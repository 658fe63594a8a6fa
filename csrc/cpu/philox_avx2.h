// Philox4x32-10 with AVX2, for loops that are compiled for it and chosen at run time.
#pragma once

#include "../math.h"

namespace fastqat::cpu {

// Of four counters each, that go through the rounds together: a round takes five instructions that wait for each other.
constexpr int kRegisters = 3;

}  // namespace fastqat::cpu

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FASTQAT_AVX2 __attribute__((target("avx2,fma")))
#define FASTQAT_AVX2_INLINE __attribute__((target("avx2,fma"), always_inline)) inline

#include <immintrin.h>

namespace fastqat::cpu {

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// philox() of neighbouring counters, four in a register: each of the four words in the lower halves of its 64-bit
// lanes, for the one instruction that multiplies 32-bit numbers to 64-bit ones, which g++ does not find. The upper
// halves are anything.
//
// Only the first word of these counters differs. So half of what the first two rounds multiply is the same for all,
// and the first product grows by the same from counter to counter.
class PhiloxAvx2 {
 public:
  // Counters from `block` up to the next multiple of 2^32.
  FASTQAT_AVX2_INLINE PhiloxAvx2(uint64_t seed, uint64_t block, uint32_t step, uint32_t tensor_id) {
    Philox same{{0, static_cast<uint32_t>(block >> 32), step, tensor_id}};
    same.next(seed, 0);
    first2_ = spread(same.lane[2]);
    second0_ = spread(same.lane[1] ^ Philox::key0(seed, 1));
    same.next(seed, 1);
    second2_ = spread(same.lane[2]);
    third2_ = spread(same.lane[3] ^ Philox::key1(seed, 2));
    for (uint32_t round = 0; round < Philox::kRounds; ++round) {
      keys0_[round] = spread(Philox::key0(seed, round));
      keys1_[round] = spread(Philox::key1(seed, round));
    }
    last0_ = _mm256_slli_epi64(keys0_[Philox::kRounds - 1], 32);
    last1_ = _mm256_slli_epi64(keys1_[Philox::kRounds - 1], 32);
    const __m256i low = _mm256_add_epi64(spread(static_cast<uint32_t>(block)), _mm256_set_epi64x(3, 1, 2, 0));
    product_ = _mm256_mul_epu32(low, spread(Philox::kFactor0));
  }

  // The 16 words of each of the next registers of counters, in order.
  FASTQAT_AVX2_INLINE void next(__m256i (&words)[kRegisters][2]) {
    const __m256i factor0 = spread(Philox::kFactor0), factor1 = spread(Philox::kFactor1);
    __m256i c[kRegisters][4];
    for (auto& [c0, c1, c2, c3] : c) {
      c1 = _mm256_mul_epu32(_mm256_xor_si256(_mm256_srli_epi64(product_, 32), first2_), factor1);
      c2 = _mm256_xor_si256(product_, second2_);
      product_ = _mm256_add_epi64(product_, _mm256_set1_epi64x(int64_t{4} * Philox::kFactor0));
    }
    for (auto& [c0, c1, c2, c3] : c) {
      c0 = _mm256_xor_si256(_mm256_srli_epi64(c1, 32), second0_);
      c3 = _mm256_mul_epu32(c0, factor0);
      const __m256i p1 = _mm256_mul_epu32(c2, factor1);
      c0 = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), with_key(c1, keys0_[2]));
      c2 = _mm256_xor_si256(_mm256_srli_epi64(c3, 32), third2_);
      c1 = p1;
    }
#pragma GCC unroll 8
    for (uint32_t round = 3; round < Philox::kRounds - 1; ++round)
      for (auto& [c0, c1, c2, c3] : c) {
        const __m256i p0 = _mm256_mul_epu32(c0, factor0), p1 = _mm256_mul_epu32(c2, factor1);
        c0 = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), with_key(c1, keys0_[round]));
        c2 = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), with_key(c3, keys1_[round]));
        c1 = p1;
        c3 = p0;
        asm volatile("" : "+x"(c0), "+x"(c1), "+x"(c2), "+x"(c3));  // see with_key()
      }
    for (int part = 0; part < kRegisters; ++part) last_round(c[part], words[part]);
  }

 private:
  static FASTQAT_AVX2_INLINE __m256i spread(uint32_t word) { return _mm256_set1_epi64x(word); }

  // The words of three registers of counters, the factors and one result fill 15 of the 16 registers. g++ would hold
  // keys in them too, and begin the next register's round before it ends this one's; what then goes through memory
  // takes longer than a third register of counters gains.
  static FASTQAT_AVX2_INLINE __m256i with_key(__m256i word, const __m256i& key) {
    asm("vpxor %1, %0, %0" : "+x"(word) : "m"(key));
    return word;
  }

  // The last round leaves the first and the third word in the upper halves, beside the second and the fourth: a product
  // is both. The counters lie in the order 0, 2, 1, 3, so that words are exchanged within halves of a register alone.
  FASTQAT_AVX2_INLINE void last_round(const __m256i (&c)[4], __m256i (&words)[2]) const {
    const __m256i p0 = _mm256_mul_epu32(c[0], spread(Philox::kFactor0));
    const __m256i p1 = _mm256_mul_epu32(c[2], spread(Philox::kFactor1));
    const __m256i words10 = _mm256_xor_si256(p1, with_key(_mm256_slli_epi64(c[1], 32), last0_));
    const __m256i words32 = _mm256_xor_si256(p0, with_key(_mm256_slli_epi64(c[3], 32), last1_));
    const __m256 a = _mm256_castsi256_ps(words10), b = _mm256_castsi256_ps(words32);
    words[0] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(0, 1, 0, 1)));
    words[1] = _mm256_castps_si256(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 3, 2, 3)));
  }

  __m256i product_;                              // of the first word and its factor
  __m256i first2_, second0_, second2_, third2_;  // what the words of that number are xored with in that round
  __m256i keys0_[Philox::kRounds], keys1_[Philox::kRounds], last0_, last1_;
};

}  // namespace fastqat::cpu
#endif
