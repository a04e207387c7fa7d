// Which kernel serves a problem: the fast one if it can, else the generic one.
#pragma once
#include "problem.h"

namespace ditnorm {

inline int64_t bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline bool aligned16(const void* data, DType dtype, int64_t stride_a, int64_t stride_b) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_a * bytes(dtype) % 16 == 0 && stride_b * bytes(dtype) % 16 == 0;
}

inline bool fast_vector(const Vector& vector, DType t) {
  return vector.data == nullptr || ((vector.dtype == t || vector.dtype == DType::f32) && aligned16(vector.data, vector.dtype, 0, 0));
}

inline bool fast_modulation(const Modulation& m, DType dtype) {
  return m.data == nullptr ||
         (m.dtype == dtype && aligned16(m.data, m.dtype, m.batch_stride, m.row_stride) && fast_vector(m.table, DType::f32));
}

// The dtype of the modulations if a fast kernel serves the problem; u8 if none does.
inline DType fast_modulation_dtype(const Problem& p) {
  constexpr DType kNone = DType::u8;
  const DType t = p.x.dtype;
  // The two norms with a bias that no model has; they have formulas of their own.
  const bool rare = p.bias.data != nullptr && (p.weight.data == nullptr || p.norm == Norm::rms);
  const bool rows_fast = aligned16(p.x.data, t, p.x.batch_stride, p.x.token_stride) && p.width * bytes(t) % 16 == 0 &&
                         (p.residual.data == nullptr ||
                          (p.residual.dtype == t && aligned16(p.residual.data, t, p.residual.batch_stride, p.residual.token_stride)));
  DType m = t;
  for (const Modulation* modulation : {&p.gate, &p.scale, &p.shift}) {
    if (modulation->data != nullptr) m = modulation->dtype;
  }
  const bool modulations_fast =
      (m == t || m == DType::f32) && fast_modulation(p.gate, m) && fast_modulation(p.scale, m) && fast_modulation(p.shift, m);
  return !rare && rows_fast && modulations_fast && fast_vector(p.weight, t) && fast_vector(p.bias, t) ? m : kNone;
}

}  // namespace ditnorm
