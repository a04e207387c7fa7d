// Launching a kernel, on a GPU or in the simulator (cpu_sim.h).
//
// On Hopper and later a kernel is launched early: its blocks start while the kernel before it in
// the stream is still finishing, and wait in wait_for_previous_kernel, which each kernel here calls
// before it touches memory (CUDA's programmatic dependent launch). That hides most of a launch's
// latency. A kernel here lets the next one start as soon as the last of its own blocks has.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace ditnorm {

__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// One block a row, up to the largest grid; for kernels that loop over the rest.
inline dim3 blocks(int64_t rows) { return dim3(static_cast<unsigned>(std::min<int64_t>(rows, 0x7fffffff))); }

#ifdef __CUDACC__
// Whether the code of the kernels that the current GPU runs has the wait in it: it is compiled in
// for compute capability 9.0 and later, and such a GPU may run the PTX of a lower one.
template <class Kernel>
bool waits_for_previous_kernel(Kernel kernel) {
  constexpr int kDevices = 64;
  static std::atomic<int8_t> known[kDevices];  // 0: not asked yet, 1: no, 2: yes
  int device;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  int8_t answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    cudaFuncAttributes attributes;
    const bool found = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    if (!found) cudaGetLastError();
    answer = found && attributes.ptxVersion >= 90 ? 2 : 1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}
#else
template <class Kernel>
bool waits_for_previous_kernel(Kernel) {
  return true;
}
#endif

// Shared memory of a size that the launch says: more than the 48 KB that a kernel may declare.
template <class Contents>
__device__ __forceinline__ Contents& launched_with() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char launch_memory[];
  return *reinterpret_cast<Contents*>(launch_memory);
#else
  static Contents contents;
  return contents;
#endif
}

// How many blocks of `threads` threads and `bytes` of shared memory run at the same time, for
// kernels that go from row to row; 0 on a GPU that hasn't the bytes for LEAST a multiprocessor. Lets
// the kernel have them.
#ifdef __CUDACC__
template <auto KERNEL, int LEAST = 1>
int resident_blocks(unsigned threads, int bytes = 0) {
  constexpr int kDevices = 64, kWarps = 33;
  static std::atomic<int> known[kDevices][kWarps];  // one more; 0: not asked yet
  int device, processors = 0, each = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return bytes == 0 ? 1 : 0;
  std::atomic<int>& answer = known[device][threads / 32];
  if (answer.load(std::memory_order_relaxed) == 0) {
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    const bool fits = bytes == 0 || cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess;
    if (!fits) cudaGetLastError();
    if (fits) cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, KERNEL, static_cast<int>(threads), static_cast<size_t>(bytes));
    answer.store(each < LEAST ? 1 : 1 + processors * each, std::memory_order_relaxed);
  }
  return answer.load(std::memory_order_relaxed) - 1;
}
#else
template <auto, int = 1>
int resident_blocks(unsigned, int = 0) {
  return 3;
}
#endif

// A cluster of blocks, which read each other's shared memory, is what GPUs of compute capability 9.0
// and later run. The host runs one block at a time, and so a cluster of one.
#ifdef __CUDACC__
constexpr unsigned kClusterBlocks = 8;  // no more run on all of them

// Whether the current GPU runs a kernel as a cluster of blocks of at most `threads` threads, always
// the same number.
template <auto KERNEL>
bool runs_as_cluster(unsigned threads) {
  constexpr int kDevices = 64;
  static std::atomic<int8_t> known[kDevices];  // 0: not asked yet, 1: no, 2: yes
  int device, clusters = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  int8_t answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kClusterBlocks, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(kClusterBlocks);
    config.blockDim = dim3(threads);
    config.attrs = &attribute;
    config.numAttrs = 1;
    const bool asked = waits_for_previous_kernel(KERNEL) && cudaOccupancyMaxActiveClusters(&clusters, KERNEL, &config) == cudaSuccess;
    if (!asked) cudaGetLastError();
    answer = asked && clusters > 0 ? 2 : 1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}
#else
constexpr unsigned kClusterBlocks = 1;
template <auto>
bool runs_as_cluster(unsigned) {
  return true;
}
#endif

// `bytes`: of shared memory, for launched_with. `cluster`: whether all blocks are one cluster (see
// runs_as_cluster).
template <class... Params, class... Args>
int launch_as(int bytes, bool cluster, void (*kernel)(Params...), dim3 grid, unsigned threads, void* stream, const Args&... args) {
#ifdef __CUDACC__
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (waits_for_previous_kernel(kernel)) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {grid.x, 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error != cudaSuccess) cudaGetLastError();  // clear it: PyTorch's next check would report it as its own
  return error;
#else
  (void)stream, (void)bytes, (void)cluster;
  return sim_launch(kernel, grid, dim3(threads), args...);
#endif
}

template <class... Params, class... Args>
int launch_with(int bytes, void (*kernel)(Params...), dim3 grid, unsigned threads, void* stream, const Args&... args) {
  return launch_as(bytes, false, kernel, grid, threads, stream, args...);
}

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), dim3 grid, unsigned threads, void* stream, const Args&... args) {
  return launch_with(0, kernel, grid, threads, stream, args...);
}

}  // namespace ditnorm
