#include "row_launch.cuh"

template int ditnorm::launch_row_kernels<false, float>(const Problem&, DType, void*);
