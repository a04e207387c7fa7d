// The gradients of the rows of norm sites of diffusers' RMSNorm over the whole width, and of a branch
// that it norms before the branch is added.
//
//   dn = dy * (1 + scale) * weight            of a branch: dy * gate * weight
//   dv = dn * rstd - v * (sum of dn * v) * rstd^3 / D
//   d_row = dr + dv,  d_branch = gate * d_row
//
// Under "eager" dr, which comes from what was computed later, meets the two terms of dv in the order
// in which autograd adds them. Where autograd has dr, the terms are two results (`parted`).
#include "mean_norm.cuh"
#include "mean_square_gradient.cuh"

namespace ditnorm {

// What stands between dy and the norm's own weight: the gate of a normed branch, else the scale.
__device__ __forceinline__ const Modulation& factor_of(const Problem& p) { return p.norms_x ? p.gate : p.scale; }
__device__ __forceinline__ const Vector& weight_of(const Problem& p) { return p.norms_x ? p.x_weight : p.weight; }

// Of each column v and dn side by side, for a thread to load both at once.
struct GradientExchange {
  Pack<T, 2 * N> row[kTiles * kMeanThreads];
  Pack<float, kPlaces> squares[32], dots[32];
};

template <bool ROUND>
__global__ void __launch_bounds__(kMeanThreads, 8) mean_norm_backward_kernel(const SiteBackward b) {
  __shared__ GradientExchange exchange;
  const Problem& p = b.site;
  const Place place(p);
  const int thread = static_cast<int>(threadIdx.x);
  wait_for_previous_kernel();
  const Token at(p, blockIdx.y, blockIdx.x);
  const int64_t target = (at.batch * p.tokens + at.token) * p.width + place.first;
  const auto ask_rows = [&](Columns& columns, const Rows& rows) {
    const T* const source = static_cast<const T*>(rows.data) + at.offset(rows) + place.first;
    place.ask(columns, true, 0.0f, [&](int offset) { return load_row<Cache::normal, T, N>(source + offset); });
  };
  const bool carried = b.dr.data != nullptr, branched = b.d_branch != nullptr;
  Columns v, d, dr;
  ask_rows(v, p.x);
  ask_rows(d, b.dy);
  const Modulation& m = factor_of(p);
  const ModulationRow<T, N> factor(m, at, p.index, place.first), gate(p.gate, at, p.index, place.first);
  const Vector& w = weight_of(p);
  const T* const weight = advance<T>(w.data, place.first);
  const auto factor_at = [&](int i) { return m.data == nullptr ? filled<T, N>(p.norms_x ? kNoGate : kNoScale) : factor.load(i * kStep); };
  const auto weight_at = [&](int i) { return w.data == nullptr ? filled<T, N>(kNoWeight) : load_pack<T, N>(weight + i * kStep); };

  // dn of one access, not rounded.
  const auto dn_of = [&](auto& dn, const Pack<T, N>& dy, int i) {
    float factors[N], weights[N];
    to_floats(dn, dy);
    to_floats(factors, factor_at(i));
    to_floats(weights, weight_at(i));
#pragma unroll
    for (int j = 0; j < N; ++j) dn[j] = __fmul_rn(__fmul_rn(dn[j], p.norms_x ? factors[j] : __fadd_rn(1.0f, factors[j])), weights[j]);
  };
  float dot = 0.0f;
  place.each([&](auto i) {
    auto both = filled<T, 2 * N>(0.0f);
    if (place.inside(i)) {
      if constexpr (ROUND) {
        const auto factors = factor_at(i);
        d[i] = multiply_rounded(multiply_rounded(d[i], p.norms_x ? factors : one_plus(factors)), weight_at(i));
      } else {
        float dn[N], values[N];
        dn_of(dn, d[i], i);
        to_floats(values, v[i]);
#pragma unroll
        for (int j = 0; j < N; ++j) dot = __fmaf_rn(dn[j], values[j], dot);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) both.v[2 * j] = v[i].v[j], both.v[2 * j + 1] = d[i].v[j];
    }
    exchange.row[thread + i * kMeanThreads] = both;
  });
  if (carried) ask_rows(dr, b.dr);
  __syncthreads();
  const Pair<T>* const column = reinterpret_cast<const Pair<T>*>(exchange.row) + thread;
  float square = 0.0f;
  place.each([&](auto i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {  // the products of half-precision numbers are exact
      const float2 both = __bfloat1622float2(column[i * kStep + j * kMeanThreads]);
      square = __fmaf_rn(both.x, both.x, square);
      if constexpr (ROUND) dot = __fmaf_rn(both.y, both.x, dot);
    }
  });
  exchange.squares[thread / kPlaces].v[thread % kPlaces] = square;
  exchange.dots[thread / kPlaces].v[thread % kPlaces] = dot;
  __syncthreads();
  const float rstd = at.valid ? root_of_mean(sum_of_threads(exchange.squares), p) : kNaN;
  const MeanSquareGradient of_row = mean_square_gradient(rstd, sum_of_threads(exchange.dots), p.width);

  T* const d_row = static_cast<T*>(b.d_row) + target;
  T* const d_branch = static_cast<T*>(b.d_branch) + (branched ? target : 0);
  place.each([&](auto i) {
    if (!place.inside(i)) return;
    const auto both = exchange.row[thread + i * kMeanThreads];  // which costs fewer registers than to keep the two
    Pack<T, N> values, gradients;
#pragma unroll
    for (int j = 0; j < N; ++j) values.v[j] = both.v[2 * j], gradients.v[j] = both.v[2 * j + 1];
    float direct[N], squared[N];
    if constexpr (ROUND) {
      to_floats(direct, gradients);
    } else {
      dn_of(direct, gradients, i);
    }
    to_floats(squared, values);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      direct[j] = of_row.direct<T, false>(direct[j]);
      squared[j] = of_row.squared<T, false>(squared[j]);
    }
    if constexpr (ROUND) {
      const auto rounded = from_floats<T, N>(direct), other = from_floats<T, N>(squared);
      values = b.parted ? rounded : add(carried ? add(dr[i], rounded) : rounded, other);
      if (b.parted) {
        store_row<Cache::normal>(d_branch + i * kStep, other);
      } else if (branched) {
        store_row<Cache::normal>(d_branch + i * kStep, multiply_rounded(values, gate.load(i * kStep)));
      }
    } else {
      float factors[N];
      if (carried) to_floats(factors, dr[i]);
#pragma unroll
      for (int j = 0; j < N; ++j) direct[j] = __fadd_rn(carried ? __fadd_rn(factors[j], direct[j]) : direct[j], squared[j]);
      values = from_floats<T, N>(direct);
      if (branched) {
        to_floats(factors, gate.load(i * kStep));
#pragma unroll
        for (int j = 0; j < N; ++j) direct[j] = __fmul_rn(direct[j], factors[j]);
        store_row<Cache::normal>(d_branch + i * kStep, from_floats<T, N>(direct));
      }
    }
    store_row<Cache::normal>(d_row + i * kStep, values);
  });
}

// The same for rows of STEPS periods to whose gradient nothing is added. A thread has kOwn of ATen's sums, neighbours, and their columns:
// it loads them itself, in accesses of 4 bytes, and keeps them. That is 3 instructions an element instead of 6 for taking the sums, whose
// rows otherwise pass through shared memory, and half as many warps for all that is done once a row: docs/kernels-log.md.
constexpr int kOwn = 2, kPeriod = 32 * kPlaces;

template <bool ROUND, int STEPS, int BLOCKS>
__global__ void __launch_bounds__(kPeriod / kOwn, BLOCKS) lone_mean_norm_backward_kernel(const SiteBackward b) {
  using Own = Pack<T, kOwn>;
  __shared__ Pack<float, kPlaces> square_sums[32], dot_sums[32];
  const Problem& p = b.site;
  const int first = static_cast<int>(threadIdx.x) * kOwn;
  wait_for_previous_kernel();
  const Token at(p, blockIdx.y, blockIdx.x);
  constexpr auto kEach = std::make_integer_sequence<int, STEPS>{};
  Own v[STEPS], d[STEPS];
  const auto ask = [&](auto& columns, const Rows& rows) {
    const T* const source = static_cast<const T*>(rows.data) + at.offset(rows) + first;
    each(kEach, [&](auto i) { columns[i] = load_row<Cache::normal, T, kOwn>(source + i * kPeriod); });
  };
  ask(v, p.x);
  ask(d, b.dy);
  const Modulation& m = factor_of(p);
  const ModulationRow<T, kOwn> factor(m, at, p.index, first);
  const Vector& w = weight_of(p);
  const T* const weight = advance<T>(w.data, first);
  const bool modulated = m.data != nullptr, weighted = w.data != nullptr;
  const auto missing = filled<T, kOwn>(p.norms_x ? kNoGate : kNoScale), no_weight = filled<T, kOwn>(kNoWeight);
  const float plus = p.norms_x ? -0.0f : 1.0f;  // 1 + scale, and the gate itself
  const auto factor_at = [&](int i) { return modulated ? factor.load(i * kPeriod) : missing; };
  const auto weight_at = [&](int i) { return weighted ? load_pack<T, kOwn>(weight + i * kPeriod) : no_weight; };
  const auto dn_of = [&](auto& dn, int i) {  // "eager" has put it into d
    to_floats(dn, d[i]);
    if constexpr (!ROUND) {
      float factors[kOwn], weights[kOwn];
      to_floats(factors, factor_at(i));
      to_floats(weights, weight_at(i));
#pragma unroll
      for (int j = 0; j < kOwn; ++j) dn[j] = __fmul_rn(__fmul_rn(dn[j], __fadd_rn(plus, factors[j])), weights[j]);
    }
  };

  float squares[kOwn] = {}, dots[kOwn] = {};
  each(kEach, [&](auto i) {
    if constexpr (ROUND) {
      d[i] = multiply_rounded(multiply_rounded(d[i], add_rounded(filled<T, kOwn>(plus), factor_at(i))), weight_at(i));
    }
    float values[kOwn], dn[kOwn];
    to_floats(values, v[i]);
    dn_of(dn, i);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {  // the products of half-precision numbers are exact
      squares[j] = __fmaf_rn(values[j], values[j], squares[j]);
      dots[j] = __fmaf_rn(dn[j], values[j], dots[j]);
    }
  });
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    square_sums[first / kPlaces].v[first % kPlaces + j] = squares[j];
    dot_sums[first / kPlaces].v[first % kPlaces + j] = dots[j];
  }
  __syncthreads();
  const float rstd = at.valid ? root_of_mean(sum_of_threads(square_sums), p) : kNaN;
  const MeanSquareGradient of_row = mean_square_gradient(rstd, sum_of_threads(dot_sums), p.width);

  const int64_t target = (at.batch * p.tokens + at.token) * p.width + first;
  T* const d_row = static_cast<T*>(b.d_row) + target;
  const bool two = b.d_branch != nullptr, gated = two && !b.parted;
  T* const d_branch = static_cast<T*>(b.d_branch) + (two ? target : 0);
  const ModulationRow<T, kOwn> gate(p.gate, at, p.index, first);
  each(kEach, [&](auto i) {
    float direct[kOwn], squared[kOwn];
    dn_of(direct, i);
    to_floats(squared, add_rounded(v[i], v[i]));  // exact
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      direct[j] = of_row.direct<T, false>(direct[j]);
      squared[j] = of_row.of_twice(squared[j]);
    }
    Own values, other;
    if constexpr (ROUND) {
      const auto rounded = from_floats<T, kOwn>(direct);
      other = from_floats<T, kOwn>(squared);
      values = b.parted ? rounded : add_rounded(rounded, other);
      if (gated) other = multiply_rounded(values, gate.load(i * kPeriod));
    } else {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) direct[j] = __fadd_rn(direct[j], squared[j]);
      values = from_floats<T, kOwn>(direct);
      if (two) {
        float gates[kOwn];
        to_floats(gates, gate.load(i * kPeriod));
#pragma unroll
        for (int j = 0; j < kOwn; ++j) direct[j] = __fmul_rn(direct[j], gates[j]);
        other = from_floats<T, kOwn>(direct);
      }
    }
    store_row<Cache::normal>(d_row + i * kPeriod, values);
    if (two) store_row<Cache::normal>(d_branch + i * kPeriod, other);
  });
}

// Any width, alignment, number of rows, and mix of dtypes: as any_mean_norm_kernel.
__global__ void __launch_bounds__(kAnyThreads, 4) any_mean_norm_backward_kernel(const SiteBackward b, const int lanes) {
  const Problem& p = b.site;
  const DType dtype = p.x.dtype;
  const auto rounded = [&](float v) { return p.round_each ? round_to(v, dtype) : v; };
  const int width = static_cast<int>(p.width);
  __shared__ float sums[kMostMeanLanes];
  wait_for_previous_kernel();
  for (int64_t row = blockIdx.x; row < p.batch * p.tokens; row += gridDim.x) {
    const int64_t batch = p.batch == 1 ? 0 : row / p.tokens;
    const Token at(p, batch, row - batch * p.tokens);
    const Modulation& m = factor_of(p);
    const int64_t x_offset = at.offset(p.x), dy_offset = at.offset(b.dy), dr_offset = at.offset(b.dr), out = row * p.width;
    const int64_t factors = at.offset(m, p.index), gates = at.offset(p.gate, p.index);
    const auto x = [&](int64_t column) { return element(Vector{p.x.data, dtype}, x_offset + column, 0.0f); };
    const auto dn = [&](int64_t column) {
      float d = element(Vector{b.dy.data, dtype}, dy_offset + column, 0.0f);
      if (m.data != nullptr) {
        const float factor = element(m, factors, column, 0.0f);
        d = rounded(__fmul_rn(d, p.norms_x ? factor : rounded(__fadd_rn(1.0f, factor))));
      }
      const Vector& weight = weight_of(p);
      return weight.data == nullptr ? d : rounded(__fmul_rn(d, element(weight, column, kNoWeight)));
    };
    const float rstd = at.valid ? root_of_mean(mean_order_sum_of_squares<1>(width, x, lanes, sums), p) : kNaN;
    const float dot = mean_order_sum<1>(width, [&](int j) { return __fmul_rn(dn(j), x(j)); }, lanes, sums);
    const MeanSquareGradient of_row = mean_square_gradient(rstd, dot, p.width);
#pragma unroll 1
    for (int64_t column = threadIdx.x; column < width; column += kAnyThreads) {
      float direct = rounded(of_row.direct<float, false>(dn(column)));
      if (b.dr.data != nullptr) direct = rounded(__fadd_rn(element(Vector{b.dr.data, dtype}, dr_offset + column, 0.0f), direct));
      const float squared = rounded(of_row.squared<float, false>(x(column)));
      const float value = b.parted ? direct : rounded(__fadd_rn(direct, squared));
      store_float(b.d_row, dtype, out + column, value);
      if (b.parted) {
        store_float(b.d_branch, dtype, out + column, squared);
      } else if (b.d_branch != nullptr) {
        store_float(b.d_branch, dtype, out + column, __fmul_rn(value, element(p.gate, gates, column, kNoGate)));
      }
    }
  }
}

int mean_norm_backward(const SiteBackward& b, void* stream) {
  const Problem& p = b.site;
  const int lanes = mean_lanes(p.batch * p.tokens, p.width);
  const auto fits = [&](const Rows& rows) { return aligned16(rows.data, p.x.dtype, rows.batch_stride, rows.token_stride); };
  if (!fits_a_block(p, lanes) || !fits(b.dy) || !fits(b.dr)) {
    return launch(&any_mean_norm_backward_kernel, blocks(p.batch * p.tokens), kAnyThreads, stream, b, lanes);
  }
  const dim3 grid(static_cast<unsigned>(p.tokens), static_cast<unsigned>(p.batch));
  const auto go = [&](auto rounded, auto exact, int threads) {
    return p.round_each ? launch(rounded, grid, threads, stream, b) : launch(exact, grid, threads, stream, b);
  };
  const auto alone = [&](auto steps, auto blocks) {
    return go(&lone_mean_norm_backward_kernel<true, steps, blocks>, &lone_mean_norm_backward_kernel<false, steps, blocks>, kPeriod / kOwn);
  };
  if (b.dr.data == nullptr) {
    switch (p.width) {  // of Lumina2, Z-Image and LTX-2
      case 2304: return alone(Constant<2304 / kPeriod>{}, Constant<10>{});
      case 3840: return alone(Constant<3840 / kPeriod>{}, Constant<8>{});
      case 4096: return alone(Constant<4096 / kPeriod>{}, Constant<8>{});
    }
  }
  return go(&mean_norm_backward_kernel<true>, &mean_norm_backward_kernel<false>, kMeanThreads);
}

}  // namespace ditnorm
