// philox_uniform: counter-based uniform numbers, the same on every backend and for any number of threads.
#include "elements.h"
#include "noise.h"
#include "ops.h"
#include "philox_avx2.h"
#include "threads.h"

namespace fastqat::cpu {
namespace {

constexpr int64_t kStep = 16 * kRegisters;

// uniform() of the words of the next counters, up to a multiple of 2^32. n: a multiple of kStep; u: [n]
#ifdef FASTQAT_AVX2
__attribute__((target("default")))
#endif
void draw_counters(uint64_t seed, uint64_t block, uint32_t step, uint32_t tensor_id, float* u, int64_t n) {
  for (int64_t i = 0; i < n; i += 4) {
    const Philox numbers = philox(seed, block + static_cast<uint64_t>(i / 4), step, tensor_id);
    for (int lane = 0; lane < 4; ++lane) u[i + lane] = uniform(numbers.lane[lane]);
  }
}

#ifdef FASTQAT_AVX2
FASTQAT_AVX2 void draw_counters(uint64_t seed, uint64_t block, uint32_t step, uint32_t tensor_id, float* u, int64_t n) {
  PhiloxAvx2 numbers(seed, block, step, tensor_id);
  for (int64_t i = 0; i < n; i += kStep) {
    __m256i words[kRegisters][2];
    numbers.next(words);
    for (int k = 0; k < 2 * kRegisters; ++k) {
      const __m256 bits = _mm256_cvtepi32_ps(_mm256_srli_epi32(words[k / 2][k % 2], 8));
      _mm256_storeu_ps(u + i + 8 * k, _mm256_mul_ps(bits, _mm256_set1_ps(0x1p-24f)));
    }
  }
}
#endif

}  // namespace

void Uniforms::draw(int64_t first, int64_t n, float* u) const {
  constexpr int64_t kSpan = int64_t{4} << 32;  // numbers of the counters whose upper word is the same
  for (int64_t done = 0; done < n;) {
    const int64_t at = first + done, length = std::min(n - done, kSpan - at % kSpan);
    const int64_t whole = length / kStep * kStep, rest = length - whole;
    const uint64_t block = static_cast<uint64_t>(at / 4);
    draw_counters(seed, block, step, tensor_id, u + done, whole);
    if (rest > 0) {
      float last[kStep];
      draw_counters(seed, block + static_cast<uint64_t>(whole / 4), step, tensor_id, last, kStep);
      std::memcpy(u + done + whole, last, rest * sizeof(float));
    }
    done += length;
  }
}

void philox_uniform_out(Tensor step, int64_t seed, int64_t tensor_id, int64_t numel, Tensor u) {
  float* out = u.mutable_data_ptr<float>();
  const Uniforms uniforms(seed, step, tensor_id);
  share_out((numel + kBlock - 1) / kBlock, 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock;
    uniforms.draw(first, std::min(end * kBlock, numel) - first, out + first);
  });
}

}  // namespace fastqat::cpu
