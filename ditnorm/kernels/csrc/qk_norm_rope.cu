#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "problem.h"

namespace ditnorm {

// In qk_launch.cuh.
template <class T>
int launch_qk_kernels(const HeadProblem& p, void* stream);

int qk_norm_rope(const HeadProblem& p, void* stream) {
  switch (p.dtype) {
    case DType::f32: return launch_qk_kernels<float>(p, stream);
    case DType::f16: return launch_qk_kernels<__half>(p, stream);
    default: return launch_qk_kernels<__nv_bfloat16>(p, stream);
  }
}

}  // namespace ditnorm
