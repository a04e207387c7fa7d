// The formulas of the ops for one element, in every law. ROUND: each intermediate is rounded to T ("eager" with a half-precision law);
// otherwise float32 throughout.
#pragma once
#include "numerics.cuh"

namespace ditnorm {

// What stands for an operand that isn't given: it changes no bit (x + -0 is x even for x = -0), and formulas need no branches.
constexpr float kNoWeight = 1.0f, kNoBias = -0.0f, kNoGate = 1.0f, kNoScale = 0.0f, kNoShift = -0.0f;

// residual + gate * x
template <class T, bool ROUND>
__device__ __forceinline__ float add_gated(float residual, float x, float gate) {
  return __fadd_rn(residual, round_to<T, ROUND>(__fmul_rn(gate, x)));
}

// (v - mean) * rstd, and the norm's affine as ATen contracts it. RMSNorm: mean is 0, and bias kNoBias (see normalize_rms).
template <class T, bool ROUND>
__device__ __forceinline__ float normalize(float v, float mean, float rstd, float weight, float bias) {
  return round_to<T, ROUND>(__fmaf_rn(weight, __fmul_rn(rstd, __fsub_rn(v, mean)), bias));
}

// A LayerNorm with a bias but no weight, which no module has. ATen contracts the bias with the normalisation; seen on an H200, 7 % of its
// float32 results differ from this all the same, so "eager" promises no exactness here.
template <class T, bool ROUND>
__device__ __forceinline__ float normalize_bias_only(float v, float mean, float rstd, float bias) {
  return round_to<T, ROUND>(__fmaf_rn(rstd, __fsub_rn(v, mean), bias));
}

// An RMSNorm with a bias. torch's rms_norm has none: it is an addition of its own, after a rounding of its own. `wide`: weight or bias is
// of another dtype than x; then the norm computes in float32 and rounds once, as FP32LayerNorm does.
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

}  // namespace ditnorm
