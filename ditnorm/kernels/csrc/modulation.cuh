// The modulations of one token in the fast kernels: scale, shift and gate, each perhaps with a
// table.
#pragma once
#include "token.cuh"

namespace ditnorm {

// The row of a modulation that one token reads, and its table, from a thread's first column on.
// Where one is missing nobody loads.
template <class M, int N>
struct ModulationRow {
  const M* row;
  const float* table;

  __device__ __forceinline__ ModulationRow(const Modulation& m, const Token& at, const Index& index, int first)
      : row(advance<M>(m.data, at.offset<uint32_t>(m, index) + first)), table(advance<float>(m.table.data, first)) {}

  __device__ __forceinline__ Pack<M, N> load(int offset) const { return load_pack<M, N>(row + offset); }
  __device__ __forceinline__ Pack<float, N> load_table(int offset) const { return load_pack<float, N>(table + offset); }
};

template <class M, int N>
__device__ __forceinline__ void add_table(float (&sums)[N], const Pack<M, N>& modulation, const Pack<float, N>& table) {
  to_floats(sums, modulation);
#pragma unroll
  for (int j = 0; j < N; ++j) sums[j] = __fadd_rn(sums[j], table.v[j]);
}

// A modulation on its way: what has been asked for and not been used yet waits in one of SLOTS
// slots, in arrays of the kernel. TABLES: there is a table for certain, and it is asked for too.
template <class M, int N, int SLOTS, bool TABLES>
struct AskedModulation {
  static constexpr int kTableSlots = TABLES ? SLOTS : 1;
  using Slots = Pack<M, N>[SLOTS];
  using TableSlots = Pack<float, N>[kTableSlots];
  const ModulationRow<M, N> at;
  Slots& slots;
  TableSlots& table_slots;

  __device__ __forceinline__ void ask(int i, int offset) const { slots[i % SLOTS] = at.load(offset); }
  __device__ __forceinline__ void ask_table(int i, int offset) const {
    if constexpr (TABLES) table_slots[i % SLOTS] = at.load_table(offset);
  }
  __device__ __forceinline__ const Pack<M, N>& get(int i) const { return slots[i % SLOTS]; }

  // With its table added, in float32.
  __device__ __forceinline__ void get_sum(float (&out)[N], int i, int offset) const {
    add_table(out, get(i), TABLES ? table_slots[i % kTableSlots] : at.load_table(offset));
  }
};

// N elements of an affine in T or float32 (which one is known at run time).
template <class T, int N>
__device__ __forceinline__ void load_vector(float (&out)[N], const Vector& vector, int column) {
  if (vector.dtype == DType::f32) {
    to_floats(out, load_pack<float, N>(static_cast<const float*>(vector.data) + column));
  } else {
    to_floats(out, load_pack<T, N>(static_cast<const T*>(vector.data) + column));
  }
}

__device__ __forceinline__ void prefetch(const Vector& vector, int column) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L1 [%0];" ::"l"(static_cast<const char*>(vector.data) + column * (vector.dtype == DType::f32 ? 4 : 2)));
#endif
}

}  // namespace ditnorm
