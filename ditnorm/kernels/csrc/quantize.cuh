// Quantising a row that lies in the registers of a block: the laws of ditnorm/ops/quantization.py,
// rounding for rounding as ATen computes them on CUDA.
#pragma once
#include <algorithm>
#include <cmath>

#include "launch.h"
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

// Of two uint16 each.
__device__ __forceinline__ uint32_t larger_halves(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __vmaxu2(a, b);
#else
  return std::max(a & 0xffffu, b & 0xffffu) | std::max(a & 0xffff0000u, b & 0xffff0000u);
#endif
}
__device__ __forceinline__ uint32_t smaller_halves(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return __vminu2(a, b);
#else
  return std::min(a & 0xffffu, b & 0xffffu) | std::min(a & 0xffff0000u, b & 0xffff0000u);
#endif
}

// A number of T that has these bits.
template <class T>
__device__ __forceinline__ float number_of(uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  T value;
  __builtin_memcpy(&value, &half, sizeof value);
  return to_float(value);
}

// Of two numbers of T each; NaN wins. Three in a row of these nvcc makes two instructions of.
template <class T>
__device__ __forceinline__ uint32_t larger_of(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t larger;
  if constexpr (std::is_same_v<T, __half>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  }
  return larger;
#else
  const auto of = [](uint32_t a, uint32_t b) { return number_of<T>(a) < number_of<T>(b) || number_of<T>(b) != number_of<T>(b) ? b : a; };
  return (of(a, b) & 0xffffu) | of(a >> 16, b >> 16) << 16;
#endif
}
template <class T>
__device__ __forceinline__ uint32_t smaller_of(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint32_t smaller;
  if constexpr (std::is_same_v<T, __half>) {
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(smaller) : "r"(a), "r"(b));
  } else {
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(smaller) : "r"(a), "r"(b));
  }
  return smaller;
#else
  constexpr uint32_t kSigns = 0x80008000u;
  return larger_of<T>(a ^ kSigns, b ^ kSigns) ^ kSigns;
#endif
}

// The largest |v| so far, as bits: those of positive numbers grow with them, and those of NaN stand
// above all. Of half precision that is the largest v or the smallest.
template <class T>
class Amax {
 public:
  template <int N>
  __device__ __forceinline__ void take(const Pack<T, N>& pack) {
#pragma unroll
    for (int j = 0; j < N; j += 4 / sizeof(T)) {
      uint32_t word;
      __builtin_memcpy(&word, &pack.v[j], sizeof word);
      if constexpr (sizeof(T) == 4) {
        most_ = larger(most_, word & kMagnitude);
      } else {
        most_ = larger_of<T>(most_, word), least_ = smaller_of<T>(least_, word);
      }
    }
  }

  // As the bits of a float.
  __device__ __forceinline__ uint32_t bits() const {
    if constexpr (sizeof(T) == 4) return most_;
    const uint32_t both = larger_halves(most_ & kMagnitude, least_ & kMagnitude);
    return bits_of(number_of<T>(larger(both & 0xffffu, both >> 16))) & 0x7fffffffu;
  }

  // The largest v, of half precision, and of 0. NaN where there is one, or -infinity.
  __device__ __forceinline__ float most() const {
    const uint32_t most = larger_of<T>(most_, most_ >> 16), least = smaller_of<T>(least_, least_ >> 16);
    return number_of<T>(least) == -INFINITY ? kNaN : number_of<T>(most);
  }

  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a < b ? b : a; }

 private:
  static constexpr uint32_t kMagnitude = sizeof(T) == 4 ? 0x7fffffffu : 0x7fff7fffu;  // all but the signs

  uint32_t most_ = 0, least_ = 0;
};

__device__ __forceinline__ uint32_t reduce_max_of_warp(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __reduce_max_sync(0xffffffffu, bits);
#else
  for (int bit = 16; bit > 0; bit /= 2) bits = Amax<float>::larger(bits, __shfl_xor_sync(0xffffffffu, bits, bit));
  return bits;
#endif
}

// The largest of all threads' bits, in all of them. `exchange` has a place for each warp; of a
// block that calls this twice, two of them. THREADS: of the row, of which each block has one unless
// these are 32; 0 where that isn't known before.
template <unsigned THREADS = 0>
__device__ __forceinline__ uint32_t reduce_max(uint32_t bits, uint32_t (&exchange)[kMaxWarps]) {
  bits = reduce_max_of_warp(bits);
  if constexpr (THREADS == 32) return bits;
  if (threadIdx.x % 32 == 0) exchange[threadIdx.x / 32] = bits;
  __syncthreads();
  if constexpr (THREADS == 0) {
    return reduce_max_of_warp(threadIdx.x % 32 < blockDim.x / 32 ? exchange[threadIdx.x % 32] : 0);
  } else {
    for (unsigned warp = 0; warp < THREADS / 32; ++warp) bits = Amax<float>::larger(bits, exchange[warp]);
    return bits;
  }
}

// The blocks of a grid that is one cluster (launch.h).
class Cluster {
 public:
  __device__ __forceinline__ Cluster() {
#ifdef __CUDA_ARCH__
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
#endif
  }

  // As ditnorm::reduce_max, of the threads of all blocks; once. `found`: that of each block, in all.
  __device__ __forceinline__ uint32_t reduce_max(uint32_t bits, uint32_t (&exchange)[kMaxWarps], uint32_t (&found)[kClusterBlocks]) const {
    bits = ditnorm::reduce_max(bits, exchange);
#ifdef __CUDA_ARCH__
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // until all blocks are there
    if (threadIdx.x < kClusterBlocks) {
      asm volatile(
          "{ .reg .u32 other;\n"
          "mapa.shared::cluster.u32 other, %0, %1;\n"
          "st.shared::cluster.u32 [other], %2; }" ::"r"(shared_address(&found[blockIdx.x])),
          "r"(threadIdx.x), "r"(bits)
          : "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
    return reduce_max_of_warp(threadIdx.x % 32 < kClusterBlocks ? found[threadIdx.x % 32] : 0);
#else
    (void)found;
    return bits;
#endif
  }
};

// The warps of a block that have a row together, `threads` threads; the block has at most 15 such
// groups.
class WarpGroup {
 public:
  const unsigned first;  // thread

  __device__ __forceinline__ explicit WarpGroup(unsigned threads)
      : first(threadIdx.x / threads * threads), threads_(threads), barrier_(1 + threadIdx.x / threads) {}

  // As __syncthreads, for this group alone.
  __device__ __forceinline__ void wait() const {
#ifdef __CUDA_ARCH__
    asm volatile("bar.sync %0, %1;" ::"r"(barrier_), "r"(threads_) : "memory");
#else
    __syncthreads();  // with all others that are still there, so that nobody waits in vain
#endif
  }

  // As reduce_max.
  __device__ __forceinline__ uint32_t reduce_max(uint32_t bits, uint32_t (&exchange)[kMaxWarps]) const {
    const unsigned lane = threadIdx.x % 32;
    bits = reduce_max_of_warp(bits);
    if (lane == 0) exchange[threadIdx.x / 32] = bits;
    wait();
    return reduce_max_of_warp(lane < threads_ / 32 ? exchange[first / 32 + lane] : 0);
  }

 private:
  const unsigned threads_, barrier_;
};

// This thread's part of what reduce_max makes the largest |y| of all rows.
__device__ __forceinline__ uint32_t largest_part(const Partials& partials) {
  uint32_t bits = 0;
  for (unsigned i = threadIdx.x; i < static_cast<unsigned>(partials.count); i += blockDim.x) {
    bits = Amax<float>::larger(bits, partials.data[i]);
  }
  return bits;
}

// The same of what the blocks of amax_kernel found, or a norm of few rows.
__device__ __forceinline__ uint32_t amax_of_all(const QuantizeProblem& p) { return largest_part({p.partials, p.partial_count}); }

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

// How the elements of a row become its values.
enum class Conversion {
  int8,
  int8_zeros,  // of a row whose scale is infinite or NaN
  float8,      // one product with the reciprocal
  float8_any_scale,
  float8_bfl,
};

// What the elements of a row are divided by.
//
// e4m3 takes the rounded quotient of torchao, and rounds it at numbers of 5 digits. Where scale and
// x have the digits of half precision, a quotient that isn't such a number is at least 2**-16 away
// from it, and what it was computed with doesn't matter. One that is has to be met exactly, which
// the product with the rounded reciprocal does if that is close enough: for 124 of the 128 scales
// of bfloat16.
struct Divisor {
  float scale;
  // Their sum is 1 / scale, and `rest` isn't negative, which would change the sign of a zero.
  float reciprocal, rest;
  float power;  // of 2, that x and scale are multiplied by before, lest something overflow
  Conversion conversion;
};

__device__ __forceinline__ Divisor divide_by(float scale, Law law) {
  constexpr float kNear = 0x1.08p-25f;  // times 31 / 16: half a unit in the last place
  const bool finite = scale < INFINITY;
  if (law == Law::int8_row) return {scale, __frcp_rn(scale), 0.0f, 1.0f, finite ? Conversion::int8 : Conversion::int8_zeros};
  Divisor by{scale, __frcp_rn(scale), 0.0f, 1.0f, Conversion::float8};
  if (unlikely(law == Law::float8_row_bfl && finite)) {
    by.conversion = Conversion::float8_bfl;
  } else if (unlikely(!(fabsf(__fmaf_rn(-scale, by.reciprocal, 1.0f)) <= kNear && scale > 0x1p-60f && scale < 0x1p60f))) {
    by.conversion = Conversion::float8_any_scale;
    by.power = scale < 1.0f ? 0x1p64f : 0x1p-64f;
    const float scaled = __fmul_rn(scale, by.power);
    by.reciprocal = __frcp_rn(scaled);
    if (scale > 0.0f && finite) {
      by.reciprocal = float_of(bits_of(by.reciprocal) - 1);
      by.rest = __fmul_rn(__fmaf_rn(-scaled, by.reciprocal, 1.0f), by.reciprocal);
    }
  }
  return by;
}

// `sign` has the sign.
__device__ __forceinline__ float with_sign(float magnitude, float sign) {
  return float_of((bits_of(magnitude) & 0x7fffffffu) | (bits_of(sign) & 0x80000000u));
}

// x / scale, or a number that e4m3 rounds as it.
template <Conversion CONVERSION>
__device__ __forceinline__ float quotient(float x, const Divisor& by) {
  if constexpr (CONVERSION == Conversion::float8) return __fmul_rn(x, by.reciprocal);
  if constexpr (CONVERSION == Conversion::float8_any_scale) {
    x = __fmul_rn(x, by.power);
    return __fmaf_rn(x, by.reciprocal, __fmul_rn(x, by.rest));
  }
  // The scale has all digits of float32. A step brings the quotient within a unit in the last
  // place, another rounds it correctly (Markstein, 1990).
  float q = __fmul_rn(x, by.reciprocal);
  q = __fmaf_rn(__fmaf_rn(-q, by.scale, x), by.reciprocal, q);
  q = __fmaf_rn(__fmaf_rn(-q, by.scale, x), by.reciprocal, q);
  return with_sign(q, x);  // the sums lose that of a zero
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

// Four bytes of the eight in a and b, as PRMT selects them.
__device__ __forceinline__ uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, selector);
#else
  uint32_t selected = 0;
  for (int i = 0; i < 32; i += 8) {
    const uint32_t from = selector >> i / 2 & 7;
    selected |= ((from < 4 ? a : b) >> from % 4 * 8 & 0xffu) << i;
  }
  return selected;
#endif
}

// Of two int16 each.
__device__ __forceinline__ uint32_t clamped_halves(uint32_t v, int16_t least, int16_t most) {
  const auto twice = [](int16_t half) { return static_cast<uint16_t>(half) * 0x10001u; };
#ifdef __CUDA_ARCH__
  if (least != INT16_MIN) v = __vmaxs2(v, twice(least));
  return __vmins2(v, twice(most));
#else
  const auto clamped = [&](uint32_t half) {
    const auto value = static_cast<int16_t>(half);
    return static_cast<uint16_t>(value < least ? least : value > most ? most : value);
  };
  return clamped(v & 0xffffu) | static_cast<uint32_t>(clamped(v >> 16)) << 16;
#endif
}

// The nearest integer to v, which is a small one, in the low half.
__device__ __forceinline__ uint32_t to_integer(float v) { return bits_of(__fadd_rn(v, 0x1.8p23f)); }

// N elements, one byte each.
template <int N>
struct Bytes {
  uint32_t words[N / 4];
};

template <Conversion CONVERSION, int N>
__device__ __forceinline__ Bytes<N> to_float8(const float (&v)[N], const Divisor& by) {
  Bytes<N> bytes;
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    const auto q = [&](int i) { return quotient<CONVERSION>(v[j + i], by); };
    bytes.words[j / 4] = to_e4m3(q(0), q(1)) | to_e4m3(q(2), q(3)) << 16;
  }
  return bytes;
}

// Elements of T, by a finite scale. Where it has lost digits, which that of bfloat16 never has, a
// quotient may be far from +-127.
template <class T, int N>
__device__ __forceinline__ Bytes<N> to_int8(const float (&v)[N], const Divisor& by) {
  constexpr int16_t kLeast = std::is_same_v<T, __nv_bfloat16> ? INT16_MIN : -128;
  Bytes<N> bytes;
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    const auto pair = [&](int i) {
      const auto at = [&](int k) { return to_integer(__fmul_rn(v[j + k], by.reciprocal)); };
      return clamped_halves(select_bytes(at(i), at(i + 1), 0x5410), kLeast, 127);
    };
    bytes.words[j / 4] = select_bytes(pair(0), pair(2), 0x6420);
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
template <bool MULTIPLIES = false, class T, int N, int ACCESSES, class INSIDE>
__device__ __forceinline__ void store_quantized(const Pack<T, N> (&row)[ACCESSES], const Divisor& by, uint8_t* target, int step,
                                                INSIDE inside, uint32_t two_to_16 = 0x10000u) {
  constexpr auto kEach = std::make_integer_sequence<int, ACCESSES>{};
  const auto store = [&](auto convert) {
    each(kEach, [&](auto i) {
      if (!inside(i)) return;
      float values[N];
      to_floats<MULTIPLIES>(values, row[i], two_to_16);
      store_bytes<N>(target + i * step, convert(values));
    });
  };
  switch (by.conversion) {
    case Conversion::int8: return store([&](const float (&v)[N]) { return to_int8<T>(v, by); });
    case Conversion::float8: return store([&](const float (&v)[N]) { return to_float8<Conversion::float8>(v, by); });
    case Conversion::int8_zeros: return store([&](const float (&)[N]) { return Bytes<N>{}; });
    case Conversion::float8_bfl: return store([&](const float (&v)[N]) { return to_float8<Conversion::float8_bfl>(v, by); });
    default: return store([&](const float (&v)[N]) { return to_float8<Conversion::float8_any_scale>(v, by); });
  }
}

}  // namespace ditnorm
