#include "norm_site.cuh"

namespace ditnorm {

int norm_scale_shift(const Problem& p, void* stream) { return launch_norm_site<Op::norm_scale_shift>(p, stream); }

}  // namespace ditnorm
