#include "norm_backward.cuh"

template int ditnorm::launch_norm_backward<float>(const SiteBackward&, DType, void*);
