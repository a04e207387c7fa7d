#include "norm_site.cuh"

namespace ditnorm {

int scale_residual_norm_scale_shift(const Problem& p, void* stream) {
  return launch_norm_site<Op::scale_residual_norm_scale_shift>(p, stream);
}

}  // namespace ditnorm
