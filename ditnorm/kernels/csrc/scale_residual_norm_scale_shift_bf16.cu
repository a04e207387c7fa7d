#include "row_launch.cuh"

template int ditnorm::launch_row_kernels<true, __nv_bfloat16>(const Problem&, DType, void*);
