#include "qk_launch.cuh"

template int ditnorm::launch_qk_kernels<float, false>(const HeadProblem&, void*);
