// r = residual + gate * x.
#include "dispatch.cuh"
#include "formulas.cuh"
#include "generic_kernel.cuh"
#include "modulation.cuh"
#include "row_blocks.h"

namespace ditnorm {

// `parts`: the blocks of one row.
template <class T, class M, bool ROUND>
__global__ void __launch_bounds__(kMostRowThreads) residual_kernel(const Problem p, const unsigned parts) {
  constexpr int N = 16 / sizeof(T);
  const unsigned token = parts == 1 ? blockIdx.x : blockIdx.x / parts;
  const int column = static_cast<int>((blockIdx.x - token * parts) * blockDim.x + threadIdx.x) * N;
  if (column >= p.width) return;
  wait_for_previous_kernel();
  const Token at(p, blockIdx.y, token);
  auto v = load_row<Cache::normal, T, N>(static_cast<const T*>(p.residual.data) + at.offset(p.residual) + column);
  const auto branch = load_row<Cache::normal, T, N>(static_cast<const T*>(p.x.data) + at.offset(p.x) + column);
  if (p.gate.data == nullptr) {
    v = add(v, branch);
  } else {
    const ModulationRow<M, N> gate(p.gate, at, p.index, column);
    const auto loaded = gate.load(0);
    if constexpr (ROUND) {
      v = add_gated_rounded(v, branch, loaded);
    } else {
      const bool tabled = p.gate.table.data != nullptr;
      float values[N];
      to_floats(values, loaded);
      if (tabled) add_table(values, loaded, gate.load_table(0));
      if constexpr (kContracts<T, M, ROUND>) {
        v = tabled ? add_gated(v, branch, values) : add_gated_contracted(v, branch, loaded);
      } else {
        v = add_gated(v, branch, values);
      }
    }
    if (!at.valid) v = filled<T, N>(kNaN);
  }
  store_row<Cache::streaming>(static_cast<T*>(p.r) + (at.batch * p.tokens + token) * p.width + column, v);
}

template <class T>
int launch_residual_kernel(const Problem& p, DType modulation, void* stream) {
  constexpr int N = 16 / sizeof(T);
  const RowBlocks row = row_blocks((p.width + N - 1) / N, 3);
  if (p.tokens * row.count > 0x7fffffff) return launch_generic_kernel<Op::scale_residual, Norm::layer>(p, stream);
  const dim3 grid(static_cast<unsigned>(p.tokens) * row.count, static_cast<unsigned>(p.batch));
  const auto launch_law = [&](auto kernel) { return launch(kernel, grid, row.threads, stream, p, row.count); };
  if constexpr (!std::is_same_v<T, float>) {
    if (modulation == DType::f32) return launch_law(&residual_kernel<T, float, false>);
    if (p.round_each) return launch_law(&residual_kernel<T, T, true>);
  }
  return launch_law(&residual_kernel<T, T, false>);
}

int scale_residual(const Problem& p, void* stream) {
  const DType modulation = fast_modulation_dtype(p);
  if (modulation == DType::u8) return launch_generic_kernel<Op::scale_residual, Norm::layer>(p, stream);
  switch (p.x.dtype) {
    case DType::f32: return launch_residual_kernel<float>(p, modulation, stream);
    case DType::f16: return launch_residual_kernel<__half>(p, modulation, stream);
    default: return launch_residual_kernel<__nv_bfloat16>(p, modulation, stream);
  }
}

}  // namespace ditnorm
