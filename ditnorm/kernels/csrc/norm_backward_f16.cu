#include "norm_backward.cuh"

template int ditnorm::launch_norm_backward<__half>(const SiteBackward&, DType, void*);
