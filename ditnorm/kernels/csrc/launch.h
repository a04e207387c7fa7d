// Launching a kernel, on a GPU or in the simulator (cpu_sim.h).
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace ditnorm {

// One block a row, up to the largest grid; kernels loop over the rest.
inline unsigned blocks(int64_t rows) { return static_cast<unsigned>(std::min<int64_t>(rows, 0x7fffffff)); }

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), unsigned grid, unsigned threads, void* stream, const Args&... args) {
#ifdef __CUDACC__
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  return cudaGetLastError();
#else
  (void)stream;
  return sim_launch(kernel, dim3(grid), dim3(threads), args...);
#endif
}

}  // namespace ditnorm
