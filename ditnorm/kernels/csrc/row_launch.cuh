// Choosing among the fast kernels of one op and one dtype. Each pair has a file of its own (norm_scale_shift_bf16.cu, ...), so that they
// compile side by side.
#pragma once
#include "dispatch.cuh"
#include "row_kernel.cuh"

namespace ditnorm {

// Whether weight and bias are of the dtype of x, and there are no tables. Then each row asks for all of its modulations and of these at
// once, with many rows too: docs/kernels.md.
inline bool affine_in_registers(const Problem& p) {
  const auto same = [&](const Vector& vector) { return vector.data == nullptr || vector.dtype == p.x.dtype; };
  return p.weight.data != nullptr && same(p.weight) && same(p.bias) && p.gate.table.data == nullptr && p.scale.table.data == nullptr;
}

template <class T, class M, bool RESIDUAL, bool ROUND>
int launch_row_kernel(const Problem& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.batch));
  const int64_t tiles = (p.width + kTile - 1) / kTile;
  const bool few_rows = p.batch * p.tokens <= kFewRows;
  const bool affine = affine_in_registers(p);
  int error = 0;
  const auto serve = [&](auto items) {
    if (tiles <= full_tiles(items) || tiles > items) return;
    constexpr int kLanesOfThread = lanes_per_thread(sizeof(T), items);
    constexpr Ahead kAhead = ahead(sizeof(T), sizeof(M), RESIDUAL, items);
    const auto launch_shape = [&](auto shape) {
      error = launch(&row_kernel<T, M, false, RESIDUAL, ROUND, items, decltype(shape)>, grid, shape.kThreads, stream, p);
    };
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, M>) {
      using WholeRow = Shape<kLanesOfThread, kWholeRow>;
      if (affine) {
        error = launch(&row_kernel<T, M, true, RESIDUAL, ROUND, items, WholeRow>, grid, WholeRow::kThreads, stream, p);
        return;
      }
    }
    if (few_rows) return launch_shape(Shape<kLanesOfThread, kAhead.few_rows>{});
    launch_shape(Shape<kLanesOfThread, kAhead.many_rows>{});
  };
  serve(Constant<2>{}), serve(Constant<3>{}), serve(Constant<4>{}), serve(Constant<6>{});
  serve(Constant<8>{}), serve(Constant<10>{}), serve(Constant<12>{});
  return error;
}

template <bool RESIDUAL, class T>
int launch_row_kernels(const Problem& p, DType modulation, void* stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (modulation == DType::f32) return launch_row_kernel<T, float, RESIDUAL, false>(p, stream);
    if (p.round_each) return launch_row_kernel<T, T, RESIDUAL, true>(p, stream);
  }
  return launch_row_kernel<T, T, RESIDUAL, false>(p, stream);
}

}  // namespace ditnorm
