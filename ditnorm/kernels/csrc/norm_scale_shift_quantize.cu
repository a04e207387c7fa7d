#include "row_launch.cuh"

namespace ditnorm {

int norm_scale_shift_quantize(const Problem& p, void* stream) {
  if (p.quantized.law != Law::int8_row && !has_float8()) return cudaErrorNotSupported;
  return launch_quantized_row_kernels<false>(p, stream);
}

}  // namespace ditnorm
