// Quantised results, and the quantising ops that others are made with:
// quantize_ops.cpp.
#pragma once
#include "op_call.h"
#include "quantize.h"

namespace ditnorm {

// What [.., D] is quantised to: values [rows, D] and scale [rows, 1], or [1, 1]
// of a law with one scale for all rows.
struct QuantizedOutput {
  // `beside`: columns of another tensor in front of those of x.
  QuantizedOutput(const Tensor& x, int64_t law, int64_t beside = 0);

  Tensor values, scale;
  Quantized out{};
};

// Quantises x, [B, S, D] or [S, D], or GELU of it. `maxima`: the bits of the largest |x| of each
// row, where they are known.
void quantize_into(const QuantizedOutput& output, const Tensor& x, bool gelu, const Tensor* maxima = nullptr);

}  // namespace ditnorm
