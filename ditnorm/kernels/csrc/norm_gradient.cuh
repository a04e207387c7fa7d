// The gradient of a row that LayerNorm or RMSNorm has normed, in the order of ATen's
// layer_norm_grad_input_kernel_vectorized, whose lanes and reduction are those of statistics.cuh.
// The fused multiply-adds are those that nvcc contracts there (read off its machine code).
//
//   g = dn * weight                                     dn: the gradient of the norm's result
//   sum = sum of g,  dot = sum of g * (v - mean) * rstd
//   dv = (D * g - (v - mean) * rstd * dot - sum) * rstd / D    RMSNorm: no sum, and mean is 0
#pragma once
#include "statistics.cuh"

namespace ditnorm {

// v - mean. NORM: Norm::rms where that is known to the compiler, which doesn't leave out that zero by
// itself, nor a sum that goes through shuffles; else either norm.
template <Norm NORM>
__device__ __forceinline__ float delta_of(float v, float mean) {
  return NORM == Norm::rms ? v : __fsub_rn(v, mean);
}

// What the elements of a lane add to its sums: `sum` in the place of a mean, `dot` in that of m2.
template <Norm NORM = Norm::layer>
__device__ __forceinline__ void add_gradient(Welford& lane, float dn, float weight, float v, const Statistics& statistics) {
  const float g = __fmul_rn(dn, weight);
  if constexpr (NORM == Norm::layer) lane.mean = __fadd_rn(lane.mean, g);
  lane.m2 = __fmaf_rn(__fmul_rn(g, delta_of<NORM>(v, statistics.mean)), statistics.rstd, lane.m2);
}

// The same where there is no weight and v - mean is at hand. The compiler leaves out no product by 1.
__device__ __forceinline__ void add_unweighted_gradient(Welford& lane, float dn, float delta, float rstd) {
  lane.mean = __fadd_rn(lane.mean, dn);
  lane.m2 = __fmaf_rn(__fmul_rn(dn, delta), rstd, lane.m2);
}

// Of one row, all that its elements share.
struct RowGradient {
  Statistics statistics;
  float sum, dot, width, factor;
  bool centred;

  template <Norm NORM = Norm::layer>
  __device__ __forceinline__ float of(float dn, float weight, float v) const {
    const float n = __fmul_rn(delta_of<NORM>(v, statistics.mean), statistics.rstd);
    float gradient = __fmaf_rn(__fmul_rn(width, weight), dn, -__fmul_rn(n, dot));
    if (centred) gradient = __fsub_rn(gradient, sum);
    return __fmul_rn(gradient, factor);
  }

  // As add_unweighted_gradient. `sum` is taken off in any case: RMSNorm's has to be 0.
  __device__ __forceinline__ float of_unweighted(float dn, float delta) const {
    const float n = __fmul_rn(delta, statistics.rstd);
    return __fmul_rn(__fsub_rn(__fmaf_rn(width, dn, -__fmul_rn(n, dot)), sum), factor);
  }
};

__device__ __forceinline__ RowGradient row_gradient(const Statistics& statistics, const Welford& sums, int64_t elements, bool centred) {
  const float width = static_cast<float>(elements);
  return {statistics, sums.mean, sums.m2, width, __fmul_rn(__frcp_rn(width), statistics.rstd), centred};
}

}  // namespace ditnorm
