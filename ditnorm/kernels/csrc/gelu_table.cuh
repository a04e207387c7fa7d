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

// Twice a half of a word: one instruction.
__device__ __forceinline__ uint32_t twice_low_half(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __dp2a_lo(word, 0x0002u, 0u);
#else
  return 2 * (word & 0xffffu);
#endif
}
__device__ __forceinline__ uint32_t twice_high_half(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __dp2a_lo(word, 0x0200u, 0u);
#else
  return 2 * (word >> 16);
#endif
}

// GELU of the bfloat16 numbers between -4096 and 4096, as bits, each where the bits of its argument
// say: an address is twice these. Nothing is between the positive and the negative ones. At 99 KB
// it fits twice into the shared memory of a multiprocessor of Hopper, and once into that of any
// (launched_with).
class GeluTable {
 public:
  // By all threads of the block; another barrier has to follow.
  __device__ __forceinline__ void fill() {
    constexpr uint32_t kGroups = kEnd / 8;
    for (uint32_t i = threadIdx.x; i < 2 * kGroups; i += blockDim.x) {
      const uint32_t sign = i < kGroups ? 0 : kNegative, place = (i < kGroups ? i : i - kGroups) * 8;
      if (place < kTiny || (place >= kLeast && place < kMost)) continue;
      const uint32_t step = sign != 0 && place >= kMost ? 0 : 1;
      const uint32_t first = sign | (step == 0 ? 0 : place < kLeast ? place - kHalf : place);
      const auto two = [&](uint32_t j) { return (first + j * step) | (first + (j + 1) * step) << 16; };
      *reinterpret_cast<uint4*>(&results_[sign | place]) = uint4{two(0), two(2), two(4), two(6)};
    }
    constexpr uint32_t kComputed = kTiny + kMost - kLeast;
    for (uint32_t i = threadIdx.x; i < 2 * kComputed; i += blockDim.x) {
      const uint32_t sign = i < kComputed ? 0 : kNegative, place = i < kComputed ? i : i - kComputed;
      const uint32_t bits = sign | (place < kTiny ? place : place - kTiny + kLeast);
      results_[bits] = bits_of_half(gelu(float_of(bits << 16)));
    }
  }

  // Of numbers that all are in the table.
  template <int N>
  __device__ __forceinline__ void of(float (&y)[N], const Pack<__nv_bfloat16, N>& x) const {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t word;
      __builtin_memcpy(&word, &x.v[j], sizeof word);
      y[j] = float_of(at(twice_low_half(word)) << 16), y[j + 1] = float_of(at(twice_high_half(word)) << 16);
    }
  }

  // Of one of them, as the bits of a float, as its argument is.
  __device__ __forceinline__ uint32_t of_bits(uint32_t bits) const { return at(bits >> 16 << 1) << 16; }

  // Of any.
  template <int N>
  __device__ __forceinline__ Pack<__nv_bfloat16, N> of_any(const Pack<__nv_bfloat16, N>& x) const {
    Pack<__nv_bfloat16, N> y;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      uint16_t bits;
      __builtin_memcpy(&bits, &x.v[j], sizeof bits);
      const uint32_t magnitude = bits & (kNegative - 1u);
      const uint32_t beyond = bits < kNegative ? bits : magnitude < kInfinity ? kNegative : kNaNs;
      bits = static_cast<uint16_t>(magnitude < kEnd ? at(2u * bits) : beyond);
      __builtin_memcpy(&y.v[j], &bits, sizeof bits);
    }
    return y;
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
      }
    }

    // As the bits of a float: 0 where none is positive, kOutside where one isn't in the table.
    __device__ __forceinline__ uint32_t bits() const {
      const auto most = larger(static_cast<int32_t>(most_ << 16), static_cast<int32_t>(most_ & 0xffff0000u));
      const uint32_t least = larger(least_ << 16, least_ & 0xffff0000u);
      const bool outside = most >= static_cast<int32_t>(kEnd << 16) || least >= (kNegative | kEnd) << 16;
      return outside ? kOutside : static_cast<uint32_t>(larger(most, 0));
    }

   private:
    template <class V>
    static __device__ __forceinline__ V larger(V a, V b) {
      return a < b ? b : a;
    }

    // Of halves with a sign the largest is the largest number, of those without one the least; NaN
    // is beyond all others of its sign.
    uint32_t most_ = 0, least_ = 0;
  };
  static constexpr uint32_t kOutside = 0xffffffffu;

  // A row's largest |GELU| is that of its largest number where that is 0.5 or more: those of negative
  // numbers are below 0.18, and above it each bfloat16's is larger than the one's before by more than
  // float32 rounds.
  static constexpr uint32_t kTelling = 0x3f000000u;

 private:
  static constexpr uint32_t kNegative = 0x8000, kInfinity = 0x7f80, kNaNs = 0x7fff;
  static constexpr uint32_t kEnd = 0x4580;  // the bits of 4096
  // Below 2**-10 GELU is x / 2 once it is rounded, whose bits are less by kHalf but in the lowest
  // binades, which are computed. From 8 on it is x, or -0.
  static constexpr uint32_t kHalf = 0x80, kTiny = 2 * kHalf, kLeast = 0x3a80, kMost = 0x4100;

  static __device__ __forceinline__ uint16_t bits_of_half(float v) {
    const __nv_bfloat16 half = from_float<__nv_bfloat16>(v);
    uint16_t bits;
    __builtin_memcpy(&bits, &half, sizeof bits);
    return bits;
  }
  __device__ __forceinline__ uint32_t at(uint32_t byte) const {
    return *reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(results_) + byte);
  }

  alignas(16) uint16_t results_[kNegative + kEnd];
};

}  // namespace ditnorm
