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

__device__ __forceinline__ void rotate(float& a, float& b, float cos_a, float cos_b, float sin_a, float sin_b, bool contracted) {
  const float re = contracted ? __fmaf_rn(a, cos_a, -__fmul_rn(b, sin_a)) : __fsub_rn(__fmul_rn(a, cos_a), __fmul_rn(b, sin_a));
  b = contracted ? __fmaf_rn(a, sin_b, __fmul_rn(b, cos_b)) : __fadd_rn(__fmul_rn(b, cos_b), __fmul_rn(a, sin_b));
  a = re;
}

template <int N>
__device__ __forceinline__ void rotate(float (&n)[N], const Angles<N>& angles, bool contracted) {
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    rotate(n[j], n[j + 1], angles.cos[j], angles.cos[j + 1], angles.sin[j], angles.sin[j + 1], contracted);
  }
}

}  // namespace ditnorm
