#include "norm_backward.cuh"

template int ditnorm::launch_norm_backward<__nv_bfloat16>(const SiteBackward&, DType, void*);
