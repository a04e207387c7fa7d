// The gradient of what a gate multiplied.
#pragma once
#include "modulation.cuh"

namespace ditnorm {

// N elements of gate * dr. `d_row`: dr as it is stored; `values`: before that rounding, which
// rounding="single" doesn't need twice.
template <class T, class M, bool ROUND, int N>
__device__ __forceinline__ Pack<T, N> gate_gradient(const SiteBackward& b, const ModulationRow<M, N>& gate, int offset,
                                                    const Pack<T, N>& d_row, float (&values)[N]) {
  const auto loaded = gate.load(offset);
  Pack<T, N> gradient;
  if constexpr (ROUND) {
#pragma unroll
    for (int j = 0; j < N; j += 2) put(gradient, j, __hmul2_rn(pair(d_row, j), pair(loaded, j)));
  } else {
    float gates[N];
    to_floats(gates, loaded);
    if (unlikely(b.site.gate.table.data != nullptr)) add_table(gates, loaded, gate.load_table(offset));
    if (b.eager) to_floats(values, d_row);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = __fmul_rn(values[j], gates[j]);
    gradient = from_floats<T, N>(values);
  }
  return gradient;
}

}  // namespace ditnorm
