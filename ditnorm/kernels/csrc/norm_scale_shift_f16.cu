#include "row_launch.cuh"

template int ditnorm::launch_row_kernels<false, __half>(const Problem&, DType, void*);
