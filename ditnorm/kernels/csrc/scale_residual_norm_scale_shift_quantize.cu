#include "row_launch.cuh"

namespace ditnorm {

int scale_residual_norm_scale_shift_quantize(const Problem& p, void* stream) {
  if (p.quantized.law != Law::int8_row && !has_float8()) return cudaErrorNotSupported;
  return launch_quantized_row_kernels<true>(p, stream);
}

}  // namespace ditnorm
