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

// silu(x), and what its gradient takes, as ATen computes both.
struct Silu {
  float x, sigmoid, result;
  __device__ __forceinline__ explicit Silu(float x) : x(x) {
    const float divisor = __fadd_rn(1.0f, expf(-x));
    sigmoid = __frcp_rn(divisor);
    result = __fdiv_rn(x, divisor);
  }

  // d: that of the result.
  __device__ __forceinline__ float gradient(float d) const {
    return __fmul_rn(__fmul_rn(d, sigmoid), __fmaf_rn(x, __fsub_rn(1.0f, sigmoid), 1.0f));
  }
};

__device__ __forceinline__ float silu(float x) { return Silu(x).result; }

// What __fdiv_rn computes where neither d nor the quotient is out of the common, without the branch
// behind which it looks for that. d > 0. (x is subtracted so that -0 stays what it is.)
__device__ __forceinline__ float divide(float x, float d) {
#ifdef __CUDA_ARCH__
  float guess;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(d));
#else
  const float guess = 1.0f / d;
#endif
  const float reciprocal = __fmaf_rn(guess, __fmaf_rn(-d, guess, 1.0f), guess);
  const float quotient = __fmul_rn(x, reciprocal), excess = __fmaf_rn(d, quotient, -x);
  return __fmaf_rn(-excess, reciprocal, quotient);
}

// silu of N elements that come from a half-precision type.
template <int N>
__device__ __forceinline__ void silu_of_halves(float (&v)[N]) {
  constexpr float kCommon = 80.0f;  // exp of it is far from the largest float32
  bool common = true;
#pragma unroll
  for (int j = 0; j < N; ++j) common &= fabsf(v[j]) < kCommon;
  if (unlikely(!common)) {
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = silu(v[j]);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = divide(v[j], __fadd_rn(1.0f, expf(-v[j])));
  }
}

// silu(x) * value. ROUNDED: silu(x) is rounded to T before.
template <class T>
__device__ __forceinline__ float swiglu(float x, float value, bool rounded) {
  const float gate = silu(x);
  return __fmul_rn(rounded ? round_to<T>(gate) : gate, value);
}

}  // namespace ditnorm
