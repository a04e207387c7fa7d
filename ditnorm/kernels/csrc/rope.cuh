// The rotary embedding of neighbouring elements, or of the two halves of a head:
// (a, b) -> (a * cos - b * sin, b * cos + a * sin).
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

// One table's row of one token as it lies in memory, in any layout that fast_rotary accepts: a
// value for each element, for each pair (in the lower half), or for each pair with something else
// beside it. `column`: the first element, of its head.
template <int N>
__device__ __forceinline__ Pack<float, N> load_table(const Rotary& r, const float* row, int column) {
  if (r.per_element || r.step == 2) {  // an aligned access that starts inside an allocation doesn't leave it
    return load_pack<float, N>(reinterpret_cast<const float*>(reinterpret_cast<uintptr_t>(row) & ~uintptr_t{15}) + column);
  }
  Pack<float, N> table;
  const auto pairs = load_pack<float, N / 2>(row + column / 2);
#pragma unroll
  for (int j = 0; j < N / 2; ++j) table.v[j] = pairs.v[j];
  return table;
}

template <int N, int VALUES>
__device__ __forceinline__ void select_angles(float (&out)[VALUES], const Rotary& r, const float* row, const Pack<float, N>& table) {
  constexpr int kOfElement = N / VALUES;
  if (VALUES == N && r.per_element) {
#pragma unroll
    for (int j = 0; j < VALUES; ++j) out[j] = table.v[j];
  } else if (r.step == 1) {
#pragma unroll
    for (int j = 0; j < VALUES; ++j) out[j] = table.v[j * kOfElement / 2];
  } else {
    const bool odd = reinterpret_cast<uintptr_t>(row) % 16 != 0;
#pragma unroll
    for (int j = 0; j < VALUES; ++j) out[j] = odd ? table.v[j * kOfElement | 1] : table.v[j * kOfElement & ~1];
  }
}

template <int N, bool PER_ELEMENT = true>
__device__ __forceinline__ Angles<N, PER_ELEMENT> load_angles(const Rotary& r, int64_t batch, int64_t token, int column) {
  const int64_t offset = batch * r.batch_stride + token * r.token_stride;
  const float *const cos = r.cos + offset, *const sin = r.sin + offset;
  Angles<N, PER_ELEMENT> angles;
  if (r.step == 2 && r.sin == r.cos + 1) {  // complex numbers: one access has both
    constexpr int kOfElement = N / Angles<N, PER_ELEMENT>::kValues;
    const auto both = load_pack<float, N>(cos + column);
#pragma unroll
    for (int j = 0; j < angles.kValues; ++j) {
      angles.cos[j] = both.v[j * kOfElement & ~1];
      angles.sin[j] = both.v[j * kOfElement | 1];
    }
    return angles;
  }
  // Values are chosen when both tables have been asked for: choosing waits for the memory.
  const auto cos_table = load_table<N>(r, cos, column), sin_table = load_table<N>(r, sin, column);
  select_angles<N>(angles.cos, r, cos, cos_table);
  select_angles<N>(angles.sin, r, sin, sin_table);
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

// One element of a pair of halves, `other` the other one; sin is negated for that of the lower half.
// CONTRACTED: as ATen's addcmul fuses from PyTorch 2.11 on.
template <bool CONTRACTED>
__device__ __forceinline__ float rotate_half(float own, float other, float cos, float sin) {
  const float product = __fmul_rn(own, cos);
  return CONTRACTED ? __fmaf_rn(sin, other, product) : __fadd_rn(product, __fmul_rn(sin, other));
}
__device__ __forceinline__ float rotate_half(float own, float other, float cos, float sin, bool contracted) {
  return contracted ? rotate_half<true>(own, other, cos, sin) : rotate_half<false>(own, other, cos, sin);
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
