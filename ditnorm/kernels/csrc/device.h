// What the CUDA runtime says.
#pragma once

namespace ditnorm {

const char* error_string(int error);
// Null, or why this process's driver and a GPU can't run the kernels. -1: the current GPU.
const char* unusable(int device);

}  // namespace ditnorm
