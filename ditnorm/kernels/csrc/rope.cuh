// The rotary embedding of neighbouring elements: (a, b) -> (a * cos - b * sin, b * cos + a * sin).
#pragma once
#include "numerics.cuh"

namespace ditnorm {

// Of N consecutive elements of a head: a value for each, or for each pair of neighbours.
template <int N, bool PER_ELEMENT = true>
struct Angles {
  static constexpr int kValues = PER_ELEMENT ? N : N / 2;
  float cos[kValues], sin[kValues];

  // Of element j.
  __device__ __forceinline__ float cos_of(int j) const { return cos[PER_ELEMENT ? j : j / 2]; }
  __device__ __forceinline__ float sin_of(int j) const { return sin[PER_ELEMENT ? j : j / 2]; }
};

// One table's row of one token, in any layout that fast_rotary accepts. `column`: the first element, of its head.
template <int N, int VALUES>
__device__ __forceinline__ void load_angles(float (&out)[VALUES], const Rotary& r, const float* row, int column) {
  constexpr int kOfElement = N / VALUES;
  if (VALUES == N && r.per_element) {
    to_floats(out, load_pack<float, VALUES>(row + column));
  } else if (r.step == 1) {
    const auto pairs = load_pack<float, N / 2>(row + column / 2);
#pragma unroll
    for (int j = 0; j < VALUES; ++j) out[j] = pairs.v[j * kOfElement / 2];
  } else {  // every second value of a dense table; an aligned access that starts inside an allocation doesn't leave it
    const bool odd = reinterpret_cast<uintptr_t>(row) % 16 != 0;
    const auto both = load_pack<float, N>(row - odd + column);
#pragma unroll
    for (int j = 0; j < VALUES; ++j) out[j] = odd ? both.v[j * kOfElement | 1] : both.v[j * kOfElement & ~1];
  }
}

template <int N, bool PER_ELEMENT = true>
__device__ __forceinline__ Angles<N, PER_ELEMENT> load_angles(const Rotary& r, int64_t batch, int64_t token, int column) {
  const int64_t offset = batch * r.batch_stride + token * r.token_stride;
  Angles<N, PER_ELEMENT> angles;
  load_angles<N>(angles.cos, r, r.cos + offset, column);
  load_angles<N>(angles.sin, r, r.sin + offset, column);
  return angles;
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

template <bool CONTRACTED, int N, bool PER_ELEMENT>
__device__ __forceinline__ void rotate_pairs(float (&n)[N], const Angles<N, PER_ELEMENT>& angles) {
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    rotate_pair<CONTRACTED>(n[j], n[j + 1], angles.cos_of(j), angles.cos_of(j + 1), angles.sin_of(j), angles.sin_of(j + 1));
  }
}

template <int N, bool PER_ELEMENT>
__device__ __forceinline__ void rotate(float (&n)[N], const Angles<N, PER_ELEMENT>& angles, bool contracted) {
  if (contracted) {
    rotate_pairs<true>(n, angles);
  } else {
    rotate_pairs<false>(n, angles);
  }
}

}  // namespace ditnorm
