#include "dispatch.cuh"
#include "gate_gradient.cuh"
#include "generic_backward.cuh"
#include "norm_backward.h"
#include "row_blocks.h"

namespace ditnorm {

namespace {

bool fast_gradient(const Rows& rows, DType dtype) {
  return rows.data == nullptr || aligned16(rows.data, dtype, rows.batch_stride, rows.token_stride);
}

// As fast_modulation_dtype.
DType fast_backward_dtype(const SiteBackward& b) {
  const DType t = b.site.x.dtype;
  return fast_gradient(b.dy, t) && fast_gradient(b.dr, t) ? fast_modulation_dtype(b.site) : DType::u8;
}

int launch_fast_kernel(const SiteBackward& b, void* stream) {
  const DType modulation = fast_backward_dtype(b);
  if (modulation == DType::u8) return kNotServed;
  switch (b.site.x.dtype) {
    case DType::f32: return launch_norm_backward<float>(b, modulation, stream);
    case DType::bf16: return launch_norm_backward<__nv_bfloat16>(b, modulation, stream);
    default: return kNotServed;
  }
}

// gate * dr: as residual_kernel. `parts`: the blocks of one row.
template <class T, class M, bool ROUND>
__global__ void __launch_bounds__(kMostRowThreads) gate_backward_kernel(const SiteBackward b, const unsigned parts) {
  constexpr int N = 16 / sizeof(T);
  const Problem& p = b.site;
  const unsigned token = parts == 1 ? blockIdx.x : blockIdx.x / parts;
  const int column = static_cast<int>((blockIdx.x - token * parts) * blockDim.x + threadIdx.x) * N;
  if (column >= p.width) return;
  wait_for_previous_kernel();
  const Token at(p, blockIdx.y, token);
  const auto dr = load_row<Cache::normal, T, N>(static_cast<const T*>(p.x.data) + at.offset(p.x) + column);
  const ModulationRow<M, N> gate(p.gate, at, p.index, column);
  float values[N];
  to_floats(values, dr);
  auto gradient = gate_gradient<T, M, ROUND>(b, gate, 0, dr, values);
  if (!at.valid) gradient = filled<T, N>(kNaN);
  store_row<Cache::normal>(static_cast<T*>(b.d_branch) + (at.batch * p.tokens + token) * p.width + column, gradient);
}

template <class T>
int launch_gate_kernel(const SiteBackward& b, DType modulation, void* stream) {
  constexpr int N = 16 / sizeof(T);
  const Problem& p = b.site;
  const RowBlocks row = row_blocks((p.width + N - 1) / N, 2);
  if (p.tokens * row.count > 0x7fffffff) return kNotServed;
  const dim3 grid(static_cast<unsigned>(p.tokens) * row.count, static_cast<unsigned>(p.batch));
  const auto launch_law = [&](auto kernel) { return launch(kernel, grid, row.threads, stream, b, row.count); };
  if constexpr (!std::is_same_v<T, float>) {
    if (modulation == DType::f32) return launch_law(&gate_backward_kernel<T, float, false>);
    if (p.round_each) return launch_law(&gate_backward_kernel<T, T, true>);
  }
  return launch_law(&gate_backward_kernel<T, T, false>);
}

int launch_fast_gate_kernel(const SiteBackward& b, void* stream) {
  const DType modulation = fast_modulation_dtype(b.site);
  if (modulation == DType::u8) return kNotServed;
  switch (b.site.x.dtype) {
    case DType::f32: return launch_gate_kernel<float>(b, modulation, stream);
    case DType::bf16: return launch_gate_kernel<__nv_bfloat16>(b, modulation, stream);
    default: return kNotServed;
  }
}

}  // namespace

int norm_backward(const SiteBackward& b, void* stream) {
  if (b.site.norm == Norm::diffusers_rms) return mean_norm_backward(b, stream);
  if (const int result = launch_fast_kernel(b, stream); result != kNotServed) return result;
  return b.site.norm == Norm::layer ? launch_generic_backward<true, Norm::layer>(b, stream)
                                    : launch_generic_backward<true, Norm::rms>(b, stream);
}

int scale_residual_backward(const SiteBackward& b, void* stream) {
  if (const int result = launch_fast_gate_kernel(b, stream); result != kNotServed) return result;
  return launch_generic_backward<false, Norm::layer>(b, stream);
}

}  // namespace ditnorm
