// The rotary embedding of neighbouring elements: (a, b) -> (a * cos - b * sin, b * cos + a * sin).
#pragma once
#include "numerics.cuh"

namespace ditnorm {

// For each of N consecutive elements of a head.
template <int N>
struct Angles {
  float cos[N], sin[N];
};

// Both tables' rows of one token, in any layout that aligned_rotary accepts. `column`: the first element, of its head.
template <int N>
__device__ __forceinline__ void load_angles(float (&out)[N], const Rotary& r, const float* row, int column) {
  if (r.per_element) {
    to_floats(out, load_pack<float, N>(row + column));
  } else if (r.step == 1) {
    const auto pairs = load_pack<float, N / 2>(row + column / 2);
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = pairs.v[j / 2];
  } else {  // every second value of a dense table; an aligned access that starts inside an allocation doesn't leave it
    const bool odd = reinterpret_cast<uintptr_t>(row) % 16 != 0;
    const auto both = load_pack<float, N>(row - odd + column);
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = odd ? both.v[j | 1] : both.v[j & ~1];
  }
}

template <int N>
__device__ __forceinline__ Angles<N> load_angles(const Rotary& r, int64_t batch, int64_t token, int column) {
  const int64_t offset = batch * r.batch_stride + token * r.token_stride;
  Angles<N> angles;
  load_angles(angles.cos, r, r.cos + offset, column);
  load_angles(angles.sin, r, r.sin + offset, column);
  return angles;
}

#ifndef QK_A
#define QK_A 0
#endif
// Both tables' lines of one token, where a thread's angles begin.
template <int N>
__device__ __forceinline__ void prefetch_angles(const Rotary& r, int64_t batch, int64_t token, int column) {
#ifdef __CUDA_ARCH__
  const int64_t offset = batch * r.batch_stride + token * r.token_stride + (r.per_element || r.step == 2 ? column : column / 2);
#if QK_A == 1
  asm volatile("prefetch.global.L2 [%0];" ::"l"(r.cos + offset));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(r.sin + offset));
#else
  asm volatile("prefetch.global.L1 [%0];" ::"l"(r.cos + offset));
  asm volatile("prefetch.global.L1 [%0];" ::"l"(r.sin + offset));
#endif
#endif
}

// CONTRACTED: see Rotary.
template <bool CONTRACTED>
__device__ __forceinline__ void rotate_pair(float& a, float& b, float cos_a, float cos_b, float sin_a, float sin_b) {
  const float x = a;
  if constexpr (CONTRACTED) {
    a = __fmaf_rn(x, cos_a, -__fmul_rn(b, sin_a));
    b = __fmaf_rn(x, sin_b, __fmul_rn(b, cos_b));
  } else {
    a = __fsub_rn(__fmul_rn(x, cos_a), __fmul_rn(b, sin_a));
    b = __fadd_rn(__fmul_rn(b, cos_b), __fmul_rn(x, sin_b));
  }
}

template <bool CONTRACTED, int N>
__device__ __forceinline__ void rotate_pairs(float (&n)[N], const Angles<N>& angles) {
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    rotate_pair<CONTRACTED>(n[j], n[j + 1], angles.cos[j], angles.cos[j + 1], angles.sin[j], angles.sin[j + 1]);
  }
}

template <int N>
__device__ __forceinline__ void rotate(float (&n)[N], const Angles<N>& angles, bool contracted) {
  if (contracted) {
    rotate_pairs<true>(n, angles);
  } else {
    rotate_pairs<false>(n, angles);
  }
}

}  // namespace ditnorm
