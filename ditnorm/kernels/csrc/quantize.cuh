// Quantising a row that lies in the registers of a block: the laws of ditnorm/ops/quantization.py,
// rounding for rounding as ATen computes them on CUDA.
#pragma once
#include "numerics.cuh"
#include "quantize.h"
#include "unroll.cuh"

namespace ditnorm {

constexpr int kMaxWarps = 32;

// ATen multiplies by the reciprocal of a divisor that is the same for all elements.
constexpr float kFloat8Reciprocal = static_cast<float>(1.0 / 448.0), kInt8Reciprocal = static_cast<float>(1.0 / 127.5);
constexpr float kInt8Eps = 1.1920928955078125e-07f, kBflEps = 1e-12f;

__device__ __forceinline__ uint32_t bits_of(float v) {
  uint32_t word;
  __builtin_memcpy(&word, &v, sizeof word);
  return word;
}
__device__ __forceinline__ float float_of(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

// The largest |v| so far, as bits: those of positive numbers grow with them, and those of NaN stand
// above all.
template <class T>
class Amax {
 public:
  template <int N>
  __device__ __forceinline__ void take(const Pack<T, N>& pack) {
#pragma unroll
    for (int j = 0; j < N; j += 4 / sizeof(T)) {
      uint32_t word;
      __builtin_memcpy(&word, &pack.v[j], sizeof word);
      if constexpr (sizeof(T) == 2) {
        bits_ = larger_halves(bits_, word & 0x7fff7fffu);
      } else {
        bits_ = larger(bits_, word & 0x7fffffffu);
      }
    }
  }

  // As the bits of a float.
  __device__ __forceinline__ uint32_t bits() const {
    if constexpr (sizeof(T) == 4) return bits_;
    const auto half = static_cast<uint16_t>(larger(bits_ & 0xffffu, bits_ >> 16));
    T value;
    __builtin_memcpy(&value, &half, sizeof value);
    return bits_of(to_float(value)) & 0x7fffffffu;
  }

  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }

 private:
  static __device__ __forceinline__ uint32_t larger_halves(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    return __vmaxu2(a, b);
#else
    return larger(a & 0xffffu, b & 0xffffu) | larger(a & 0xffff0000u, b & 0xffff0000u);
#endif
  }

  uint32_t bits_ = 0;
};

// The largest of all threads' bits, in all of them. `exchange` has a place for each warp; of a
// block that calls this twice, two of them. THREADS: of the block, 0 where that isn't known before.
template <unsigned THREADS = 0>
__device__ __forceinline__ uint32_t reduce_max(uint32_t bits, uint32_t (&exchange)[kMaxWarps]) {
#ifdef __CUDA_ARCH__
  bits = __reduce_max_sync(0xffffffffu, bits);
#else
  for (int bit = 16; bit > 0; bit /= 2) bits = Amax<float>::larger(bits, __shfl_xor_sync(0xffffffffu, bits, bit));
#endif
  if (threadIdx.x % 32 == 0) exchange[threadIdx.x / 32] = bits;
  __syncthreads();
  const unsigned warps = (THREADS == 0 ? blockDim.x : THREADS) / 32;
  for (unsigned warp = 0; warp < warps; ++warp) bits = Amax<float>::larger(bits, exchange[warp]);
  return bits;
}

// The scale of what has this largest |x|, in float32 as it is stored.
template <class T>
__device__ __forceinline__ float scale_of(float amax, Law law) {
  const auto at_least = [](float v, float least) { return v < least ? least : v; };  // NaN stays
  switch (law) {
    case Law::int8_row: return at_least(round_to<T>(__fmul_rn(amax, kInt8Reciprocal)), kInt8Eps);
    case Law::float8_row_bfl: return at_least(__fmul_rn(amax, kFloat8Reciprocal), kBflEps);
    default: return round_to<T>(__fmul_rn(amax, kFloat8Reciprocal));
  }
}

// What the elements of a row are divided by. Where nothing underflows, and scale and x have few
// digits, two fused multiply-adds make the correctly rounded quotient out of the reciprocal
// (Markstein, 1990).
struct Divisor {
  float scale, reciprocal;
  bool refines;

  template <bool REFINES>
  __device__ __forceinline__ float quotient(float x) const {
    if constexpr (!REFINES) return __fdiv_rn(x, scale);
    const float near = __fmul_rn(x, reciprocal);
    const float refined = __fmaf_rn(__fmaf_rn(-near, scale, x), reciprocal, near);
    return float_of((bits_of(refined) & 0x7fffffffu) | (bits_of(x) & 0x80000000u));  // of a zero the sums lose the sign
  }
};

__device__ __forceinline__ Divisor divide_by(float scale, Law law) {
  return {scale, __frcp_rn(scale), law != Law::float8_row_bfl && scale > 0x1p-60f && scale < 0x1p100f};
}

// v clamped to +-448 and rounded to e4m3.
__device__ __forceinline__ uint32_t to_e4m3(float v) {
  v = v < -448.0f ? -448.0f : v > 448.0f ? 448.0f : v;
  const uint32_t bits = bits_of(v), sign = bits >> 24 & 0x80u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7fu;  // NaN
  if (magnitude < 121u << 23) {                      // subnormal: this addition rounds at its last digit
    return sign | ((bits_of(__fadd_rn(float_of(magnitude), 16384.0f)) - (141u << 23)) & 0xffu);
  }
  magnitude += 0x7ffffu + (magnitude >> 20 & 1) - (120u << 23);
  return sign | magnitude >> 20;
}

// Two neighbours, the first in the low byte.
__device__ __forceinline__ uint32_t to_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t both;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(both) : "f"(low), "f"(high));
  return both;
#else
  return to_e4m3(low) | to_e4m3(high) << 8;
#endif
}

// x * (1 / scale), to the nearest int8; NaN becomes 0.
__device__ __forceinline__ uint32_t to_int8(float x, float reciprocal) {
  const int rounded = __float2int_rn(__fmul_rn(x, reciprocal));
  return static_cast<uint32_t>(rounded < -128 ? -128 : rounded > 127 ? 127 : rounded) & 0xffu;
}

// N elements, one byte each.
template <int N>
struct Bytes {
  uint32_t words[N / 4];
};

template <int N, bool REFINES>
__device__ __forceinline__ Bytes<N> to_float8(const float (&v)[N], const Divisor& by) {
  Bytes<N> bytes;
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    const auto q = [&](int i) { return by.template quotient<REFINES>(v[j + i]); };
    bytes.words[j / 4] = to_e4m3(q(0), q(1)) | to_e4m3(q(2), q(3)) << 16;
  }
  return bytes;
}

template <int N>
__device__ __forceinline__ Bytes<N> to_int8(const float (&v)[N], const Divisor& by) {
  Bytes<N> bytes;
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    const auto q = [&](int i) { return to_int8(v[j + i], by.reciprocal); };
    bytes.words[j / 4] = q(0) | q(1) << 8 | q(2) << 16 | q(3) << 24;
  }
  return bytes;
}

template <int N>
__device__ __forceinline__ void store_bytes(uint8_t* target, const Bytes<N>& bytes) {
  if constexpr (N == 8) {
    __stcs(reinterpret_cast<uint2*>(target), uint2{bytes.words[0], bytes.words[1]});
  } else {
    static_assert(N == 4);
    __stcs(reinterpret_cast<uint32_t*>(target), bytes.words[0]);
  }
}

// Writes the values of a row that the block's threads hold. `inside(i)`: whether access i of this
// thread lies in the row; it begins at element i * step of `target`, which is the thread's own
// first.
template <class T, int N, int ACCESSES, class INSIDE>
__device__ __forceinline__ void store_quantized(const Pack<T, N> (&row)[ACCESSES], const Divisor& by, Law law, uint8_t* target, int step,
                                                INSIDE inside) {
  constexpr auto kEach = std::make_integer_sequence<int, ACCESSES>{};
  const auto store = [&](auto convert) {
    each(kEach, [&](auto i) {
      if (!inside(i)) return;
      float values[N];
      to_floats(values, row[i]);
      store_bytes<N>(target + i * step, convert(values));
    });
  };
  if (law == Law::int8_row) {
    store([&](const float (&v)[N]) { return to_int8<N>(v, by); });
  } else if (unlikely(!by.refines)) {
    store([&](const float (&v)[N]) { return to_float8<N, false>(v, by); });
  } else {
    store([&](const float (&v)[N]) { return to_float8<N, true>(v, by); });
  }
}

}  // namespace ditnorm
