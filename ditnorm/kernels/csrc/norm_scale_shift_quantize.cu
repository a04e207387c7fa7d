#include "row_launch.cuh"

namespace ditnorm {

int norm_scale_shift_quantize(const Problem& p, void* stream) {
  if (p.quantized.law != Law::int8_row && !has_float8()) return cudaErrorNotSupported;
  return launch_quantized_row_kernels<false>(p, stream);
}

int norm_scale_shift_quantize_again(const AgainProblem& again, void* stream) {
  using T = __nv_bfloat16;
  const Problem& p = again.norm;
  if (p.x.dtype != DType::bf16 || fast_modulation_dtype(p) != DType::bf16) return kNotServed;
  if (p.round_each) return RowLaunch<T, T, false, true, true, true>(p, stream, again.known).run();
  return RowLaunch<T, T, false, false, true, true>(p, stream, again.known).run();
}

}  // namespace ditnorm
