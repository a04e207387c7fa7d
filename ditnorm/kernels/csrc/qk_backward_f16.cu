#include "qk_launch.cuh"

template int ditnorm::launch_qk_kernels<__half, true>(const HeadProblem&, void*);
