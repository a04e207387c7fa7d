// The activations: as ops.cpp.
#include <algorithm>
#include <iterator>

#include "activation.h"
#include "op_call.h"
#include "op_table.h"
#include "quantize_ops.h"

namespace ditnorm {
namespace {

class ActivationOp {
 public:
  ActivationOp(const Tensor& x, int64_t rounding) : x_(x) {
    const int64_t dim = x.dim();
    check(dim == 2 || dim == 3, "ditnorm: x must be [B, S, D] or [S, D]");
    check(x.sizes()[dim - 1] >= 1, "ditnorm: x must have a last dim");
    check(rounding == roundings::single || rounding == roundings::eager, "ditnorm: rounding");
    problem_.batch = dim == 3 ? x.sizes()[0] : 1;
    problem_.tokens = x.sizes()[dim - 2];
    problem_.width = x.sizes()[dim - 1];
    problem_.dtype = float_dtype(x);
    problem_.x = rows(x);
    problem_.round_each = rounding == roundings::eager;
  }

  void value(const Tensor& t) {
    check(t.dim() == x_.dim() && t.sizes()[t.dim() - 1] == problem_.width, "ditnorm: value must have the shape of x");
    problem_.value = rows(t);
    problem_.activation = Activation::swiglu;
  }

  void beside(const Optional& t) {
    if (!t) return;
    check(t->dim() == x_.dim(), "ditnorm: beside must have the dims of x");
    problem_.beside_width = t->sizes()[t->dim() - 1];
    if (problem_.beside_width > 0) problem_.beside = rows(*t);
  }

  // The gradient of what was written, `beside` left out.
  std::tuple<Tensor, Tensor> run_backward(const Tensor& dy) {
    check(dy.dim() == x_.dim() && dy.sizes()[dy.dim() - 1] == problem_.width, "ditnorm: dy must have the shape of x");
    problem_.dy = rows(dy);
    const auto empty = [&] { return abi::empty(x_.dim(), x_.sizes(), x_.dtype(), x_); };
    Tensor dx = empty(), d_value = empty();
    problem_.y = dx.data();
    problem_.d_value = d_value.data();
    if (problem_.batch * problem_.tokens > 0) call_kernel(&swiglu_backward, problem_, x_.device_index());
    return {std::move(dx), std::move(d_value)};
  }

  Tensor run() {
    const int64_t dim = x_.dim();
    int64_t sizes[3];
    std::copy(x_.sizes(), x_.sizes() + dim, sizes);
    sizes[dim - 1] += problem_.beside_width;
    Tensor y = abi::empty(dim, sizes, x_.dtype(), x_);
    problem_.y = y.data();
    if (problem_.batch * problem_.tokens > 0) call_kernel(&activate, problem_, x_.device_index());
    return y;
  }

  // In one kernel where there is one that does both, else in two.
  std::tuple<Tensor, Tensor> run_quantized(int64_t law) {
    QuantizedOutput output(x_, law, Behind::activation, problem_.beside_width);
    problem_.quantized = output.out;
    const bool empty = problem_.batch * problem_.tokens == 0;
    if (!empty && call_kernel(&activate_quantized, problem_, x_.device_index()) == kNotServed) quantize_into(output, run(), false);
    return {std::move(output.values), std::move(output.scale)};
  }

 private:
  // Keeps a dense copy, where the last dim isn't dense, alive until the launch.
  Rows rows(const Tensor& t) {
    check(t.device_type() == x_.device_type() && t.device_index() == x_.device_index(), "ditnorm: tensors on different devices");
    check(float_dtype(t) == problem_.dtype, "ditnorm: activations need tensors of one dtype");
    const int64_t dim = t.dim();
    check(std::equal(t.sizes(), t.sizes() + dim - 1, x_.sizes()), "ditnorm: rows of value and beside must be those of x");
    const bool dense = t.sizes()[dim - 1] == 1 || t.strides()[dim - 1] == 1;
    const Tensor& source = dense ? t : copies_[copied_++] = abi::contiguous(t);
    const int64_t* strides = source.strides();
    return {source.data(), problem_.dtype, dim == 3 && problem_.batch > 1 ? strides[0] : 0, problem_.tokens > 1 ? strides[dim - 2] : 0};
  }

  const Tensor& x_;
  ActivationProblem problem_{};
  Tensor copies_[3];
  int copied_ = 0;
};

Tensor gelu_op(const Tensor& x, const Optional& beside, int64_t rounding) {
  ActivationOp op(x, rounding);
  op.beside(beside);
  return op.run();
}

Tensor swiglu_op(const Tensor& x, const Tensor& value, const Optional& beside, int64_t rounding) {
  ActivationOp op(x, rounding);
  op.value(value);
  op.beside(beside);
  return op.run();
}

std::tuple<Tensor, Tensor> swiglu_backward_op(const Tensor& dy, const Tensor& x, const Tensor& value, int64_t rounding) {
  ActivationOp op(x, rounding);
  op.value(value);
  return op.run_backward(dy);
}

std::tuple<Tensor, Tensor> gelu_quantize_op(const Tensor& x, const Optional& beside, int64_t law) {
  if (!beside) {
    QuantizedOutput output(x, law, Behind::gelu);
    quantize_into(output, x, true);
    return {std::move(output.values), std::move(output.scale)};
  }
  ActivationOp op(x, roundings::eager);
  op.beside(beside);
  return op.run_quantized(law);
}

std::tuple<Tensor, Tensor> swiglu_quantize_op(const Tensor& x, const Tensor& value, const Optional& beside, int64_t rounding, int64_t law) {
  ActivationOp op(x, rounding);
  op.value(value);
  op.beside(beside);
  return op.run_quantized(law);
}

}  // namespace

Ops activation_ops() {
  static const OpEntry kOps[] = {
      op<&gelu_op>("gelu"),
      op<&swiglu_op>("swiglu"),
      op<&swiglu_backward_op>("swiglu_backward"),
      op<&gelu_quantize_op>("gelu_quantize"),
      op<&swiglu_quantize_op>("swiglu_quantize"),
  };
  return {kOps, std::size(kOps)};
}

}  // namespace ditnorm
