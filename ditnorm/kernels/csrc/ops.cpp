// The ops of the norm sites: read the tensors, check them tersely, allocate the outputs, launch.
// Schemas, fakes and the errors that users see are Python's: ditnorm/ops/.
#include <iterator>

#include "op_table.h"
#include "quantize_ops.h"
#include "site_call.h"

namespace ditnorm {
namespace {

Tensor empty_like(const Tensor& t) { return abi::empty(t.dim(), t.sizes(), t.dtype(), t); }

// Elements of y that a GPU's cache keeps until they are read again, as measured on an H200; fewer on
// the host, where tests of more would take minutes.
#ifdef DITNORM_CPU_SIM
constexpr int64_t kCached = 6 << 20;
#else
constexpr int64_t kCached = 12 << 20;
#endif

// With one scale for all rows y is made once for its largest element and once for its values: what
// no cache keeps takes longer to write and to read again. False where no kernel does that.
bool made_twice(const Call& call, const QuantizedOutput& output, const Tensor& x, int (*both)(const Problem&, void*)) {
  AgainProblem again{call.problem, {}};
  Problem& p = again.norm;
  if (p.batch * p.tokens * p.width <= kCached) return false;
  if (p.residual.data != nullptr) {  // the sum is r by then
    p.x = {p.r, p.residual.dtype, p.tokens * p.width, p.width};
    p.residual = {};
    p.gate = {};
  }
  const auto make_again = [&] { return call_kernel(&norm_scale_shift_quantize_again, again, x.device_index()) != kNotServed; };
  if (!make_again() || !call.try_run(both)) return false;
  again.known = find_largest(output, x);
  return make_again();
}

// y of `plain`, quantised: in its kernel where there is one that does both, else behind it. `kept`:
// takes y itself, where somebody else reads it.
QuantizedOutput run_quantized(Call& call, const Tensor& x, int64_t law, int (*both)(const Problem&, void*),
                              int (*plain)(const Problem&, void*), Tensor* kept = nullptr) {
  QuantizedOutput output(x, law, Behind::norm);
  call.problem.quantized = output.out;
  const bool per_row = output.out.law != Law::float8_tensor;
  Tensor own;
  Tensor& y = kept == nullptr ? own : *kept;
  const auto make_y = [&] {
    if (y.handle() != nullptr) return;
    y = empty_like(x);
    call.problem.y = y.data();
  };
  if (!per_row && kept == nullptr && made_twice(call, output, x, both)) return output;
  if (kept != nullptr || !per_row) make_y();
  if (call.try_run(both)) {
    if (!per_row) quantize_into(output, y, false, true);
    return output;
  }
  make_y();
  call.run(plain);
  quantize_into(output, y, false);
  return output;
}

Tensor norm_scale_shift_op(const Tensor& x, const Optional& scale, const Optional& shift, const Optional& weight, const Optional& bias,
                           const Optional& scale_table, const Optional& shift_table, const Optional& index, int64_t norm, double eps,
                           int64_t rounding) {
  Call call(x);
  call.index(index);
  call.modulation(call.problem.scale, scale, scale_table);
  call.modulation(call.problem.shift, shift, shift_table);
  call.affine(weight, bias);
  call.norm(norm, eps);
  call.rounding(rounding);
  Tensor y = empty_like(x);
  call.problem.y = y.data();
  call.run(&norm_scale_shift);
  return y;
}

std::tuple<Tensor, Tensor> scale_residual_norm_scale_shift_op(const Tensor& residual, const Tensor& x, const Optional& gate,
                                                              const Optional& scale, const Optional& shift, const Optional& weight,
                                                              const Optional& bias, const Optional& gate_table, const Optional& scale_table,
                                                              const Optional& shift_table, const Optional& index, int64_t norm, double eps,
                                                              int64_t rounding) {
  Call call(x);
  call.residual(x, residual);
  call.index(index);
  call.modulation(call.problem.gate, gate, gate_table);
  call.modulation(call.problem.scale, scale, scale_table);
  call.modulation(call.problem.shift, shift, shift_table);
  call.affine(weight, bias);
  call.norm(norm, eps);
  call.rounding(rounding);
  Tensor y = empty_like(x), r = empty_like(residual);
  call.problem.y = y.data();
  call.problem.r = r.data();
  call.run(&scale_residual_norm_scale_shift);
  return {std::move(y), std::move(r)};
}

// `kept`: as of run_quantized.
QuantizedOutput quantized_norm(const Tensor& x, const Optional& scale, const Optional& shift, const Optional& weight, const Optional& bias,
                               const Optional& scale_table, const Optional& shift_table, const Optional& index, int64_t norm, double eps,
                               int64_t rounding, int64_t law, Tensor* kept = nullptr) {
  Call call(x);
  call.index(index);
  call.modulation(call.problem.scale, scale, scale_table);
  call.modulation(call.problem.shift, shift, shift_table);
  call.affine(weight, bias);
  call.norm(norm, eps);
  call.rounding(rounding);
  return run_quantized(call, x, law, &norm_scale_shift_quantize, &norm_scale_shift, kept);
}

std::tuple<Tensor, Tensor> norm_scale_shift_quantize_op(const Tensor& x, const Optional& scale, const Optional& shift,
                                                        const Optional& weight, const Optional& bias, const Optional& scale_table,
                                                        const Optional& shift_table, const Optional& index, int64_t norm, double eps,
                                                        int64_t rounding, int64_t law) {
  QuantizedOutput output = quantized_norm(x, scale, shift, weight, bias, scale_table, shift_table, index, norm, eps, rounding, law);
  return {std::move(output.values), std::move(output.scale)};
}

std::tuple<Tensor, Tensor, Tensor> norm_scale_shift_and_quantize_op(const Tensor& x, const Optional& scale, const Optional& shift,
                                                                    const Optional& weight, const Optional& bias,
                                                                    const Optional& scale_table, const Optional& shift_table,
                                                                    const Optional& index, int64_t norm, double eps, int64_t rounding,
                                                                    int64_t law) {
  Tensor y;
  QuantizedOutput output = quantized_norm(x, scale, shift, weight, bias, scale_table, shift_table, index, norm, eps, rounding, law, &y);
  return {std::move(y), std::move(output.values), std::move(output.scale)};
}

std::tuple<QuantizedOutput, Tensor> quantized_residual_norm(const Tensor& residual, const Tensor& x, const Optional& gate,
                                                            const Optional& scale, const Optional& shift, const Optional& weight,
                                                            const Optional& bias, const Optional& gate_table, const Optional& scale_table,
                                                            const Optional& shift_table, const Optional& index, int64_t norm, double eps,
                                                            int64_t rounding, int64_t law, Tensor* kept = nullptr) {
  Call call(x);
  call.residual(x, residual);
  call.index(index);
  call.modulation(call.problem.gate, gate, gate_table);
  call.modulation(call.problem.scale, scale, scale_table);
  call.modulation(call.problem.shift, shift, shift_table);
  call.affine(weight, bias);
  call.norm(norm, eps);
  call.rounding(rounding);
  Tensor r = empty_like(residual);
  call.problem.r = r.data();
  QuantizedOutput output = run_quantized(call, x, law, &scale_residual_norm_scale_shift_quantize, &scale_residual_norm_scale_shift, kept);
  return {std::move(output), std::move(r)};
}

std::tuple<Tensor, Tensor, Tensor> scale_residual_norm_scale_shift_quantize_op(
    const Tensor& residual, const Tensor& x, const Optional& gate, const Optional& scale, const Optional& shift, const Optional& weight,
    const Optional& bias, const Optional& gate_table, const Optional& scale_table, const Optional& shift_table, const Optional& index,
    int64_t norm, double eps, int64_t rounding, int64_t law) {
  auto [output, r] = quantized_residual_norm(residual, x, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, index,
                                             norm, eps, rounding, law);
  return {std::move(output.values), std::move(output.scale), std::move(r)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scale_residual_norm_scale_shift_and_quantize_op(
    const Tensor& residual, const Tensor& x, const Optional& gate, const Optional& scale, const Optional& shift, const Optional& weight,
    const Optional& bias, const Optional& gate_table, const Optional& scale_table, const Optional& shift_table, const Optional& index,
    int64_t norm, double eps, int64_t rounding, int64_t law) {
  Tensor y;
  auto [output, r] = quantized_residual_norm(residual, x, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table, index,
                                             norm, eps, rounding, law, &y);
  return {std::move(y), std::move(output.values), std::move(output.scale), std::move(r)};
}

Tensor scale_residual_op(const Tensor& residual, const Tensor& x, const Optional& gate, const Optional& gate_table, const Optional& index,
                         int64_t rounding) {
  Call call(x);
  call.residual(x, residual);
  call.index(index);
  call.modulation(call.problem.gate, gate, gate_table);
  call.rounding(rounding);
  Tensor r = empty_like(residual);
  call.problem.r = r.data();
  call.run(&scale_residual);
  return r;
}

Tensor norm_scale_shift_backward_op(const Tensor& dy, const Optional& dr, const Tensor& x, const Optional& scale, const Optional& shift,
                                    const Optional& weight, const Optional& scale_table, const Optional& shift_table, const Optional& index,
                                    int64_t norm, double eps, int64_t rounding) {
  Call call(x);
  call.index(index);
  call.modulation(call.problem.scale, scale, scale_table);
  call.modulation(call.problem.shift, shift, shift_table);
  call.affine(weight, std::nullopt);
  call.norm(norm, eps);
  call.rounding(rounding);
  SiteBackward backward = call.backward(rounding);
  call.gradient(backward.dy, dy, x);
  if (dr) call.gradient(backward.dr, *dr, x);
  Tensor dx = empty_like(x);
  backward.d_row = dx.data();
  call.run_backward(&norm_backward, backward);
  return dx;
}

std::tuple<Tensor, Tensor> scale_residual_norm_scale_shift_backward_op(const Tensor& dy, const Optional& dr, const Tensor& r,
                                                                       const Optional& gate, const Optional& scale, const Optional& shift,
                                                                       const Optional& weight, const Optional& gate_table,
                                                                       const Optional& scale_table, const Optional& shift_table,
                                                                       const Optional& index, int64_t norm, double eps, int64_t rounding) {
  check(gate.has_value(), "ditnorm: gate");
  Call call(r);
  call.index(index);
  call.modulation(call.problem.gate, gate, gate_table);
  call.modulation(call.problem.scale, scale, scale_table);
  call.modulation(call.problem.shift, shift, shift_table);
  call.affine(weight, std::nullopt);
  call.norm(norm, eps);
  call.rounding(rounding);
  SiteBackward backward = call.backward(rounding);
  call.gradient(backward.dy, dy, r);
  if (dr) call.gradient(backward.dr, *dr, r);
  Tensor d_residual = empty_like(r), dx = empty_like(r);
  backward.d_row = d_residual.data();
  backward.d_branch = dx.data();
  call.run_backward(&norm_backward, backward);
  return {std::move(d_residual), std::move(dx)};
}

Tensor scale_residual_backward_op(const Tensor& dr, const Optional& gate, const Optional& gate_table, const Optional& index,
                                  int64_t rounding) {
  check(gate.has_value(), "ditnorm: gate");
  Call call(dr);
  call.index(index);
  call.modulation(call.problem.gate, gate, gate_table);
  call.rounding(rounding);
  SiteBackward backward = call.backward(rounding);
  Tensor dx = empty_like(dr);
  backward.d_branch = dx.data();
  call.run_backward(&scale_residual_backward, backward);
  return dx;
}

std::tuple<Tensor, Tensor> norm_scale_shift_backward_parts_op(const Tensor& dy, const Tensor& x, const Optional& scale,
                                                              const Optional& weight, const Optional& index, double eps) {
  Call call(x);
  call.index(index);
  call.modulation(call.problem.scale, scale, {});
  call.affine(weight, std::nullopt);
  call.norm(norms::diffusers_rms, eps);
  call.rounding(roundings::eager);
  SiteBackward backward = call.backward(roundings::eager);
  call.gradient(backward.dy, dy, x);
  Tensor direct = empty_like(x), squared = empty_like(x);
  backward.d_row = direct.data();
  backward.d_branch = squared.data();
  backward.parted = true;
  call.run_backward(&norm_backward, backward);
  return {std::move(direct), std::move(squared)};
}

Tensor norm_scale_residual_backward_op(const Tensor& dr, const Tensor& x, const Optional& x_weight, const Optional& gate,
                                       const Optional& index, double eps, int64_t rounding) {
  Call call(x);
  call.index(index);
  call.modulation(call.problem.gate, gate, {});
  call.norm(norms::diffusers_rms, eps);
  call.norm_x(x_weight);
  call.rounding(rounding);
  SiteBackward backward = call.backward(rounding);
  call.gradient(backward.dy, dr, x);
  Tensor dx = empty_like(x);
  backward.d_row = dx.data();
  call.run_backward(&mean_norm_backward, backward);
  return dx;
}

Tensor norm_scale_residual_op(const Tensor& residual, const Tensor& x, const Optional& x_weight, const Optional& gate,
                              const Optional& index, double eps, int64_t rounding) {
  Call call(x);
  call.residual(x, residual);
  call.index(index);
  call.modulation(call.problem.gate, gate, {});
  call.norm(norms::diffusers_rms, eps);
  call.norm_x(x_weight);
  call.rounding(rounding);
  Tensor r = empty_like(residual);
  call.problem.r = r.data();
  call.run(&mean_norm);
  return r;
}

std::tuple<Tensor, Tensor> norm_scale_residual_norm_scale_shift_op(const Tensor& residual, const Tensor& x, const Optional& x_weight,
                                                                   const Optional& gate, const Optional& scale, const Optional& shift,
                                                                   const Optional& weight, const Optional& index, double eps,
                                                                   int64_t rounding) {
  Call call(x);
  call.residual(x, residual);
  call.index(index);
  call.modulation(call.problem.gate, gate, {});
  call.modulation(call.problem.scale, scale, {});
  call.modulation(call.problem.shift, shift, {});
  call.affine(weight, {});
  call.norm(norms::diffusers_rms, eps);
  call.norm_x(x_weight);
  call.rounding(rounding);
  Tensor y = empty_like(x), r = empty_like(residual);
  call.problem.y = y.data();
  call.problem.r = r.data();
  call.run(&mean_norm);
  return {std::move(y), std::move(r)};
}

}  // namespace

Ops norm_site_ops() {
  static const OpEntry kOps[] = {
      op<&norm_scale_shift_op>("norm_scale_shift"),
      op<&scale_residual_norm_scale_shift_op>("scale_residual_norm_scale_shift"),
      op<&scale_residual_op>("scale_residual"),
      op<&norm_scale_shift_backward_op>("norm_scale_shift_backward"),
      op<&scale_residual_norm_scale_shift_backward_op>("scale_residual_norm_scale_shift_backward"),
      op<&scale_residual_backward_op>("scale_residual_backward"),
      op<&norm_scale_shift_backward_parts_op>("norm_scale_shift_backward_parts"),
      op<&norm_scale_residual_backward_op>("norm_scale_residual_backward"),
      op<&norm_scale_residual_op>("norm_scale_residual"),
      op<&norm_scale_residual_norm_scale_shift_op>("norm_scale_residual_norm_scale_shift"),
      op<&norm_scale_shift_quantize_op>("norm_scale_shift_quantize"),
      op<&scale_residual_norm_scale_shift_quantize_op>("scale_residual_norm_scale_shift_quantize"),
      op<&norm_scale_shift_and_quantize_op>("norm_scale_shift_and_quantize"),
      op<&scale_residual_norm_scale_shift_and_quantize_op>("scale_residual_norm_scale_shift_and_quantize"),
  };
  return {kOps, std::size(kOps)};
}

}  // namespace ditnorm
