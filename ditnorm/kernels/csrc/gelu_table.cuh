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

// A table of what GELU does to the bits of |x|, for x and for -x in the halves of a word: up to 2**-9
// it takes one from the exponent (x / 2), from 6 on nothing, or from a negative number all, so that
// all other numbers are looked up as the nearest of these. Two lanes of a warp share a copy in two
// memory banks of their own: at most two look-ups meet in a bank, where of one table three or four
// would.
class GeluCopies {
  static constexpr uint32_t kLeast = 0x3b00, kCount = 1472, kCopies = 16, kRow = 4 * kCopies;  // bits of a bfloat16; numbers; bytes
  static_assert(kCount % 32 == 0);

 public:
  struct Memory {
    alignas(16) uint32_t words[kCount][kCopies];
  };

  // `positive`: 0x5410, selects the results of two positive numbers. Were it known to ptxas, that
  // would make two instructions of the one that adds the signs.
  __device__ __forceinline__ GeluCopies(Memory& memory, uint32_t positive) : words_(memory.words), positive_(positive) {}

  // By all threads of the block; another barrier has to follow.
  __device__ __forceinline__ void fill() const {
    constexpr uint32_t kParts = kCopies / 4;
    for (uint32_t place = threadIdx.x; place < kCount; place += blockDim.x) {
      const uint32_t value = word(place + kLeast);
#pragma unroll
      for (uint32_t i = 0; i < kParts; ++i) {  // eight neighbours write to all banks
        *reinterpret_cast<uint4*>(&words_[place][(place / 2 + i) % kParts * 4]) = uint4{value, value, value, value};
      }
    }
  }

  // The largest magnitudes so far, as bits: of results and of arguments, two of each.
  struct Largest {
    uint32_t y = 0, x = 0;
  };

  // Wrong for what isn't finite, and for numbers below 2**-125, whose results are as small.
  template <int N>
  __device__ __forceinline__ Pack<__nv_bfloat16, N> of(const Pack<__nv_bfloat16, N>& x, Largest& largest) const {
    const uint32_t own = address() + threadIdx.x % kCopies * 4 - kLeast * kRow;
    Pack<__nv_bfloat16, N> y;
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      uint32_t magnitudes[2], results[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // two at a time, in the halves of a word
        uint32_t pair;
        __builtin_memcpy(&pair, &x.v[j + 2 * i], sizeof pair);
        const uint32_t magnitude = pair & 0x7fff7fffu;
        const uint32_t inside = smaller_halves(larger_halves(magnitude, twice(kLeast)), twice(kLeast + kCount - 1));
        const uint32_t low = at(half_times<kRow, 0>(inside, own)), high = at(half_times<kRow, 1>(inside, own));
        // The sign of each number says which half of its word to take.
        const uint32_t selector = (signs(pair) & 0x2222u) | positive_;
        const uint32_t result = add_or_zero(magnitude, select_bytes(low, high, selector));
        magnitudes[i] = magnitude, results[i] = result;
        pair = result | (pair & 0x80008000u);
        __builtin_memcpy(&y.v[j + 2 * i], &pair, sizeof pair);
      }
      largest.y = largest_halves(largest.y, results[0], results[1]);
      largest.x = largest_halves(largest.x, magnitudes[0], magnitudes[1]);
    }
    return y;
  }

 private:
  static __device__ constexpr uint32_t twice(uint32_t half) { return half * 0x10001u; }

  // For the number with these bits.
  static __device__ __forceinline__ uint32_t word(uint32_t bits) {
    const auto change = [&](uint32_t sign) {
      const uint32_t result = bits_of(round_to<__nv_bfloat16>(gelu(float_of((sign << 15 | bits) << 16)))) >> 16 & 0x7fffu;
      return result == 0 ? 0x8001u : (result - bits) & 0xffffu;
    };
    return change(0) | change(1) << 16;
  }

#ifdef __CUDA_ARCH__
  // In shared memory, so that no sum of two addresses is needed.
  __device__ __forceinline__ uint32_t address() const { return shared_address(words_); }
  __device__ __forceinline__ uint32_t at(uint32_t address) const {
    uint32_t word;
    asm("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
    return word;
  }
#else
  uint32_t address() const { return 0; }
  uint32_t at(uint32_t byte) const { return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(words_) + byte); }
#endif

  // HALF of `pair` times FACTOR, and `more`.
  template <uint32_t FACTOR, int HALF>
  static __device__ __forceinline__ uint32_t half_times(uint32_t pair, uint32_t more) {
#ifdef __CUDA_ARCH__
    return __dp2a_lo(pair, FACTOR << 8 * HALF, more);
#else
    return (pair >> 16 * HALF & 0xffffu) * FACTOR + more;
#endif
  }

  // In the two low bytes, the signs of the halves, eight times each.
  static __device__ __forceinline__ uint32_t signs(uint32_t pair) {
#ifdef __CUDA_ARCH__
    uint32_t both;
    asm("prmt.b32 %0, %1, %1, 0xb9;" : "=r"(both) : "r"(pair));
    return both;
#else
    return (pair >> 15 & 1) * 0xffu | (pair >> 31) * 0xff00u;
#endif
  }

  // Of two uint16 each.
  static __device__ __forceinline__ uint32_t largest_halves(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
    return __vimax3_u16x2(a, b, c);
#else
    return larger_halves(larger_halves(a, b), c);
#endif
  }

  // Of two int16 each.
  static __device__ __forceinline__ uint32_t add_or_zero(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    return __viaddmax_s16x2(a, b, 0);
#else
    const auto sum = [&](int shift) {
      const int both = static_cast<int16_t>(a >> shift) + static_cast<int16_t>(b >> shift);
      return static_cast<uint32_t>(both < 0 ? 0 : both) << shift;
    };
    return sum(0) | sum(16);
#endif
  }

  uint32_t (&words_)[kCount][kCopies];
  const uint32_t positive_;
};

}  // namespace ditnorm
