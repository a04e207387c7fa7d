// Quantised results, and the quantising ops that others are made with:
// quantize_ops.cpp.
#pragma once
#include "op_call.h"
#include "quantize.h"

namespace ditnorm {

// What [.., D] is quantised to: values [rows, D] and scale [rows, 1], or [1, 1]
// of a law with one scale for all rows.
struct QuantizedOutput {
  // `beside`: columns of another tensor in front of those of x. `with_maxima`: room for out.maxima
  // where the law has one scale for all rows.
  QuantizedOutput(const Tensor& x, int64_t law, int64_t beside = 0, bool with_maxima = false);

  Tensor values, scale;
  Quantized out{};
  uint32_t* partials = nullptr;  // room for partial_count numbers where the law has one scale for all rows
  int64_t partial_count = 0;
};

// Of a y that is to be made again, whose output.out.maxima are known.
Partials find_largest(const QuantizedOutput& output, const Tensor& x);

// Quantises x, [B, S, D] or [S, D], or GELU of it. `maxima`: whether out.maxima has them.
void quantize_into(const QuantizedOutput& output, const Tensor& x, bool gelu, bool maxima = false);

}  // namespace ditnorm
