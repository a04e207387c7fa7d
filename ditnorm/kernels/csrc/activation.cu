// An activation, written behind what the next linear layer reads beside it.
#include "activation.h"
#include "activations.cuh"
#include "dispatch.cuh"
#include "formulas.cuh"
#include "launch.h"
#include "row_blocks.h"

namespace ditnorm {

constexpr int kActivationThreads = 128;

template <class T>
__device__ __forceinline__ const T* row_of(const Rows& rows, int64_t batch, int64_t token) {
  return static_cast<const T*>(rows.data) + batch * rows.batch_stride + token * rows.token_stride;
}

// `parts`: the blocks of one row.
template <class T, Activation ACTIVATION>
__global__ void __launch_bounds__(kMostRowThreads) activation_kernel(const ActivationProblem p, const unsigned parts) {
  constexpr int N = 16 / sizeof(T);
  const unsigned token = parts == 1 ? blockIdx.x : blockIdx.x / parts;
  const int beside = static_cast<int>(p.beside_width), width = beside + static_cast<int>(p.width);
  const int column = static_cast<int>((blockIdx.x - token * parts) * blockDim.x + threadIdx.x) * N;
  if (column >= width) return;
  wait_for_previous_kernel();
  const int64_t batch = blockIdx.y;
  T* const y = static_cast<T*>(p.y) + (batch * p.tokens + token) * width + column;
  if (column < beside) {
    store_row<Cache::streaming>(y, load_row<Cache::normal, T, N>(row_of<T>(p.beside, batch, token) + column));
    return;
  }
  const auto packed = load_row<Cache::normal, T, N>(row_of<T>(p.x, batch, token) + column - beside);
  float v[N];
  if constexpr (ACTIVATION == Activation::gelu) {
    to_floats(v, packed);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = gelu(v[j]);
  } else {
    const auto packed_value = load_row<Cache::normal, T, N>(row_of<T>(p.value, batch, token) + column - beside);
    to_floats(v, packed);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = silu(v[j]);
    if constexpr (sizeof(T) == 2) {
      if (p.round_each) {
        store_row<Cache::streaming>(y, multiply_rounded(from_floats<T, N>(v), packed_value));
        return;
      }
    }
    float value[N];
    to_floats(value, packed_value);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = __fmul_rn(v[j], value[j]);
  }
  store_row<Cache::streaming>(y, from_floats<T, N>(v));
}

// Any width and alignment, and rows beyond those of a grid: element by element.
template <class T>
__global__ void __launch_bounds__(kActivationThreads, 4) any_activation_kernel(const ActivationProblem p) {
  wait_for_previous_kernel();
  const int64_t width = p.beside_width + p.width;
  for (int64_t row = blockIdx.x; row < p.batch * p.tokens; row += gridDim.x) {
    const int64_t batch = row / p.tokens, token = row - batch * p.tokens;
    T* const y = static_cast<T*>(p.y) + row * width;
    for (int64_t column = threadIdx.x; column < p.beside_width; column += kActivationThreads) {
      y[column] = row_of<T>(p.beside, batch, token)[column];
    }
    for (int64_t column = threadIdx.x; column < p.width; column += kActivationThreads) {
      const float x = to_float(row_of<T>(p.x, batch, token)[column]);
      y[p.beside_width + column] = from_float<T>(
          p.activation == Activation::gelu ? gelu(x) : swiglu<T>(x, to_float(row_of<T>(p.value, batch, token)[column]), p.round_each));
    }
  }
}

template <class T>
int launch_activation_kernel(const ActivationProblem& p, void* stream) {
  constexpr int64_t kMost = 0x7fffffff;
  const auto fits = [&](const Rows& rows) { return aligned16(rows.data, p.dtype, rows.batch_stride, rows.token_stride); };
  const int64_t width = p.beside_width + p.width;
  const RowBlocks row = row_blocks(width / (16 / sizeof(T)), p.activation == Activation::gelu ? 2 : 3);
  const bool fast = fits(p.x) && fits(p.value) && fits(p.beside) && p.beside_width * sizeof(T) % 16 == 0 && p.width * sizeof(T) % 16 == 0 &&
                    width <= kMost / 2 && p.tokens <= kMost / row.count && p.batch <= 0xffff;
  if (!fast) return launch(&any_activation_kernel<T>, blocks(p.batch * p.tokens), kActivationThreads, stream, p);
  const dim3 grid(static_cast<unsigned>(p.tokens) * row.count, static_cast<unsigned>(p.batch));
  const auto go = [&](auto kernel) { return launch(kernel, grid, row.threads, stream, p, row.count); };
  if (p.activation == Activation::gelu) return go(&activation_kernel<T, Activation::gelu>);
  return go(&activation_kernel<T, Activation::swiglu>);
}

int activate(const ActivationProblem& p, void* stream) {
  switch (p.dtype) {
    case DType::f32: return launch_activation_kernel<float>(p, stream);
    case DType::f16: return launch_activation_kernel<__half>(p, stream);
    default: return launch_activation_kernel<__nv_bfloat16>(p, stream);
  }
}

}  // namespace ditnorm
