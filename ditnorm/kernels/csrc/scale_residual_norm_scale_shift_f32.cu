#include "row_launch.cuh"

template int ditnorm::launch_row_kernels<true, float>(const Problem&, DType, void*);
