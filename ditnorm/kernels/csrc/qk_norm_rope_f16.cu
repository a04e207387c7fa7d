#include "qk_launch.cuh"

template int ditnorm::launch_qk_kernels<__half>(const HeadProblem&, void*);
