// The formulas of the ops for one element, in every law. ROUND: each intermediate is rounded to T ("eager" with a half-precision law);
// otherwise float32 throughout.
#pragma once
#include "numerics.cuh"

namespace ditnorm {

// residual + gate * x
template <class T, bool ROUND>
__device__ __forceinline__ float add_gated(float residual, float x, bool has_gate, float gate) {
  return __fadd_rn(residual, has_gate ? round_to<T, ROUND>(__fmul_rn(gate, x)) : x);
}

// Whether weight or bias is of another dtype than x: then the norm computes in float32 and rounds once, as FP32LayerNorm does.
__device__ __forceinline__ bool wide_affine(const Problem& p) {
  return (p.weight.data != nullptr && p.weight.dtype != p.x.dtype) || (p.bias.data != nullptr && p.bias.dtype != p.x.dtype);
}

// (v - mean) * rstd, and the norm's affine as ATen contracts it. `wide`: see wide_affine.
template <Norm NORM, class T, bool ROUND>
__device__ __forceinline__ float normalize(float v, float mean, float rstd, bool has_weight, float weight, bool has_bias, float bias, bool wide) {
  if constexpr (NORM == Norm::layer) {
    const float centered = __fsub_rn(v, mean);
    if (!has_weight) return round_to<T, ROUND>(has_bias ? __fmaf_rn(rstd, centered, bias) : __fmul_rn(rstd, centered));
    const float n = __fmul_rn(rstd, centered);
    return round_to<T, ROUND>(has_bias ? __fmaf_rn(weight, n, bias) : __fmul_rn(weight, n));
  } else {
    float n = __fmul_rn(rstd, v);
    if (has_weight) n = __fmul_rn(weight, n);
    if (!has_bias) return round_to<T, ROUND>(n);
    if (!wide) n = round_to<T, ROUND>(n);  // torch's rms_norm has no bias: it is an addition of its own
    return round_to<T, ROUND>(__fadd_rn(n, bias));
  }
}

// n * (1 + scale)
template <class T, bool ROUND>
__device__ __forceinline__ float scaled(float n, float scale) {
  return round_to<T, ROUND>(__fmul_rn(n, round_to<T, ROUND>(__fadd_rn(1.0f, scale))));
}

}  // namespace ditnorm
