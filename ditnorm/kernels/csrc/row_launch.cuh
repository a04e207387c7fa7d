// Choosing among the fast kernels of one op and one dtype. Each pair has a file of its own (norm_scale_shift_bf16.cu, ...), so that they
// compile side by side.
#pragma once
#include "dispatch.cuh"
#include "row_kernel.cuh"

namespace ditnorm {

template <Extras EXTRAS>
using Chosen = std::integral_constant<Extras, EXTRAS>;

inline Extras extras(const Problem& p) {
  const auto in_registers = [&](const Vector& vector) { return vector.data == nullptr || vector.dtype == p.x.dtype; };
  const bool affine = p.weight.data != nullptr, tables = p.gate.table.data != nullptr || p.scale.table.data != nullptr;
  if (!affine) return tables ? Extras::tables : Extras::none;
  return !tables && in_registers(p.weight) && in_registers(p.bias) ? Extras::affine : Extras::any;
}

template <class T, class M, bool RESIDUAL, bool ROUND>
int launch_row_kernel(const Problem& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.batch));
  const int64_t tiles = (p.width + kTile - 1) / kTile;
  const int64_t rows = p.batch * p.tokens;
  const bool few_rows = rows <= kFewRows;
  const bool shared = p.index.data == nullptr && p.scale.row_stride == 0 && p.shift.row_stride == 0 && rows > kManyRows;
  const Extras wanted = extras(p);
  int error = cudaErrorInvalidValue;  // stands where none of these kernels serves the problem
  const auto serve = [&](auto items) {
    if (tiles <= full_tiles(items) || tiles > items) return;
    constexpr int kLanesOfThread = lanes_per_thread(sizeof(T), items);
    constexpr Ahead kAhead = ahead(sizeof(T), sizeof(M), RESIDUAL, items);
    const auto go = [&](auto extras, auto shape) {
      error = launch(&row_kernel<T, M, extras, RESIDUAL, ROUND, items, decltype(shape)>, grid, shape.kThreads, stream, p);
    };
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, M>) {
      const auto go_half = [&](auto extras) { go(extras, Shape<kLanesOfThread, half_ahead(std::is_same_v<T, __half>, extras, ROUND)>{}); };
      if (wanted == Extras::none) return go_half(Chosen<Extras::none>{});
      if constexpr (shared_pays(RESIDUAL, items)) {
        if (wanted == Extras::affine && shared) return go(Chosen<Extras::affine>{}, Shape<kLanesOfThread, kSharedAhead>{});
      }
      if (wanted == Extras::affine) return go_half(Chosen<Extras::affine>{});
      if constexpr (!ROUND) {
        if (wanted == Extras::tables && (RESIDUAL || few_rows)) {
          return go(Chosen<Extras::tables>{}, Shape<1, tables_ahead(RESIDUAL, items)>{});
        }
      }
    }
    if constexpr (!ROUND) {
      if (few_rows) return go(Chosen<Extras::any>{}, Shape<kLanesOfThread, kAhead.few_rows>{});
      go(Chosen<Extras::any>{}, Shape<kLanesOfThread, kAhead.many_rows>{});
    }
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
