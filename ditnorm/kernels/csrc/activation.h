// What the activations ask for, in plain C++: filled by activation_ops.cpp, passed by value to the
// kernels. Strides count elements.
#pragma once
#include "problem.h"

namespace ditnorm {

enum class Activation : int32_t { gelu, swiglu };

struct ActivationProblem {
  int64_t batch, tokens, width, beside_width;
  DType dtype;
  Rows x, value, beside;  // value.data is null but for swiglu, beside.data where beside_width is 0
  Activation activation;
  bool round_each;      // of swiglu: silu(x) is rounded to the dtype before the product
  void* y;              // [batch, tokens, beside_width + width] contiguous
  Quantized quantized;  // y in its place, of activate_quantized
  Rows dy;              // of swiglu_backward: the gradient of its result; y and d_value are those of x and value
  void* d_value;
};

// As those of problem.h.
int activate(const ActivationProblem& problem, void* stream);
int swiglu_backward(const ActivationProblem& problem, void* stream);
// kNotServed where there is no kernel that quantises too.
int activate_quantized(const ActivationProblem& problem, void* stream);

}  // namespace ditnorm
