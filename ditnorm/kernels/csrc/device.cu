#include <cuda_runtime.h>

#include "device.h"

namespace ditnorm {

#ifdef __CUDACC__

__global__ void probe_kernel() {}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Finding a kernel's code fails for a driver older than the toolkit, and for a GPU that none of the
// embedded code fits.
const char* unusable(int device) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  const bool elsewhere = error == cudaSuccess && device >= 0 && device != current;
  if (elsewhere) error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, &probe_kernel);
  if (elsewhere) cudaSetDevice(current);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clear it: PyTorch's next check would report it as its own
  return cudaGetErrorString(error);
}

#else

const char* error_string(int error) { return error == 0 ? "no error" : "the simulator failed"; }

const char* unusable(int) { return std::getenv("CPU_SIM_UNUSABLE"); }

#endif

}  // namespace ditnorm
