// Loops over constants.
#pragma once
#include <cuda_runtime.h>

#include <utility>

namespace ditnorm {

template <int I>
struct Constant {
  __host__ __device__ constexpr operator int() const { return I; }
};

// f(0), f(1), ..., each inlined with its constant. LLVM makes a copy of a loop for every condition
// that doesn't change in it; of this it makes none.
template <int... I, class F>
__device__ __forceinline__ void each(std::integer_sequence<int, I...>, F&& f) {
  (f(Constant<I>{}), ...);
}

}  // namespace ditnorm
