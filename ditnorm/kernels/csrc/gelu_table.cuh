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

// Of two int16 each.
__device__ __forceinline__ uint32_t larger_signed_halves(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __vmaxs2(a, b);
#else
  return larger_halves(a ^ 0x80008000u, b ^ 0x80008000u) ^ 0x80008000u;
#endif
}

__device__ __forceinline__ uint32_t smaller_signed_halves(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __vmins2(a, b);
#else
  return smaller_halves(a ^ 0x80008000u, b ^ 0x80008000u) ^ 0x80008000u;
#endif
}

// Twice a half of a word and `more`: one instruction.
__device__ __forceinline__ int twice_low_half(uint32_t word, int more) {
#ifdef __CUDA_ARCH__
  return __dp2a_lo(static_cast<int>(word), 0x0002, more);
#else
  return 2 * static_cast<int16_t>(word) + more;
#endif
}
__device__ __forceinline__ int twice_high_half(uint32_t word, int more) {
#ifdef __CUDA_ARCH__
  return __dp2a_lo(static_cast<int>(word), 0x0200, more);
#else
  return 2 * static_cast<int16_t>(word >> 16) + more;
#endif
}

// GELU of the bfloat16 numbers between -4096 and 4096, as bits, each where the bits of its argument
// say: an address is twice these, as a number with a sign. Negative ones that are closer to 0 than
// 2**-25 aren't in it, and nothing is between the others and the positive ones. At 73 KB it fits
// three times into the shared memory of a multiprocessor of Hopper (launched_with).
class GeluTable {
 public:
  // By all threads of the block; another barrier has to follow.
  __device__ __forceinline__ void fill() {
    constexpr uint32_t kPositive = kEnd / 8, kGroups = kPositive + (kEnd - kLeastNegative) / 8;
    for (uint32_t i = threadIdx.x; i < kGroups; i += blockDim.x) {
      const bool negative = i >= kPositive;
      const uint32_t place = negative ? kLeastNegative + (i - kPositive) * 8 : i * 8;
      if (place < kTiny || (place >= kLeast && place < kMost)) continue;
      const uint32_t step = negative && place >= kMost ? 0 : 1;
      const uint32_t first = (negative ? kNegative : 0) | (step == 0 ? 0 : place < kLeast ? place - kHalf : place);
      const auto two = [&](uint32_t j) { return (first + j * step) | (first + (j + 1) * step) << 16; };
      *reinterpret_cast<uint4*>(&results_[index(place, negative)]) = uint4{two(0), two(2), two(4), two(6)};
    }
    constexpr uint32_t kComputed = kMost - kLeast;
    for (uint32_t i = threadIdx.x; i < 2 * kComputed + kTiny; i += blockDim.x) {
      const bool negative = i >= kComputed + kTiny;
      const uint32_t place = negative ? i - kComputed - kTiny + kLeast : i < kTiny ? i : i - kTiny + kLeast;
      results_[index(place, negative)] = bits_of_half(gelu(float_of((place | (negative ? kNegative : 0)) << 16)));
    }
  }

  // Of numbers that all are in the table.
  template <int N>
  __device__ __forceinline__ void of(float (&y)[N], const Pack<__nv_bfloat16, N>& x) const {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t word;
      __builtin_memcpy(&word, &x.v[j], sizeof word);
      y[j] = float_of(at(twice_low_half(word, kZero)) << 16), y[j + 1] = float_of(at(twice_high_half(word, kZero)) << 16);
    }
  }

  // Of one of them that is positive, as the bits of a float, as its argument is.
  __device__ __forceinline__ uint32_t of_bits(uint32_t bits) const { return at(twice_high_half(bits, kZero)) << 16; }

  // Of any. Beyond the table x is multiplied by 0, 1/2 or 1.
  template <int N>
  __device__ __forceinline__ Pack<__nv_bfloat16, N> of_any(const Pack<__nv_bfloat16, N>& x) const {
    float y[N];
    to_floats(y, x);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const uint32_t bits = bits_of(y[j]) >> 16, place = bits & (kNegative - 1u);
      const bool inside = place < kEnd && (bits < kNegative || place >= kLeastNegative);
      const float factor = place < kEnd ? 1.0f : bits < kNegative ? 2.0f : 0.0f;
      const uint32_t result = at(inside ? twice_low_half(bits, kZero) : kZero) << 16;
      y[j] = inside ? float_of(result) : __fmul_rn(__fmul_rn(0.5f, y[j]), factor);
    }
    return from_floats<__nv_bfloat16, N>(y);
  }

  // The largest of a thread's numbers.
  class Largest {
   public:
    template <int N>
    __device__ __forceinline__ void take(const Pack<__nv_bfloat16, N>& x) {
#pragma unroll
      for (int j = 0; j < N; j += 2) {
        uint32_t word;
        __builtin_memcpy(&word, &x.v[j], sizeof word);
        most_ = larger_signed_halves(most_, word), least_ = larger_halves(least_, word);
        closest_ = smaller_signed_halves(closest_, word);
      }
    }

    // As the bits of a float: 0 where none is positive, kOutside where one isn't in the table.
    __device__ __forceinline__ uint32_t bits() const {
      const auto most = larger(static_cast<int32_t>(most_ << 16), static_cast<int32_t>(most_ & 0xffff0000u));
      const uint32_t least = larger(least_ << 16, least_ & 0xffff0000u);
      const int32_t low = static_cast<int32_t>(closest_ << 16) >> 16, high = static_cast<int32_t>(closest_) >> 16;
      const bool outside = most >= static_cast<int32_t>(kEnd << 16) || least >= (kNegative | kEnd) << 16 ||
                           -larger(-low, -high) < static_cast<int32_t>(kLeastNegative) - static_cast<int32_t>(kNegative);
      return outside ? kOutside : static_cast<uint32_t>(larger(most, 0));
    }

   private:
    template <class V>
    static __device__ __forceinline__ V larger(V a, V b) {
      return a < b ? b : a;
    }

    // Of halves with a sign the largest is the largest number and the least the negative one that is
    // closest to 0; of those without a sign the largest is the least number. NaN is beyond all others
    // of its sign.
    uint32_t most_ = 0, least_ = 0, closest_ = 0;
  };
  static constexpr uint32_t kOutside = 0xffffffffu;

  // A row's largest |GELU| is that of its largest number where that is 0.3125 or more: those of
  // negative numbers are below 0.18, and above it each bfloat16's is larger than the one's before by
  // more than float32 rounds.
  static constexpr uint32_t kTelling = 0x3ea00000u;

 private:
  static constexpr uint32_t kNegative = 0x8000;
  static constexpr uint32_t kEnd = 0x4580, kLeastNegative = 0x3300;  // the bits of 4096 and 2**-25
  // Below 2**-10 GELU is x / 2 once it is rounded, whose bits are less by kHalf but in the lowest
  // binades, which are computed. From 8 on it is x, or -0.
  static constexpr uint32_t kHalf = 0x80, kTiny = 2 * kHalf, kLeast = 0x3a80, kMost = 0x4100;
  static constexpr int kZero = 2 * (kNegative - kLeastNegative);  // the address of 0's

  static __device__ constexpr uint32_t index(uint32_t place, bool negative) {
    return negative ? place - kLeastNegative : place + (kNegative - kLeastNegative);
  }
  static __device__ __forceinline__ uint16_t bits_of_half(float v) {
    const __nv_bfloat16 half = from_float<__nv_bfloat16>(v);
    uint16_t bits;
    __builtin_memcpy(&bits, &half, sizeof bits);
    return bits;
  }
  __device__ __forceinline__ uint32_t at(int byte) const {
    return *reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(results_) + byte);
  }

  alignas(16) uint16_t results_[kNegative - kLeastNegative + kEnd];
};

}  // namespace ditnorm
