// Activations as ATen computes them in float32, their multiply-adds contracted as nvcc contracts
// them there.
#pragma once
#include <cmath>

#include "numerics.cuh"

namespace ditnorm {

// GELU in its tanh approximation.
__device__ __forceinline__ float gelu(float x) {
  constexpr float kBeta = static_cast<float>(M_SQRT2 * M_2_SQRTPI * 0.5), kKappa = 0.044715f;
  const float cube = __fmul_rn(__fmul_rn(x, x), x);
  const float inner = __fmul_rn(kBeta, __fmaf_rn(kKappa, cube, x));
  return __fmul_rn(__fmul_rn(0.5f, x), __fadd_rn(1.0f, tanhf(inner)));
}

__device__ __forceinline__ float silu(float x) { return __fdiv_rn(x, __fadd_rn(1.0f, expf(-x))); }

// silu(x) * value. ROUNDED: silu(x) is rounded to T before.
template <class T>
__device__ __forceinline__ float swiglu(float x, float value, bool rounded) {
  const float gate = silu(x);
  return __fmul_rn(rounded ? round_to<T>(gate) : gate, value);
}

// The gradients of swiglu, given d, that of its result.
struct SwigluGradient {
  float of_x, of_value;
};

template <class T>
__device__ __forceinline__ SwigluGradient swiglu_gradient(float d, float x, float value, bool rounded) {
  const float divisor = __fadd_rn(1.0f, expf(-x)), sigmoid = __frcp_rn(divisor), gate = __fdiv_rn(x, divisor);
  const float d_gate = __fmul_rn(d, value);
  const float slope = __fmaf_rn(x, __fsub_rn(1.0f, sigmoid), 1.0f);
  return {__fmul_rn(__fmul_rn(rounded ? round_to<T>(d_gate) : d_gate, sigmoid), slope), __fmul_rn(d, rounded ? round_to<T>(gate) : gate)};
}

}  // namespace ditnorm
