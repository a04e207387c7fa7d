// Choosing the kernel of norm_scale_shift and scale_residual_norm_scale_shift.
#pragma once
#include "dispatch.cuh"
#include "generic_kernel.cuh"
#include "row_kernel.cuh"

namespace ditnorm {

template <Op OP, Norm NORM, class T>
int launch_row_kernel_of(const Problem& p, DType modulation, void* stream) {
  constexpr bool kResidual = OP == Op::scale_residual_norm_scale_shift;
  if constexpr (!std::is_same_v<T, float>) {
    if (modulation == DType::f32) return launch_row_kernel<T, float, kResidual, NORM, false>(p, stream);
    if (p.round_each) return launch_row_kernel<T, T, kResidual, NORM, true>(p, stream);
  }
  return launch_row_kernel<T, T, kResidual, NORM, false>(p, stream);
}

template <Op OP, Norm NORM>
int launch_norm(const Problem& p, void* stream) {
  const DType modulation = p.width <= kMaxItems * kTile ? fast_modulation_dtype(p) : DType::u8;
  if (modulation == DType::u8) return launch_generic_kernel<OP, NORM>(p, stream);
  switch (p.x.dtype) {
    case DType::f32: return launch_row_kernel_of<OP, NORM, float>(p, modulation, stream);
    case DType::f16: return launch_row_kernel_of<OP, NORM, __half>(p, modulation, stream);
    default: return launch_row_kernel_of<OP, NORM, __nv_bfloat16>(p, modulation, stream);
  }
}

template <Op OP>
int launch_norm_site(const Problem& p, void* stream) {
  return p.norm == Norm::layer ? launch_norm<OP, Norm::layer>(p, stream) : launch_norm<OP, Norm::rms>(p, stream);
}

}  // namespace ditnorm
