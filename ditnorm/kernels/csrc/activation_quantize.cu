// An activation and what stands beside it, quantised as one row: what the last linear layer of a
// block reads.
#include "activation.h"
#include "dispatch.cuh"
#include "gelu_table.cuh"
#include "launch.h"
#include "quantize.cuh"

namespace ditnorm {

// One block a row, which stays in registers.
template <Activation ACTIVATION, int ITEMS>
__global__ void __launch_bounds__(kMaxQuantizeThreads, 1) activation_quantize_kernel(const ActivationProblem p) {
  using T = __nv_bfloat16;
  constexpr int N = 16 / sizeof(T);
  constexpr bool kGelu = ACTIVATION == Activation::gelu;
  __shared__ uint32_t exchange[kMaxWarps];
  constexpr auto kEach = std::make_integer_sequence<int, ITEMS>{};
  const int beside = static_cast<int>(p.beside_width), width = beside + static_cast<int>(p.width);
  const int first = static_cast<int>(threadIdx.x) * N, step = static_cast<int>(blockDim.x) * N;
  const auto inside = [&](int i) { return first + i * step < width; };
  const auto copied = [&](int i) { return first + i * step < beside; };
  const int64_t token = blockIdx.x, batch = blockIdx.y, row = batch * p.tokens + token;
  const auto source = [&](const Rows& rows) {
    return advance<T>(rows.data, batch * rows.batch_stride + token * rows.token_stride + first);
  };
  const T *const x = source(p.x) - beside, *const value = source(p.value) - beside, *const left = source(p.beside);
  Pack<T, N> v[ITEMS], values[kGelu ? 1 : ITEMS];
  wait_for_previous_kernel();
  each(kEach, [&](auto i) {
    if (!inside(i)) return;
    v[i] = load_row<Cache::streaming, T, N>((copied(i) ? left : x) + i * step);
    if constexpr (!kGelu) {
      if (!copied(i)) values[i] = load_row<Cache::streaming, T, N>(value + i * step);
    }
  });
  Amax<T> amax;
  each(kEach, [&](auto i) {
    if (!inside(i)) return;
    if (!copied(i)) {
      if constexpr (kGelu) {
        v[i] = activated<true>(v[i]);
      } else {
        float gates[N], factors[N];
        to_floats(gates, v[i]);
        to_floats(factors, values[i]);
#pragma unroll
        for (int j = 0; j < N; ++j) gates[j] = swiglu<T>(gates[j], factors[j], p.round_each);
        v[i] = from_floats<T, N>(gates);
      }
    }
    amax.take(v[i]);
  });
  const Law law = p.quantized.law;
  const Divisor by = divide_by(scale_of<T>(float_of(reduce_max(amax.bits(), exchange)), law), law);
  if (threadIdx.x == 0) p.quantized.scale[row] = by.scale;
  store_quantized(v, by, p.quantized.values + row * width + first, step, inside);
}

int activate_quantized(const ActivationProblem& p, void* stream) {
  constexpr int N = 8;
  if (p.quantized.law != Law::int8_row && !has_float8()) return cudaErrorNotSupported;
  const auto fits = [&](const Rows& rows) { return aligned16(rows.data, p.dtype, rows.batch_stride, rows.token_stride); };
  const int64_t width = p.beside_width + p.width;
  if (p.dtype != DType::bf16 || p.quantized.law == Law::float8_tensor || !fits(p.x) || !fits(p.value) || !fits(p.beside) ||
      p.beside_width % N != 0 || p.width % N != 0 || width > kMaxQuantizeThreads * 8 * N || p.tokens > 0x7fffffff || p.batch > 0xffff) {
    return kNotServed;
  }
  const dim3 grid(static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.batch));
  const bool wide = width > kMaxQuantizeThreads * 4 * N;
  const int64_t accesses = width / N, items = wide ? 8 : 4;
  const auto threads = static_cast<unsigned>((accesses + items * 32 - 1) / (items * 32) * 32);
  const auto go = [&](auto kernel) { return launch(kernel, grid, threads, stream, p); };
  if (p.activation == Activation::gelu) {
    return wide ? kNotServed : go(&activation_quantize_kernel<Activation::gelu, 4>);  // no model has wider ones
  }
  return wide ? go(&activation_quantize_kernel<Activation::swiglu, 8>) : go(&activation_quantize_kernel<Activation::swiglu, 4>);
}

}  // namespace ditnorm
