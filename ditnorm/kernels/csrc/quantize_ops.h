// Quantised results, and the quantising ops that others are made with:
// quantize_ops.cpp.
#pragma once
#include "op_call.h"
#include "quantize.h"

namespace ditnorm {

// What stands in front of the quantiser; GELU in the same kernel.
enum class Behind { nothing, gelu, activation, norm };

// What [.., D] is quantised to: values [rows, D] and scale [rows, 1], or [1, 1]
// of a law with one scale for all rows.
struct QuantizedOutput {
  // `beside`: columns of another tensor in front of those of x.
  QuantizedOutput(const Tensor& x, int64_t law, Behind behind, int64_t beside = 0);

  Tensor values, scale;
  // Its maxima have room where the law has one scale for all rows and a norm may find them.
  Quantized out{};
  // Where one scale is for all rows: room for partial_count numbers, or null where all rows are
  // quantised as a single one.
  uint32_t* partials = nullptr;
  int64_t partial_count = 0;
};

// Of a y that is to be made again, whose output.out.maxima are known.
Partials find_largest(const QuantizedOutput& output, const Tensor& x);

// Quantises what stands in front of it, [B, S, D] or [S, D]. `maxima`: whether out.maxima has them.
void quantize_into(const QuantizedOutput& output, const Tensor& x, bool gelu, bool maxima = false);

}  // namespace ditnorm
