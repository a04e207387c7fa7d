// Runs the CUDA kernels on the host, for tests without a GPU:
//   g++ -x c++ -include cpu_sim.h -ffp-contract=off kernels.cu
//
// One block runs at a time. Its threads are fibers of one OS thread, so __syncthreads and the warp
// shuffles are real rendezvous points. That finds wrong indices, masks and tails, missing barriers
// (CPU_SIM_ORDER below) and, under -fsanitize=address,undefined, accesses out of bounds and
// misaligned ones. It says nothing of speed or of memory order, and doesn't know inline PTX.
//
// CPU_SIM_ORDER=0 (default): threads take turns in order; 1: in reverse; n > 1: in an order drawn
// from seed n, with warps held back.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

#undef __shared__
#define __shared__ static  // one block at a time: see launch_mutex
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline

namespace cpu_sim {

// ---- Stack switching

#ifdef __x86_64__
// swapcontext does the same with a system call for the signal mask, ten times slower.
using Context = void*;  // the stack pointer; the callee-saved registers lie above it
extern "C" void cpu_sim_switch(Context* from, Context to);
asm(R"(
  .text
  .weak cpu_sim_switch
  .hidden cpu_sim_switch
  .type cpu_sim_switch, @function
cpu_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cpu_sim_switch, .-cpu_sim_switch
)");

inline void switch_context(Context& from, Context& to) { cpu_sim_switch(&from, to); }

inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // a return address for entry, which never returns
  *--top = reinterpret_cast<void*>(entry);
  context = std::memset(top - 6, 0, 6 * sizeof(void*));
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  makecontext(&context, entry, 0);
}
#endif

// ---- The block that runs

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 256 << 10;

struct Barrier {
  int members = 0;
  int arrived = 0;
  uint64_t generation = 0;

  void release_if_full() {
    if (arrived < members) return;
    arrived = 0;
    ++generation;
  }
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][kWarpSize];  // values in exchange; two sets, so that one barrier an exchange is enough
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};  // not zeroed: untouched pages cost nothing
  dim3 thread;
  int lane = 0;
  int warp = 0;
  bool done = false;
  const Barrier* awaited = nullptr;  // asleep until its generation is no longer `awaited_generation`
  uint64_t awaited_generation = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's

  bool asleep() const { return awaited != nullptr && awaited->generation == awaited_generation; }
};

inline dim3 grid_dim, block_dim, block_index;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline Fiber* current = nullptr;
inline Context scheduler;
inline void (*run_thread)(const void* kernel_and_arguments) = nullptr;
inline const void* kernel_and_arguments = nullptr;
inline std::mutex launch_mutex;  // all of the above and every __shared__ variable belong to one launch at a time

// AddressSanitizer has to hear of every change of stack.
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;
#ifdef __SANITIZE_ADDRESS__
inline void before_switch(void** fake_stack, const void* stack, size_t bytes) { __sanitizer_start_switch_fiber(fake_stack, stack, bytes); }
inline void after_switch(void* fake_stack, const void** old_stack, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, old_stack, bytes);
}
#else
inline void before_switch(void**, const void*, size_t) {}
inline void after_switch(void*, const void**, size_t*) {}
#endif

inline void enter(Fiber& fiber) {
  void* fake_stack = nullptr;
  current = &fiber;
  before_switch(&fake_stack, fiber.stack.get(), kStackBytes);
  switch_context(scheduler, fiber.context);
  after_switch(fake_stack, nullptr, nullptr);
}

inline void leave() {
  Fiber& fiber = *current;
  before_switch(fiber.done ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
  switch_context(fiber.context, scheduler);
  after_switch(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

inline void fiber_main() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  run_thread(kernel_and_arguments);
  current->done = true;
  for (Barrier* barrier : {&block_barrier, &warps[current->warp].barrier}) {  // a finished thread takes no part in barriers
    --barrier->members;
    if (barrier->arrived > 0) barrier->release_if_full();
  }
  leave();
}

inline void wait(Barrier& barrier) {
  current->awaited = &barrier;
  current->awaited_generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_full();
  while (current->asleep()) leave();
}

[[noreturn]] inline void die(const char* message) {
  std::fprintf(stderr, "cpu_sim: %s\n", message);
  std::abort();
}

// ---- The scheduler

class Turns {  // who runs, and in which order
 public:
  void start(int threads) {
    order_.resize(threads);
    std::iota(order_.begin(), order_.end(), 0);
    if (mode_ == 1) std::reverse(order_.begin(), order_.end());
  }
  const std::vector<int>& next_round() {
    if (mode_ > 1) {
      std::shuffle(order_.begin(), order_.end(), random_);
      if (rounds_left_-- == 0) {
        favoured_ = static_cast<int>(random_() % (warps.size() + 1));  // one past the last: nobody is held back
        rounds_left_ = static_cast<int>(random_() % 40);
      }
    }
    return order_;
  }
  // Some warps run far ahead of the others, which brings out a missing barrier.
  bool held_back(const Fiber& fiber) const { return holding() && fiber.warp != favoured_; }
  bool holding() const { return favoured_ < static_cast<int>(warps.size()); }
  void release() { favoured_ = static_cast<int>(warps.size()); }

 private:
  int mode_ = std::getenv("CPU_SIM_ORDER") ? std::atoi(std::getenv("CPU_SIM_ORDER")) : 0;
  std::minstd_rand random_{static_cast<unsigned>(mode_)};
  std::vector<int> order_;
  int favoured_ = 1 << 30;
  int rounds_left_ = 0;
};
inline Turns turns;

inline void run_block() {
  const int threads = static_cast<int>(block_dim.x * block_dim.y * block_dim.z);
  if (static_cast<int>(fibers.size()) < threads) fibers.resize(threads);
  warps.assign((threads + kWarpSize - 1) / kWarpSize, Warp{});
  block_barrier = Barrier{threads, 0, 0};
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.thread = dim3(i % block_dim.x, i / block_dim.x % block_dim.y, i / (block_dim.x * block_dim.y));
    fiber.lane = i % kWarpSize;
    fiber.warp = i / kWarpSize;
    fiber.done = false;
    fiber.awaited = nullptr;
    ++warps[fiber.warp].barrier.members;
    make_context(fiber.context, fiber.stack.get(), kStackBytes, fiber_main);
  }
  turns.start(threads);
  for (int unfinished = threads; unfinished > 0;) {
    bool progress = false;
    for (int i : turns.next_round()) {
      Fiber& fiber = fibers[i];
      if (fiber.done || fiber.asleep() || turns.held_back(fiber)) continue;
      enter(fiber);
      progress = true;
      if (fiber.done) --unfinished;
    }
    if (progress) continue;
    if (!turns.holding()) die("deadlock: not every thread of the block or warp reaches a barrier");
    turns.release();
  }
}

template <class T>
T exchange(unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  if (mask != 0xffffffffu) die("shuffles of a part of a warp are not simulated");
  Warp& warp = warps[current->warp];
  uint64_t* slots = warp.slots[warp.barrier.generation % 2];
  std::memcpy(&slots[current->lane], &value, sizeof value);
  wait(warp.barrier);
  std::memcpy(&value, &slots[source_lane], sizeof value);
  return value;
}

}  // namespace cpu_sim

// Runs every block of `grid`, one after the other. Callable from any OS thread. Returns
// cudaSuccess.
template <class... Params, class... Args>
int sim_launch(void (*kernel)(Params...), dim3 grid, dim3 block, Args... args) {
  const std::lock_guard<std::mutex> lock(cpu_sim::launch_mutex);
  const auto call = [&] { kernel(static_cast<Params>(args)...); };
  cpu_sim::kernel_and_arguments = &call;
  cpu_sim::run_thread = [](const void* closure) { (*static_cast<decltype(&call)>(closure))(); };
  cpu_sim::grid_dim = grid;
  cpu_sim::block_dim = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        cpu_sim::block_index = dim3(x, y, z);
        cpu_sim::run_block();
      }
    }
  }
  return 0;
}

// ---- What CUDA C++ gives a kernel

#define threadIdx (cpu_sim::current->thread)
#define blockIdx (cpu_sim::block_index)
#define blockDim (cpu_sim::block_dim)
#define gridDim (cpu_sim::grid_dim)

inline void __syncthreads() { cpu_sim::wait(cpu_sim::block_barrier); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = cpu_sim::current->lane;
  return cpu_sim::exchange(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cpu_sim::current->lane;
  const int source = lane + static_cast<int>(delta);
  return cpu_sim::exchange(mask, value, source <= (lane | (width - 1)) ? source : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = cpu_sim::current->lane;
  const int source = lane ^ lane_mask;
  return cpu_sim::exchange(mask, value, source <= (lane | (width - 1)) ? source : lane);
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline int __float2int_rn(float a) {
  if (std::isnan(a)) return 0;
  return a < -0x1p31f ? -0x7fffffff - 1 : a >= 0x1p31f ? 0x7fffffff : static_cast<int>(std::nearbyint(a));
}
inline float rsqrtf(float a) { return __frsqrt_rn(a); }  // a GPU's own is up to 2 ulp away

inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const auto one = [](__half x, __half y, __half z) {
    return __double2half(
        std::fma(static_cast<double>(__half2float(x)), static_cast<double>(__half2float(y)), static_cast<double>(__half2float(z))));
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  const auto one = [](__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
    return __double2bfloat16(std::fma(static_cast<double>(__bfloat162float(x)), static_cast<double>(__bfloat162float(y)),
                                      static_cast<double>(__bfloat162float(z))));
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}
