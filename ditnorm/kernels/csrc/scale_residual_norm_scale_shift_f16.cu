#include "row_launch.cuh"

template int ditnorm::launch_row_kernels<true, __half>(const Problem&, DType, void*);
