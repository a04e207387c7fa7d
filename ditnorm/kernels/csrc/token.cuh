// Where the operands of one token lie.
#pragma once
#include "numerics.cuh"

namespace ditnorm {

__device__ __forceinline__ int64_t load_index(const Index& index, int64_t batch, int64_t token) {
  const int64_t offset = batch * index.batch_stride + token * index.token_stride;
  switch (index.dtype) {
    case DType::i64: return static_cast<const int64_t*>(index.data)[offset];
    case DType::i32: return static_cast<const int32_t*>(index.data)[offset];
    case DType::i16: return static_cast<const int16_t*>(index.data)[offset];
    case DType::i8: return static_cast<const int8_t*>(index.data)[offset];
    default: return static_cast<const uint8_t*>(index.data)[offset];
  }
}

struct Token {
  int64_t batch, token;
  int64_t indexed_row = 0;  // the row that the index selects; 0 where there is no index, or where it selects none
  bool valid = true;        // false: the index is out of range, and the row becomes NaN

  // Where there is no index.
  __device__ __forceinline__ Token(int64_t batch, int64_t token) : batch(batch), token(token) {}
  __device__ __forceinline__ Token(const Problem& p, int64_t batch, int64_t token) : batch(batch), token(token) {
    if (!unlikely(p.index.data != nullptr)) return;
    indexed_row = load_index(p.index, batch, token);
    valid = indexed_row >= 0 && indexed_row < p.index.rows;
    if (!valid) indexed_row = 0;
  }

  __device__ __forceinline__ int64_t offset(const Rows& rows) const { return batch * rows.batch_stride + token * rows.token_stride; }

  // INT: wide enough for any token's number.
  template <class INT = int64_t>
  __device__ __forceinline__ int64_t offset(const Modulation& m, const Index& index) const {
    int64_t row = indexed_row;
    if (index.data == nullptr) row = m.tokens_per_row == 1 ? token : static_cast<INT>(token) / static_cast<INT>(m.tokens_per_row);
    return batch * m.batch_stride + row * m.row_stride;
  }
};

}  // namespace ditnorm
