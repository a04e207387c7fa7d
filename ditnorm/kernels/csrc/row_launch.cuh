// Choosing among the fast kernels of one op and one dtype. Each pair has a file of its own
// (norm_scale_shift_bf16.cu, ...), so that they compile side by side.
#pragma once
#include <iterator>
#include <utility>

#include "dispatch.cuh"
#include "quantize.h"
#include "row_kernel.cuh"
#include "variants.h"
#include "walking_kernel.cuh"

namespace ditnorm {

inline Extras extras(const Problem& p) {
  const auto in_registers = [&](const Vector& vector) { return vector.data == nullptr || vector.dtype == p.x.dtype; };
  const bool affine = p.weight.data != nullptr, tables = p.gate.table.data != nullptr || p.scale.table.data != nullptr;
  if (!affine) return tables ? Extras::tables : Extras::none;
  return !tables && in_registers(p.weight) && in_registers(p.bias) ? Extras::affine : Extras::any;
}

inline bool shared_modulations(const Problem& p) {
  return p.index.data == nullptr && p.scale.row_stride == 0 && p.shift.row_stride == 0 && p.gate.row_stride == 0 &&
         p.batch * p.tokens > kManyRows;
}

// Goes through kNormSites, or where y is quantised through kQuantizedNormSites. (Templates of
// functions: generic lambdas that pass constants on to each other crash compilers.)
// AGAIN: through kNormSitesAgain.
template <class T, class M, bool RESIDUAL, bool ROUND, bool QUANTIZES, bool AGAIN = false>
class RowLaunch {
 public:
  RowLaunch(const Problem& p, void* stream, Partials known = {})
      : p_(p), known_(known), stream_(stream), extras_(extras(p)), shared_(shared_modulations(p)) {}

  int run() {
    try_sites(std::make_integer_sequence<int, std::size(kSites)>{});
    return result_;
  }

 private:
  static constexpr const auto& sites() {
    if constexpr (AGAIN) {
      return variants::kNormSitesAgain;
    } else if constexpr (QUANTIZES) {
      return variants::kQuantizedNormSites;
    } else {
      return variants::kNormSites;
    }
  }
  static constexpr const auto& kSites = sites();
  static constexpr const NormSite& site(int i) { return kSites[i]; }

  template <int... SITES>
  void try_sites(std::integer_sequence<int, SITES...>) {
    (void)(try_site<SITES>() || ...);
  }
  template <int SITE>
  bool try_site() {
    constexpr const NormSite& kSite = site(SITE);
    if constexpr (kSite.compiled_for(RESIDUAL, dtype_of<T>, dtype_of<M>, ROUND)) {
      return kSite.serves(extras_, shared_) && try_widths<SITE>(std::make_integer_sequence<int, kSite.widths.count()>{});
    }
    return false;
  }
  template <int SITE, int... WIDTHS>
  bool try_widths(std::integer_sequence<int, WIDTHS...>) {
    return (try_width<SITE, WIDTHS>() || ...);
  }
  template <int SITE, int WIDTH>
  bool try_width() {
    constexpr const NormSite& kSite = site(SITE);
    using Row = Tiles<kSite.widths.list[WIDTH].tiles, kSite.widths.full(WIDTH), kSite.widths.list[WIDTH].blocks>;
    using Threads = Shape<kSite.lanes, kSite.ahead, kSite.rows>;
    if (!Row::serves(p_.width)) return false;
    if constexpr (kSite.rows > 1) {
      using Memory = WalkingMemory<T, M, kSite.extras == Extras::tables, RESIDUAL, Columns<T, Row, Threads>, Threads>;
      return walk<&walking_kernel<T, M, kSite.extras, RESIDUAL, ROUND, Row, Threads, AGAIN>, Threads>(sizeof(Memory));
    } else {
      const dim3 grid(static_cast<unsigned>(p_.tokens), static_cast<unsigned>(p_.batch));
      result_ = launch(&row_kernel<T, M, kSite.extras, RESIDUAL, ROUND, QUANTIZES, Row, Threads>, grid, Threads::kThreads, stream_, p_);
    }
    return true;
  }

  // As many blocks as run at the same time, and with a residual others that follow. False on a GPU with
  // too little shared memory.
  template <auto KERNEL, class THREADS>
  bool walk(int bytes) {
    const int64_t resident = resident_blocks<KERNEL>(THREADS::kThreads, bytes);
    if (resident == 0) return false;
    const int64_t groups = (p_.tokens + THREADS::kRows - 1) / THREADS::kRows;
    const int64_t walkers = std::min(groups, std::max<int64_t>(1, resident / p_.batch));
    const Deal deal = RESIDUAL ? deal_to(walkers, THREADS::kRows) : Deal{};
    const auto batch = static_cast<unsigned>(p_.batch);
    const dim3 grid = RESIDUAL ? dim3(batch, deal.walkers + deal.enders) : dim3(static_cast<unsigned>(walkers), batch);
    const bool asked = AGAIN && known_.data == nullptr;
    result_ = asked ? 0 : launch_with(bytes, KERNEL, grid, THREADS::kThreads, stream_, p_, known_, deal);
    return true;
  }

  // Nine tenths of the rows are shared, as measured on an H200; few turns leave nothing for others.
  Deal deal_to(int64_t walkers, int64_t rows) const {
    constexpr int64_t kFewestTurns = 6, kMostBlocks = 0xffff;
    const int64_t turn = walkers * rows, shared = p_.tokens < kFewestTurns * turn ? p_.tokens : p_.tokens * 9 / 10 / turn * turn;
    const int64_t enders = std::min((p_.tokens - shared + rows - 1) / rows, kMostBlocks - walkers);
    return {static_cast<unsigned>(walkers), static_cast<unsigned>(shared), static_cast<unsigned>(enders)};
  }

  const Problem& p_;
  const Partials known_;
  void* const stream_;
  const Extras extras_;
  const bool shared_;
  int result_ = kNotServed;
};

template <bool RESIDUAL, class T>
int launch_row_kernels(const Problem& p, DType modulation, void* stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (modulation == DType::f32) return RowLaunch<T, float, RESIDUAL, false, false>(p, stream).run();
    if (p.round_each) return RowLaunch<T, T, RESIDUAL, true, false>(p, stream).run();
  }
  return RowLaunch<T, T, RESIDUAL, false, false>(p, stream).run();
}

template <bool RESIDUAL>
int launch_quantized_row_kernels(const Problem& p, void* stream) {
  using T = __nv_bfloat16;
  if (p.x.dtype != DType::bf16 || fast_modulation_dtype(p) != DType::bf16) return kNotServed;
  if (p.round_each) return RowLaunch<T, T, RESIDUAL, true, true>(p, stream).run();
  return RowLaunch<T, T, RESIDUAL, false, true>(p, stream).run();
}

}  // namespace ditnorm
