#include "qk_launch.cuh"

template int ditnorm::launch_qk_kernels<__nv_bfloat16, false>(const HeadProblem&, void*);
