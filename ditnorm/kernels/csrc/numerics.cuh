// Loads, stores, conversions and roundings. All arithmetic of the ops is written in intrinsics, so
// that no compiler contracts or reorders it: the GPU, and a host build of the same source, then
// agree bit for bit.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "problem.h"

namespace ditnorm {

template <class T>
constexpr DType dtype_of = std::is_same_v<T, float>    ? DType::f32
                           : std::is_same_v<T, __half> ? DType::f16
                                                       : DType::bf16;

// A branch that is laid out off the hot path.
__device__ __forceinline__ bool unlikely(bool condition) { return __builtin_expect(condition, false); }

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, float>) return v;
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(v);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(v);
}

// A bfloat16 is the upper half of a float32. To convert a pair is one instruction; that of a single
// number goes through a unit a quarter as fast.
template <class T, bool ROUND = true>
__device__ __forceinline__ float round_to(float v) {
  if constexpr (ROUND && std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(0.0f, v);
    __builtin_memcpy(&v, &pair, sizeof v);
    return v;
  } else {
    return ROUND ? to_float(from_float<T>(v)) : v;
  }
}

// Memory moves in accesses of 4, 8 or 16 bytes.
template <int BYTES>
using Access = std::conditional_t<BYTES == 16, uint4, std::conditional_t<BYTES == 8, uint2, uint32_t>>;

// N consecutive elements.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  static constexpr int kBytes = N * sizeof(T);
  using Access = ditnorm::Access < kBytes<16 ? kBytes : 16>;
  static constexpr int kAccesses = kBytes / sizeof(Access);
  union {
    T v[N];
    Access words[kAccesses];
  };
  __device__ __forceinline__ Pack() {}
};

// Two neighbours of half precision, for packed arithmetic.
template <class T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <class T, int N>
__device__ __forceinline__ Pair<T> pair(const Pack<T, N>& pack, int j) {
  return *reinterpret_cast<const Pair<T>*>(&pack.v[j]);
}
template <class T, int N>
__device__ __forceinline__ void put(Pack<T, N>& pack, int j, Pair<T> value) {
  *reinterpret_cast<Pair<T>*>(&pack.v[j]) = value;
}
template <class T>
__device__ __forceinline__ Pair<T> twice(T value) {
  return Pair<T>(value, value);
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> filled(float value) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.v[j] = from_float<T>(value);
  return pack;
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* source) {
  Pack<T, N> pack;
  const auto* words = reinterpret_cast<const typename Pack<T, N>::Access*>(source);
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kAccesses; ++i) pack.words[i] = __ldg(words + i);
  return pack;
}

// `elements` from `data` on, which may be null: then nobody reads through the result.
template <class T>
__device__ __forceinline__ const T* advance(const void* data, int64_t elements) {
  return reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(data) + elements * sizeof(T));
}

// How rows pass the caches: as anything else, or first to leave. which is faster was measured for
// each op: docs/kernels-log.md.
enum class Cache { normal, streaming };

template <Cache CACHE, class T, int N>
__device__ __forceinline__ Pack<T, N> load_row(const T* source) {
  Pack<T, N> pack;
  const auto* words = reinterpret_cast<const typename Pack<T, N>::Access*>(source);
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kAccesses; ++i) pack.words[i] = CACHE == Cache::streaming ? __ldcs(words + i) : words[i];
  return pack;
}

template <Cache CACHE, class T, int N>
__device__ __forceinline__ void store_row(T* target, const Pack<T, N>& pack) {
  auto* words = reinterpret_cast<typename Pack<T, N>::Access*>(target);
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kAccesses; ++i) {
    if constexpr (CACHE == Cache::streaming) {
      __stcs(words + i, pack.words[i]);
    } else {
      words[i] = pack.words[i];
    }
  }
}

#ifdef __CUDA_ARCH__
// Of what lies in shared memory, for instructions that take no other address.
__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// 16 bytes into shared memory, past the registers. Who asked for them may read them after the wait.
__device__ __forceinline__ void copy_ahead(void* target, const void* source) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)), "l"(source) : "memory");
#else
  __builtin_memcpy(target, source, 16);
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// MULTIPLIES: by two_to_16, instead of a shift by 16 bits. The integer unit, which shifts, takes an
// instruction every second cycle, and in some kernels has more of them than the others. ptxas, if it
// knew the factor, would choose.
template <bool MULTIPLIES = false, class T, int N>
__device__ __forceinline__ void to_floats(float (&out)[N], const Pack<T, N>& pack, uint32_t two_to_16 = 0x10000u) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // one instruction an element; nvcc takes two
      uint32_t word;
      __builtin_memcpy(&word, &pack.v[j / 2 * 2], sizeof word);
      word = j % 2 != 0 ? word & 0xffff0000u : MULTIPLIES ? word * two_to_16 : word << 16;
      __builtin_memcpy(&out[j], &word, sizeof word);
    } else {
      out[j] = to_float(pack.v[j]);
    }
  }
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> from_floats(const float (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      put(pack, j, __floats2bfloat162_rn(values[j], values[j + 1]));
    } else if constexpr (std::is_same_v<T, __half>) {
      put(pack, j, __floats2half2_rn(values[j], values[j + 1]));
    } else {
      pack.v[j] = values[j], pack.v[j + 1] = values[j + 1];
    }
  }
  return pack;
}

template <class T, int N>
__device__ __forceinline__ void load_elements(float (&out)[N], const T* source, int count) {
#pragma unroll
  for (int j = 0; j < N; ++j) out[j] = j < count ? to_float(source[j]) : 0.0f;
}

// The first `count` of N elements of any dtype and alignment; zeros follow.
template <int N>
__device__ __forceinline__ void load_elements(float (&out)[N], const void* base, DType dtype, int64_t offset, int count) {
  switch (dtype) {
    case DType::f32: return load_elements(out, static_cast<const float*>(base) + offset, count);
    case DType::f16: return load_elements(out, static_cast<const __half*>(base) + offset, count);
    default: return load_elements(out, static_cast<const __nv_bfloat16*>(base) + offset, count);
  }
}

__device__ __forceinline__ void store_float(void* base, DType dtype, int64_t offset, float v) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(base)[offset] = v; break;
    case DType::f16: static_cast<__half*>(base)[offset] = from_float<__half>(v); break;
    default: static_cast<__nv_bfloat16*>(base)[offset] = from_float<__nv_bfloat16>(v); break;
  }
}

__device__ __forceinline__ float round_to(float v, DType dtype) {
  switch (dtype) {
    case DType::f32: return v;
    case DType::f16: return round_to<__half>(v);
    default: return round_to<__nv_bfloat16>(v);
  }
}

constexpr float kNaN = __builtin_nanf("");

}  // namespace ditnorm
