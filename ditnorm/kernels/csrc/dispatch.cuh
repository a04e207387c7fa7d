// Which kernel serves a problem: the fast one if it can, else the generic one.
#pragma once
#include "problem.h"

namespace ditnorm {

inline int64_t bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline bool aligned16(const void* data, DType dtype, int64_t stride_a, int64_t stride_b) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_a * bytes(dtype) % 16 == 0 && stride_b * bytes(dtype) % 16 == 0;
}

inline bool fast_vector(const Vector& vector, DType dtype) {
  return vector.data == nullptr || (vector.dtype == dtype && aligned16(vector.data, dtype, 0, 0));
}

inline bool fast_modulation(const Modulation& m, DType dtype) {
  return m.data == nullptr ||
         (m.dtype == dtype && aligned16(m.data, m.dtype, m.batch_stride, m.row_stride) && fast_vector(m.table, DType::f32));
}

// The dtype of the modulations if a fast kernel serves the problem; u8 if none does.
inline DType fast_modulation_dtype(const Problem& p) {
  constexpr DType kNone = DType::u8;
  const DType t = p.x.dtype;
  constexpr int64_t kMost = 0x7fffffff;
  if (p.norm == Norm::diffusers_rms) return kNone;                            // mean_norm.cu has them
  if (p.tokens > kMost || p.width > kMost || p.batch > 0xffff) return kNone;  // rows are the grid, columns are 32 bits
  if (!aligned16(p.x.data, t, p.x.batch_stride, p.x.token_stride) || p.width * bytes(t) % 16 != 0) return kNone;
  if (p.residual.data != nullptr &&
      (p.residual.dtype != t || !aligned16(p.residual.data, t, p.residual.batch_stride, p.residual.token_stride))) {
    return kNone;
  }
  if ((p.scale.data == nullptr) != (p.shift.data == nullptr)) return kNone;
  // The two norms with a bias that no model has; they have formulas of their own.
  if (p.bias.data != nullptr && (p.weight.data == nullptr || p.norm == Norm::rms)) return kNone;
  // An affine is of the dtype of x, or in float32 unless the norm's result is rounded to T.
  for (const Vector* vector : {&p.weight, &p.bias}) {
    if (!fast_vector(*vector, t) && (p.round_each || !fast_vector(*vector, DType::f32))) return kNone;
  }

  DType m = t;
  int tables = 0, modulations = 0;
  for (const Modulation* modulation : {&p.gate, &p.scale, &p.shift}) {
    if (modulation->data == nullptr) continue;
    m = modulation->dtype;
    tables += modulation->table.data != nullptr;
    ++modulations;
  }
  const bool fast = (m == t || m == DType::f32) && (tables == 0 || tables == modulations) && fast_modulation(p.gate, m) &&
                    fast_modulation(p.scale, m) && fast_modulation(p.shift, m);
  return fast ? m : kNone;
}

}  // namespace ditnorm
