// The gradient through diffusers' RMSNorm, whose two uses of x each round theirs.
#pragma once
#include "numerics.cuh"

namespace ditnorm {

// Of one row or head, what its elements share.
struct MeanSquareGradient {
  float rstd, of_square;

  // Through the product with rstd, whose gradient is dn, and through the mean of squares.
  template <class T, bool ROUND>
  __device__ __forceinline__ float direct(float dn) const {
    return round_to<T, ROUND>(__fmul_rn(dn, rstd));
  }
  template <class T, bool ROUND>
  __device__ __forceinline__ float squared(float v) const {
    return round_to<T, ROUND>(__fmul_rn(of_square, __fmul_rn(2.0f, v)));
  }
  // The same of 2 v.
  __device__ __forceinline__ float of_twice(float twice_v) const { return __fmul_rn(of_square, twice_v); }
  template <class T, bool ROUND>
  __device__ __forceinline__ float of(float dn, float v) const {
    return __fadd_rn(direct<T, ROUND>(dn), squared<T, ROUND>(v));
  }
};

// dot: sum of dn * v over the row.
__device__ __forceinline__ MeanSquareGradient mean_square_gradient(float rstd, float dot, int64_t width) {
  const float cubed = __fmul_rn(__fmul_rn(rstd, rstd), rstd);
  return {rstd, __fmul_rn(__fmul_rn(__fmul_rn(-0.5f, dot), cubed), __frcp_rn(static_cast<float>(width)))};
}

}  // namespace ditnorm
