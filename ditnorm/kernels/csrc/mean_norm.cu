// Norm sites of diffusers' RMSNorm over the whole width: the norm of a stream, modulated; the same
// of a stream that a branch has just been added to; and a branch that is normed itself before.
//
//   n = norm(x)                   where the branch is normed ("sandwich")
//   r = residual + gate * n       where there is a residual
//   y = norm(r) * (1 + scale) + shift
//
// The row stays in registers between its two norms.
#include "mean_norm.cuh"

namespace ditnorm {

// What a kernel does with a row.
enum class Site { norm, residual_norm, norm_residual_norm, norm_residual };
template <Site SITE>
constexpr bool kNormsX = SITE == Site::norm_residual_norm || SITE == Site::norm_residual;
template <Site SITE>
constexpr bool kHasResidual = SITE != Site::norm;
template <Site SITE>
constexpr bool kNormsResult = SITE != Site::norm_residual;

inline Site site_of(const Problem& p) {
  if (p.residual.data == nullptr) return Site::norm;
  if (!p.norms_x) return Site::residual_norm;
  return p.y == nullptr ? Site::norm_residual : Site::norm_residual_norm;
}

// Blocks of a multiprocessor: more would spill registers.
template <Site SITE>
constexpr int kMeanBlocks = SITE == Site::norm                 ? 8
                            : SITE == Site::norm_residual_norm ? 5
                                                               : 6;

// residual + gate * branch. The branch: x, or where NORMS norm(x) * weight.
template <bool ROUND, bool NORMS>
__device__ __forceinline__ Pack<T, N> added(const Pack<T, N>& residual, const Pack<T, N>& x, float rstd, const Pack<T, N>& weight,
                                            const Pack<T, N>& gate) {
  if constexpr (ROUND) return add_gated_rounded(residual, NORMS ? normalize_rounded(x, rstd, weight) : x, gate);
  float sum[N], branch[N], factor[N];
  to_floats(branch, x);
  to_floats(factor, weight);
#pragma unroll
  for (int j = 0; NORMS && j < N; ++j) branch[j] = __fmul_rn(__fmul_rn(branch[j], rstd), factor[j]);
  to_floats(sum, residual);
  to_floats(factor, gate);
#pragma unroll
  for (int j = 0; j < N; ++j) sum[j] = add_gated<T, false>(sum[j], branch[j], factor[j]);
  return from_floats<T, N>(sum);
}

// norm(v) * weight * (1 + scale) + shift
template <bool ROUND>
__device__ __forceinline__ Pack<T, N> modulated(const Pack<T, N>& v, float rstd, const Pack<T, N>& weight, const Pack<T, N>& scale,
                                                const Pack<T, N>& shift) {
  if constexpr (ROUND) return modulate_rounded(normalize_rounded(v, rstd, weight), scale, shift);
  float n[N], factor[N], sum[N];
  to_floats(n, v);
  to_floats(factor, weight);
#pragma unroll
  for (int j = 0; j < N; ++j) n[j] = __fmul_rn(__fmul_rn(n[j], rstd), factor[j]);
  to_floats(factor, scale);
  to_floats(sum, shift);
#pragma unroll
  for (int j = 0; j < N; ++j) n[j] = modulate<T, false>(n[j], factor[j], sum[j]);
  return from_floats<T, N>(n);
}

template <bool ROUND, Site SITE>
__global__ void __launch_bounds__(kMeanThreads, kMeanBlocks<SITE>) mean_norm_kernel(const Problem p) {
  constexpr Cache kCache = kHasResidual<SITE> ? Cache::normal : Cache::streaming;
  __shared__ MeanExchange exchange;
  const Place place(p);
  each(kEach, [&](auto i) {
    if (!place.inside(i)) exchange.row[threadIdx.x + i * kMeanThreads] = filled<T, N>(0.0f);
  });
  wait_for_previous_kernel();
  const Token at(p, blockIdx.y, blockIdx.x);
  const int64_t target = (at.batch * p.tokens + at.token) * p.width + place.first;
  const auto ask_rows = [&](Columns& columns, const Rows& rows) {
    const T* const source = static_cast<const T*>(rows.data) + at.offset(rows) + place.first;
    place.ask(columns, true, 0.0f, [&](int offset) { return load_row<kCache, T, N>(source + offset); });
  };
  Columns v, weight;
  ask_rows(v, p.x);

  if constexpr (kHasResidual<SITE>) {
    Columns residual, gate;
    ask_rows(residual, p.residual);
    float rstd = 1.0f;
    const auto ask_gate = [&] { place.ask(gate, p.gate, at, p.index, kNoGate); };
    if constexpr (kNormsX<SITE>) {
      const auto ask = [&] { place.ask(weight, p.x_weight, kNoWeight), ask_gate(); };
      rstd = root_of_mean(row_sum_of_squares(v, place, exchange, ask), p);
    } else {
      ask_gate();
    }
    const bool unknown = !at.valid && p.gate.data != nullptr;
    T* const r = static_cast<T*>(p.r) + target;
    place.each([&](auto i) {
      v[i] = added<ROUND, kNormsX<SITE>>(residual[i], v[i], rstd, weight[i], gate[i]);
      if (unlikely(unknown)) v[i] = filled<T, N>(kNaN);
      if (place.inside(i)) store_row<kCache>(r + i * kStep, v[i]);
    });
  }

  if constexpr (kNormsResult<SITE>) {
    const auto root = [&](auto meanwhile) { return at.valid ? root_of_mean(row_sum_of_squares(v, place, exchange, meanwhile), p) : kNaN; };
    T* const y = static_cast<T*>(p.y) + target;
    const auto store = [&](int i, float rstd, const Pack<T, N>& weight, const Pack<T, N>& scale, const Pack<T, N>& shift) {
      const auto result = modulated<ROUND>(v[i], rstd, weight, scale, shift);
      if (place.inside(i)) store_row<kCache>(y + i * kStep, result);
    };
    if constexpr (kHasResidual<SITE>) {
      Columns scale, shift;
      const float rstd = root([&] {
        place.ask(weight, p.weight, kNoWeight);
        place.ask(scale, p.scale, at, p.index, kNoScale);
        place.ask(shift, p.shift, at, p.index, kNoShift);
      });
      place.each([&](auto i) { store(i, rstd, weight[i], scale[i], shift[i]); });
    } else {  // more rows under way are worth more than what waits in registers
      const float rstd = root([] {});
      const ModulationRow<T, N> scale(p.scale, at, p.index, place.first), shift(p.shift, at, p.index, place.first);
      const T* const weights = advance<T>(p.weight.data, place.first);
      each(kEach, [&](auto i) {  // without a branch, across which nothing would be asked for
        const auto access = [&](const T* row, bool there, float missing) {
          auto pack = filled<T, N>(missing);
          if (there && place.inside(i)) pack = load_pack<T, N>(row + i * kStep);
          return pack;
        };
        store(i, rstd, access(weights, p.weight.data != nullptr, kNoWeight), access(scale.row, p.scale.data != nullptr, kNoScale),
              access(shift.row, p.shift.data != nullptr, kNoShift));
      });
    }
  }
}

// Any width, alignment, number of rows, and mix of dtypes: a block a row, element by element.
__global__ void __launch_bounds__(kAnyThreads, 4) any_mean_norm_kernel(const Problem p, const int lanes) {
  const auto rounded = [&](float v) { return p.round_each ? round_to(v, p.x.dtype) : v; };
  const auto normalized = [&](float v, float rstd, const Vector& weight, const Vector& bias, int64_t column) {
    v = rounded(__fmul_rn(v, rstd));
    if (weight.data != nullptr) v = rounded(__fmul_rn(v, element(weight, column, kNoWeight)));
    return bias.data == nullptr ? v : rounded(__fadd_rn(v, element(bias, column, kNoBias)));
  };
  const bool residual = p.residual.data != nullptr;
  const DType r_dtype = residual ? p.residual.dtype : p.x.dtype;
  const int width = static_cast<int>(p.width);
  __shared__ float sums[kMostMeanLanes];  // through whose barriers the block also reads what it has stored in r
  wait_for_previous_kernel();
  for (int64_t row = blockIdx.x; row < p.batch * p.tokens; row += gridDim.x) {
    const int64_t batch = p.batch == 1 ? 0 : row / p.tokens;
    const Token at(p, batch, row - batch * p.tokens);
    const int64_t x_offset = at.offset(p.x), residual_offset = at.offset(p.residual), out = row * p.width;
    const auto x = [&](int64_t column) { return element(Vector{p.x.data, p.x.dtype}, x_offset + column, 0.0f); };
    const auto r = [&](int64_t column) { return residual ? element(Vector{p.r, r_dtype}, out + column, 0.0f) : x(column); };
    if (residual) {
      const float rstd = p.norms_x ? root_of_mean(mean_order_sum_of_squares(width, x, lanes, sums), p) : 1.0f;
      const int64_t gates = at.offset(p.gate, p.index);
      for (int64_t column = threadIdx.x; column < width; column += kAnyThreads) {
        const float branch = p.norms_x ? normalized(x(column), rstd, p.x_weight, Vector{}, column) : x(column);
        const float gate = at.valid || p.gate.data == nullptr ? element(p.gate, gates, column, kNoGate) : kNaN;
        const float streamed = element(Vector{p.residual.data, r_dtype}, residual_offset + column, 0.0f);
        store_float(p.r, r_dtype, out + column, __fadd_rn(streamed, rounded(__fmul_rn(gate, branch))));
      }
    }
    if (p.y == nullptr) continue;
    const float rstd = at.valid ? root_of_mean(mean_order_sum_of_squares(width, r, lanes, sums), p) : kNaN;
    const int64_t scales = at.offset(p.scale, p.index), shifts = at.offset(p.shift, p.index);
    for (int64_t column = threadIdx.x; column < width; column += kAnyThreads) {
      float n = normalized(r(column), rstd, p.weight, p.bias, column);
      if (p.scale.data != nullptr) n = rounded(__fmul_rn(n, rounded(__fadd_rn(1.0f, element(p.scale, scales, column, kNoScale)))));
      store_float(p.y, p.x.dtype, out + column, __fadd_rn(n, element(p.shift, shifts, column, kNoShift)));
    }
  }
}

template <bool ROUND, Site SITE>
int launch_mean_norm_kernel(const Problem& p, void* stream) {
  const dim3 grid(static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.batch));
  return launch(&mean_norm_kernel<ROUND, SITE>, grid, kMeanThreads, stream, p);
}

template <bool ROUND>
int launch_site(const Problem& p, void* stream) {
  switch (site_of(p)) {
    case Site::norm: return launch_mean_norm_kernel<ROUND, Site::norm>(p, stream);
    case Site::residual_norm: return launch_mean_norm_kernel<ROUND, Site::residual_norm>(p, stream);
    case Site::norm_residual_norm: return launch_mean_norm_kernel<ROUND, Site::norm_residual_norm>(p, stream);
    default: return launch_mean_norm_kernel<ROUND, Site::norm_residual>(p, stream);
  }
}

int mean_norm(const Problem& p, void* stream) {
  const int lanes = mean_lanes(p.batch * p.tokens, p.width);
  if (!fits_a_block(p, lanes)) return launch(&any_mean_norm_kernel, blocks(p.batch * p.tokens), kAnyThreads, stream, p, lanes);
  return p.round_each ? launch_site<true>(p, stream) : launch_site<false>(p, stream);
}

}  // namespace ditnorm
