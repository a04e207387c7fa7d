// Loads, stores, conversions and roundings. All arithmetic of the ops is written in intrinsics, so that no compiler contracts or
// reorders it: the GPU, and a host build of the same source, then agree bit for bit.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "problem.h"

namespace ditnorm {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, float>) return v;
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(v);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(v);
}

template <class T, bool ROUND = true>
__device__ __forceinline__ float round_to(float v) {
  return ROUND ? to_float(from_float<T>(v)) : v;
}

// N consecutive elements, moved in 16-byte accesses.
template <class T, int N>
struct alignas(16) Pack {
  static_assert(N * sizeof(T) % 16 == 0);
  T v[N];
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const void* base, int64_t offset) {
  union {
    Pack<T, N> pack;
    uint4 words[N * sizeof(T) / 16];
  } both;
  const uint4* source = reinterpret_cast<const uint4*>(static_cast<const T*>(base) + offset);
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T) / 16); ++i) both.words[i] = __ldg(source + i);
  return both.pack;
}

// Streaming: the next kernel reads these rows after the cache has forgotten them.
template <class T, int N>
__device__ __forceinline__ void store_pack(void* base, int64_t offset, const Pack<T, N>& pack) {
  uint4* target = reinterpret_cast<uint4*>(static_cast<T*>(base) + offset);
  const uint4* words = reinterpret_cast<const uint4*>(&pack);
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T) / 16); ++i) __stcs(target + i, words[i]);
}

__device__ __forceinline__ float load_float(const void* base, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(base)[offset];
    case DType::f16: return to_float(static_cast<const __half*>(base)[offset]);
    default: return to_float(static_cast<const __nv_bfloat16*>(base)[offset]);
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

__device__ __forceinline__ int64_t load_index(const Index& index, int64_t batch, int64_t token) {
  const int64_t offset = batch * index.batch_stride + token * index.token_stride;
  switch (index.dtype) {
    case DType::i64: return static_cast<const int64_t*>(index.data)[offset];
    case DType::i32: return static_cast<const int32_t*>(index.data)[offset];
    case DType::i16: return static_cast<const int16_t*>(index.data)[offset];
    case DType::i8: return static_cast<const int8_t*>(index.data)[offset];
    default: return static_cast<const uint8_t*>(index.data)[offset];
  }
}

// Where one token of one sample lies.
struct Token {
  int64_t batch, token;
  int64_t indexed_row;  // the row that the index selects; 0 where there is no index, or where it selects none
  bool valid;           // false: the index is out of range, and the row becomes NaN

  __device__ __forceinline__ Token(const Problem& p, int64_t row) : batch(0), token(row), indexed_row(0), valid(true) {
    if (p.batch > 1) {
      batch = row / p.tokens;
      token = row - batch * p.tokens;
    }
    if (p.index.data != nullptr) {
      indexed_row = load_index(p.index, batch, token);
      valid = indexed_row >= 0 && indexed_row < p.index.rows;
      if (!valid) indexed_row = 0;
    }
  }

  __device__ __forceinline__ int64_t offset(const Rows& rows) const { return batch * rows.batch_stride + token * rows.token_stride; }

  __device__ __forceinline__ int64_t offset(const Modulation& m, const Index& index) const {
    if (index.data != nullptr) return batch * m.batch_stride + indexed_row * m.row_stride;
    if (m.row_stride == 0) return batch * m.batch_stride;
    return batch * m.batch_stride + (m.tokens_per_row == 1 ? token : token / m.tokens_per_row) * m.row_stride;
  }
};

constexpr float kNaN = __builtin_nanf("");

}  // namespace ditnorm
