#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "problem.h"

namespace ditnorm {

// In qk_launch.cuh.
template <class T, bool BACKWARD>
int launch_qk_kernels(const HeadProblem& p, void* stream);

template <bool BACKWARD>
int launch_qk(const HeadProblem& p, void* stream) {
  switch (p.dtype) {
    case DType::f32: return launch_qk_kernels<float, BACKWARD>(p, stream);
    case DType::f16: return launch_qk_kernels<__half, BACKWARD>(p, stream);
    default: return launch_qk_kernels<__nv_bfloat16, BACKWARD>(p, stream);
  }
}

int qk_norm_rope(const HeadProblem& p, void* stream) { return launch_qk<false>(p, stream); }
int qk_norm_rope_backward(const HeadProblem& p, void* stream) { return launch_qk<true>(p, stream); }

}  // namespace ditnorm
