// GELU, computed, or looked up in shared memory.
#pragma once
#include "activations.cuh"
#include "quantize.cuh"

namespace ditnorm {

template <bool GELU, class T, int N>
__device__ __forceinline__ Pack<T, N> activated(const Pack<T, N>& x) {
  if constexpr (!GELU) return x;
  float v[N];
  to_floats(v, x);
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = gelu(v[j]);
  return from_floats<T, N>(v);
}

// GELU of the bfloat16 numbers from 2**-13 up to 16 and of their negatives, as bits. Others, of
// which there are few, are computed.
class GeluTable {
 public:
  // By all threads of the block; another barrier has to follow.
  __device__ __forceinline__ void fill() {
    for (uint32_t i = threadIdx.x; i < 2 * kCount; i += blockDim.x) {
      const uint32_t sign = i < kCount ? 0 : 1, place = i - sign * kCount;
      results_[sign * kNegative + place] = bits_of_half(gelu(float_of((sign << 15 | (place + kLeast)) << 16)));
    }
  }

  template <int N>
  __device__ __forceinline__ Pack<__nv_bfloat16, N> of(const Pack<__nv_bfloat16, N>& x) const {
    Pack<__nv_bfloat16, N> y;
    uint32_t outside = 0;
#pragma unroll
    for (int j = 0; j < N; j += 2) {  // two at a time, in the halves of a word
      uint32_t word;
      __builtin_memcpy(&word, &x.v[j], sizeof word);
      const uint32_t magnitude = word & 0x7fff7fffu;
      const uint32_t inside = smaller_halves(larger_halves(magnitude, twice(kLeast)), twice(kLeast + kCount - 1));
      outside |= magnitude ^ inside;
      const uint32_t bytes = (inside + inside - 2 * twice(kLeast)) | (word >> 2 & twice(2 * kNegative));
      word = at(bytes & 0xffffu) | at(bytes >> 16) << 16;
      __builtin_memcpy(&y.v[j], &word, sizeof word);
    }
    return unlikely(outside != 0) ? activated<true>(x) : y;
  }

 private:
  static constexpr uint32_t kLeast = 114 << 7, kCount = 17 << 7;  // of the bits of a positive one
  static constexpr uint32_t kNegative = 0x1000;                   // the sign, moved
  static_assert(kNegative >= kCount);

  static __device__ constexpr uint32_t twice(uint32_t half) { return half * 0x10001u; }
  static __device__ __forceinline__ uint16_t bits_of_half(float v) {
    const __nv_bfloat16 half = from_float<__nv_bfloat16>(v);
    uint16_t bits;
    __builtin_memcpy(&bits, &half, sizeof bits);
    return bits;
  }
  __device__ __forceinline__ uint32_t at(uint32_t byte) const {
    return *reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(results_) + byte);
  }

  uint16_t results_[kNegative + kCount];
};

}  // namespace ditnorm
