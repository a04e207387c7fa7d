// The formulas of the ops for one element, in every law. ROUND: each intermediate is rounded to T
// ("eager" with a half-precision law); otherwise float32 throughout.
#pragma once
#include "numerics.cuh"

namespace ditnorm {

// What stands for an operand that isn't given: it changes no bit (x + -0 is x even for x = -0), and
// formulas need no branches.
constexpr float kNoWeight = 1.0f, kNoBias = -0.0f, kNoGate = 1.0f, kNoScale = 0.0f, kNoShift = -0.0f;

// Half-precision modulations in float32 arithmetic: without tables that is rounding="single", and
// multiplications and additions may fuse.
template <class T, class M, bool ROUND>
constexpr bool kContracts = !ROUND && std::is_same_v<T, M> && !std::is_same_v<T, float>;

// residual + gate * x
template <class T, bool ROUND>
__device__ __forceinline__ float add_gated(float residual, float x, float gate) {
  return __fadd_rn(residual, round_to<T, ROUND>(__fmul_rn(gate, x)));
}

// (v - mean) * rstd, and the norm's affine as ATen contracts it. RMSNorm: mean is 0, and bias
// kNoBias (see normalize_rms).
template <class T, bool ROUND>
__device__ __forceinline__ float normalize(float v, float mean, float rstd, float weight, float bias) {
  return round_to<T, ROUND>(__fmaf_rn(weight, __fmul_rn(rstd, __fsub_rn(v, mean)), bias));
}

// A LayerNorm with a bias but no weight, which no module has. ATen contracts the bias with the
// normalisation; seen on an H200, 7 % of its float32 results differ from this all the same, so
// "eager" promises no exactness here.
template <class T, bool ROUND>
__device__ __forceinline__ float normalize_bias_only(float v, float mean, float rstd, float bias) {
  return round_to<T, ROUND>(__fmaf_rn(rstd, __fsub_rn(v, mean), bias));
}

// An RMSNorm with a bias. torch's rms_norm has none: it is an addition of its own, after a rounding
// of its own. `wide`: weight or bias is of another dtype than x; then the norm computes in float32
// and rounds once, as FP32LayerNorm does.
template <class T, bool ROUND>
__device__ __forceinline__ float normalize_rms(float v, float rstd, float weight, float bias, bool wide) {
  const float n = __fmul_rn(weight, __fmul_rn(rstd, v));
  return round_to<T, ROUND>(__fadd_rn(wide ? n : round_to<T, ROUND>(n), bias));
}

// n * (1 + scale) + shift; the caller's store rounds the sum
template <class T, bool ROUND>
__device__ __forceinline__ float modulate(float n, float scale, float shift) {
  return __fadd_rn(round_to<T, ROUND>(__fmul_rn(n, round_to<T, ROUND>(__fadd_rn(1.0f, scale)))), shift);
}

// The same with "single" rounding, where contraction only makes it more accurate; `delta`: v -
// mean.
__device__ __forceinline__ float modulate_contracted(float delta, float rstd, float scale, float shift) {
  return __fmaf_rn(delta, __fmaf_rn(scale, rstd, rstd), shift);
}

// N elements of residual + gate * x, in float32.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> add_gated(const Pack<T, N>& residual, const Pack<T, N>& x, const float (&gate)[N]) {
  float r[N], branch[N];
  to_floats(r, residual);
  to_floats(branch, x);
#pragma unroll
  for (int j = 0; j < N; ++j) r[j] = add_gated<T, false>(r[j], branch[j], gate[j]);
  return from_floats<T, N>(r);
}

// The same without a gate.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> add(const Pack<T, N>& residual, const Pack<T, N>& x) {
  float r[N], branch[N];
  to_floats(r, residual);
  to_floats(branch, x);
#pragma unroll
  for (int j = 0; j < N; ++j) r[j] = __fadd_rn(r[j], branch[j]);
  return from_floats<T, N>(r);
}

// N elements in packed arithmetic, every intermediate rounded to T. What eager PyTorch does, an
// operation in float32 and then a rounding to a half-precision type, gives what the operation in
// that type gives, since float32 has more than twice its digits (Figueroa, 1995); bfloat16 results
// below 2**-126 are the one exception.

template <class T, int N>
__device__ __forceinline__ Pack<T, N> add_gated_rounded(const Pack<T, N>& residual, const Pack<T, N>& x, const Pack<T, N>& gate) {
  Pack<T, N> r;
#pragma unroll
  for (int j = 0; j < N; j += 2) put(r, j, __hadd2_rn(pair(residual, j), __hmul2_rn(pair(gate, j), pair(x, j))));
  return r;
}

// The same with one rounding in all: "single".
template <class T, int N>
__device__ __forceinline__ Pack<T, N> add_gated_contracted(const Pack<T, N>& residual, const Pack<T, N>& x, const Pack<T, N>& gate) {
  Pack<T, N> r;
#pragma unroll
  for (int j = 0; j < N; j += 2) put(r, j, __hfma2(pair(gate, j), pair(x, j), pair(residual, j)));
  return r;
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> multiply_rounded(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> y;
#pragma unroll
  for (int j = 0; j < N; j += 2) put(y, j, __hmul2_rn(pair(a, j), pair(b, j)));
  return y;
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> add_rounded(const Pack<T, N>& a, const Pack<T, N>& b) {
  Pack<T, N> y;
#pragma unroll
  for (int j = 0; j < N; j += 2) put(y, j, __hadd2_rn(pair(a, j), pair(b, j)));
  return y;
}

// v * rstd, which is in float32, and the product with the weight
template <class T, int N>
__device__ __forceinline__ Pack<T, N> normalize_rounded(const Pack<T, N>& v, float rstd, const Pack<T, N>& weight) {
  float n[N];
  to_floats(n, v);
#pragma unroll
  for (int j = 0; j < N; ++j) n[j] = __fmul_rn(n[j], rstd);
  return multiply_rounded(from_floats<T, N>(n), weight);
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> one_plus(const Pack<T, N>& scale) {
  const auto one = twice(from_float<T>(1.0f));
  Pack<T, N> factor;
#pragma unroll
  for (int j = 0; j < N; j += 2) put(factor, j, __hadd2_rn(one, pair(scale, j)));
  return factor;
}

// n * factor + shift
template <class T, int N>
__device__ __forceinline__ Pack<T, N> modulate_rounded_by(const Pack<T, N>& n, const Pack<T, N>& factor, const Pack<T, N>& shift) {
  Pack<T, N> y;
#pragma unroll
  for (int j = 0; j < N; j += 2) put(y, j, __hadd2_rn(__hmul2_rn(pair(n, j), pair(factor, j)), pair(shift, j)));
  return y;
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> modulate_rounded(const Pack<T, N>& n, const Pack<T, N>& scale, const Pack<T, N>& shift) {
  return modulate_rounded_by(n, one_plus(scale), shift);
}

}  // namespace ditnorm
