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
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = silu(v[j]);
    } else {
      silu_of_halves(v);
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

// The gradients of swiglu, of which bfloat16 has a kernel of its own.
__global__ void __launch_bounds__(kMostRowThreads) swiglu_backward_kernel(const ActivationProblem p, const unsigned parts) {
  using T = __nv_bfloat16;
  constexpr int N = 16 / sizeof(T);
  const unsigned token = parts == 1 ? blockIdx.x : blockIdx.x / parts;
  const int width = static_cast<int>(p.width), column = static_cast<int>((blockIdx.x - token * parts) * blockDim.x + threadIdx.x) * N;
  if (column >= width) return;
  wait_for_previous_kernel();
  const int64_t batch = blockIdx.y, out = (batch * p.tokens + token) * width + column;
  const auto packed = load_row<Cache::normal, T, N>(row_of<T>(p.x, batch, token) + column);
  const auto packed_value = load_row<Cache::normal, T, N>(row_of<T>(p.value, batch, token) + column);
  const auto packed_d = load_row<Cache::normal, T, N>(row_of<T>(p.dy, batch, token) + column);
  float x[N], results[N], d[N];
  to_floats(x, packed);
  auto d_value = packed_d;
  if (p.round_each) {
    to_floats(d, multiply_rounded(packed_d, packed_value));
  } else {
    float value[N];
    to_floats(d, packed_d);
    to_floats(value, packed_value);
#pragma unroll
    for (int j = 0; j < N; ++j) d[j] = __fmul_rn(d[j], value[j]);
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const Silu silu(x[j]);
    x[j] = silu.gradient(d[j]), results[j] = silu.result;
  }
  if (p.round_each) {
    d_value = multiply_rounded(packed_d, from_floats<T, N>(results));
  } else {
    to_floats(d, packed_d);
#pragma unroll
    for (int j = 0; j < N; ++j) results[j] = __fmul_rn(d[j], results[j]);
    d_value = from_floats<T, N>(results);
  }
  store_row<Cache::normal>(static_cast<T*>(p.y) + out, from_floats<T, N>(x));
  store_row<Cache::normal>(static_cast<T*>(p.d_value) + out, d_value);
}

// As any_activation_kernel.
template <class T>
__global__ void __launch_bounds__(kActivationThreads, 4) any_swiglu_backward_kernel(const ActivationProblem p) {
  wait_for_previous_kernel();
  for (int64_t row = blockIdx.x; row < p.batch * p.tokens; row += gridDim.x) {
    const int64_t batch = row / p.tokens, token = row - batch * p.tokens;
#pragma unroll 1
    for (int64_t column = threadIdx.x; column < p.width; column += kActivationThreads) {
      const auto at = [&](const Rows& rows) { return to_float(row_of<T>(rows, batch, token)[column]); };
      const auto rounded = [&](float v) { return p.round_each ? round_to<T>(v) : v; };
      const Silu silu(at(p.x));
      const float d = at(p.dy);
      static_cast<T*>(p.y)[row * p.width + column] = from_float<T>(silu.gradient(rounded(__fmul_rn(d, at(p.value)))));
      static_cast<T*>(p.d_value)[row * p.width + column] = from_float<T>(__fmul_rn(d, rounded(silu.result)));
    }
  }
}

// Of one row, and whether its accesses are of 16 bytes and a grid holds all rows.
struct ActivationLaunch {
  RowBlocks row;
  dim3 grid;
  bool fast;

  // `arrays`: as of row_blocks.
  ActivationLaunch(const ActivationProblem& p, int arrays) {
    constexpr int64_t kMost = 0x7fffffff;
    const auto fits = [&](const Rows& rows) { return aligned16(rows.data, p.dtype, rows.batch_stride, rows.token_stride); };
    const int64_t width = p.beside_width + p.width, size = bytes(p.dtype);
    row = row_blocks(width * size / 16, arrays);
    grid = dim3(static_cast<unsigned>(p.tokens) * row.count, static_cast<unsigned>(p.batch));
    fast = fits(p.x) && fits(p.value) && fits(p.beside) && fits(p.dy) && p.beside_width * size % 16 == 0 && p.width * size % 16 == 0 &&
           width <= kMost / 2 && p.tokens <= kMost / row.count && p.batch <= 0xffff;
  }
};

template <class T>
int launch_activation_kernel(const ActivationProblem& p, void* stream) {
  const ActivationLaunch how(p, p.activation == Activation::gelu ? 2 : 3);
  if (!how.fast) return launch(&any_activation_kernel<T>, blocks(p.batch * p.tokens), kActivationThreads, stream, p);
  const auto go = [&](auto kernel) { return launch(kernel, how.grid, how.row.threads, stream, p, how.row.count); };
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

int swiglu_backward(const ActivationProblem& p, void* stream) {
  const auto generic = [&](auto kernel) { return launch(kernel, blocks(p.batch * p.tokens), kActivationThreads, stream, p); };
  if (p.dtype == DType::f32) return generic(&any_swiglu_backward_kernel<float>);
  if (p.dtype == DType::f16) return generic(&any_swiglu_backward_kernel<__half>);
  const ActivationLaunch how(p, 5);
  if (!how.fast) return generic(&any_swiglu_backward_kernel<__nv_bfloat16>);
  return launch(&swiglu_backward_kernel, how.grid, how.row.threads, stream, p, how.row.count);
}

}  // namespace ditnorm
