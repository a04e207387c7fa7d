// Choosing the kernel of norm_scale_shift and scale_residual_norm_scale_shift.
#pragma once
#include "dispatch.cuh"
#include "generic_kernel.cuh"

namespace ditnorm {

// In row_launch.cuh. Returns kNotServed where none of the fast kernels serves the problem.
template <bool RESIDUAL, class T>
int launch_row_kernels(const Problem& p, DType modulation, void* stream);

template <Op OP>
int launch_fast_kernel(const Problem& p, void* stream) {
  constexpr bool kResidual = OP == Op::scale_residual_norm_scale_shift;
  const DType modulation = fast_modulation_dtype(p);
  if (modulation == DType::u8) return kNotServed;
  switch (p.x.dtype) {
    case DType::f32: return launch_row_kernels<kResidual, float>(p, modulation, stream);
    case DType::f16: return launch_row_kernels<kResidual, __half>(p, modulation, stream);
    default: return launch_row_kernels<kResidual, __nv_bfloat16>(p, modulation, stream);
  }
}

template <Op OP>
int launch_norm_site(const Problem& p, void* stream) {
  if (p.norm == Norm::diffusers_rms) return mean_norm(p, stream);
  if (const int result = launch_fast_kernel<OP>(p, stream); result != kNotServed) return result;
  return p.norm == Norm::layer ? launch_generic_kernel<OP, Norm::layer>(p, stream) : launch_generic_kernel<OP, Norm::rms>(p, stream);
}

}  // namespace ditnorm
