// Choosing the kernel of norm_scale_shift and scale_residual_norm_scale_shift.
#pragma once
#include "dispatch.cuh"
#include "generic_kernel.cuh"

namespace ditnorm {

// In row_launch.cuh.
template <bool RESIDUAL, class T>
int launch_row_kernels(const Problem& p, DType modulation, void* stream);

template <Op OP>
int launch_norm_site(const Problem& p, void* stream) {
  constexpr bool kResidual = OP == Op::scale_residual_norm_scale_shift;
  const DType modulation = p.width <= kMaxItems * kTile ? fast_modulation_dtype(p) : DType::u8;
  if (modulation == DType::u8) {
    return p.norm == Norm::layer ? launch_generic_kernel<OP, Norm::layer>(p, stream) : launch_generic_kernel<OP, Norm::rms>(p, stream);
  }
  switch (p.x.dtype) {
    case DType::f32: return launch_row_kernels<kResidual, float>(p, modulation, stream);
    case DType::f16: return launch_row_kernels<kResidual, __half>(p, modulation, stream);
    default: return launch_row_kernels<kResidual, __nv_bfloat16>(p, modulation, stream);
  }
}

}  // namespace ditnorm
