// Of norm_backward.cuh, in a file for each dtype, so that they compile side by side.
#pragma once
#include "problem.h"

namespace ditnorm {

// Returns kNotServed where none of the fast kernels serves the problem.
template <class T>
int launch_norm_backward(const SiteBackward& b, DType modulation, void* stream);

}  // namespace ditnorm
