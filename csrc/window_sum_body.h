// Window sums in one pass over the pixels, for one instruction set; see
// compile_for_instruction_sets.h.

// The sums of rows by cells of PLANES planes, one vector of pixels along x of each.
template <typename In, typename T, int PLANES>
KFAC_FAST_TARGET inline void sum_rows_of_planes(const SumPlan& plan, const In* plane,
                                                int64_t plane_stride, T* sums) {
  using Vector = typename VectorOf<T>::type;
  const int64_t distance = plan.outer_cells * plan.padded_width;
  for (const SumPlan::Rows& rows : plan.rows) {
    const In* row = plane + rows.offset;
    Vector total[PLANES] = {};
    for (int64_t r = 0; r < rows.count; ++r, row += rows.stride) {
#pragma GCC unroll 8
      for (int p = 0; p < PLANES; ++p) total[p] += load_vector<In, T>(row + p * plane_stride);
    }
    T* target = sums + rows.cell * plan.padded_width;
#pragma GCC unroll 8
    for (int p = 0; p < PLANES; ++p) {
      auto& sum = *reinterpret_cast<Vector*>(target + p * distance);
      sum = rows.first ? total[p] : sum + total[p];
    }
  }
}

// The same of four vectors of one plane: long rows are best read from end to end.
template <typename In, typename T>
KFAC_FAST_TARGET inline void sum_long_rows(const SumPlan& plan, const In* plane, T* sums) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T), VECTORS = 4;
  for (const SumPlan::Rows& rows : plan.rows) {
    const In* row = plane + rows.offset;
    Vector total[VECTORS] = {};
    for (int64_t r = 0; r < rows.count; ++r, row += rows.stride) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) total[v] += load_vector<In, T>(row + v * LANES);
    }
    auto* target = reinterpret_cast<Vector*>(sums + rows.cell * plan.padded_width);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) target[v] = rows.first ? total[v] : target[v] + total[v];
  }
}

// The same of pixels at any distance, or where no whole vector may be read.
template <typename In, typename T>
KFAC_FAST_TARGET void sum_rows_one_by_one(const SumPlan& plan, const In* plane,
                                          int64_t pixel_stride, T* sums) {
  for (const SumPlan::Rows& rows : plan.rows) {
    T* target = sums + rows.cell * plan.padded_width;
    for (int64_t x = 0; x < plan.width; ++x) {
      const In* pixel = plane + rows.offset + x * pixel_stride;
      T total = 0;
      for (int64_t r = 0; r < rows.count; ++r) total += static_cast<T>(pixel[r * rows.stride]);
      target[x] = rows.first ? total : target[x] + total;
    }
  }
}

// total[p] += Σ_x weights[x] · sums[p][x] over the pixels that taps read: no others, which may be
// infinite, are multiplied, not even with a weight of 0. Short chains round less.
template <typename T, int PLANES>
KFAC_FAST_TARGET inline void weigh(const SumPlan& plan, const T* sums, int64_t distance,
                                   const typename VectorOf<T>::type* weights,
                                   typename VectorOf<T>::type (&total)[PLANES]) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t CHAIN = 16;
  for (const auto& [begin, end] : plan.reads) {
    for (int64_t x = begin; x < end;) {
      Vector chain[PLANES] = {};
      for (const int64_t last = std::min(x + CHAIN, end); x < last; ++x) {
        const Vector weight = weights[x];
#pragma GCC unroll 8
        for (int p = 0; p < PLANES; ++p) chain[p] += weight * sums[p * distance + x];
      }
#pragma GCC unroll 8
      for (int p = 0; p < PLANES; ++p) total[p] += chain[p];
    }
  }
}

// target[tap] <- beta · target[tap] + value[tap] for the taps of one vector. The lanes beyond them
// may be stored before `free_end`: what is there is written later.
template <typename T>
KFAC_FAST_TARGET inline void store_taps(typename VectorOf<T>::type value, int64_t taps, T beta,
                                        T* target, const T* free_end) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  if (beta == 0 && (taps == LANES || free_end - target >= LANES)) {
    *reinterpret_cast<Vector*>(target) = value;
  } else {
    for (int64_t i = 0; i < taps; ++i) {
      target[i] = beta == 0 ? value[i] : value[i] + beta * target[i];
    }
  }
}

// All taps of PLANES channels from the sums of their rows: with the weights of every pixel, a
// vector of taps for each. Few taps make one vector; else those along x do, and the others follow
// from their sums.
template <typename T, int PLANES>
KFAC_FAST_TARGET inline void sum_taps(const SumPlan& plan, const T* pixel_weights, T alpha, T beta,
                                      const T* sums, T* scratch, T* target, const T* end) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  const auto* weights = reinterpret_cast<const Vector*>(pixel_weights);
  const int64_t distance = plan.outer_cells * plan.padded_width;
  const int64_t taps = plan.outer_taps * plan.taps;
  if (plan.few_taps) {
    Vector total[PLANES] = {};
    for (int64_t cell = 0; cell < plan.outer_cells; ++cell) {
      weigh<T, PLANES>(plan, sums + cell * plan.padded_width, distance, weights + cell * plan.width,
                       total);
    }
#pragma GCC unroll 8
    for (int p = 0; p < PLANES; ++p)
      store_taps(total[p] * alpha, taps, beta, target + p * taps, end);
    return;
  }
  auto* along_x = reinterpret_cast<Vector*>(scratch);  // [cell][plane]
  const T* free_end = plan.taps <= LANES ? end : target;
  for (int64_t first = 0; first < plan.taps; first += LANES, weights += plan.width) {
    for (int64_t cell = 0; cell < plan.outer_cells; ++cell) {
      Vector total[PLANES] = {};
      weigh<T, PLANES>(plan, sums + cell * plan.padded_width, distance, weights, total);
      for (int p = 0; p < PLANES; ++p) along_x[cell * PLANES + p] = total[p] * alpha;
    }
    for (int p = 0; p < PLANES; ++p) {
      for (int64_t outer = 0; outer < plan.outer_taps; ++outer) {
        Vector total{};
        for (const SumPlan::Term& term : plan.outer_terms_of(outer)) {
          total += along_x[term.cell * PLANES + p] * static_cast<T>(term.weight);
        }
        store_taps(total, std::min<int64_t>(LANES, plan.taps - first), beta,
                   target + p * taps + outer * plan.taps + first, free_end);
      }
    }
  }
}

// PLANES channels that lie far apart (channels first): the sums of their rows, then their taps.
template <typename In, typename T, int PLANES>
KFAC_FAST_TARGET void sum_some_planes(const SumPlan& plan, const T* pixel_weights,
                                      const Channels<In>& channels, const In* plane, T alpha,
                                      T beta, T* scratch, T* target, const T* end) {
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  const int64_t size = plan.outer_cells * plan.padded_width;
  if (channels.pixel_stride != 1 ||
      plane + (PLANES - 1) * channels.stride + plan.reach > channels.end) {
    for (int p = 0; p < PLANES; ++p) {
      sum_rows_one_by_one(plan, plane + p * channels.stride, channels.pixel_stride,
                          scratch + p * size);
    }
  } else {
    int64_t x = 0;
    for (; plan.padded_width - x >= 4 * LANES; x += 4 * LANES) {
      for (int p = 0; p < PLANES; ++p) {
        sum_long_rows(plan, plane + p * channels.stride + x, scratch + p * size + x);
      }
    }
    for (; x < plan.padded_width; x += LANES) {
      sum_rows_of_planes<In, T, PLANES>(plan, plane + x, channels.stride, scratch + x);
    }
  }
  sum_taps<T, PLANES>(plan, pixel_weights, alpha, beta, scratch, scratch + PLANES * size, target,
                      end);
}

template <typename In, typename T>
KFAC_FAST_TARGET void sum_planes(const SumPlan& plan, const T* pixel_weights,
                                 const Channels<In>& channels, T alpha, T beta, T* scratch,
                                 T* target) {
  constexpr int64_t TOGETHER = KFAC_FAST_VECTOR_BYTES == 64 ? 8 : 4;  // sums that registers hold
  const int64_t taps = plan.outer_taps * plan.taps;
  const T* end = target + channels.count * taps;
  const In* plane = channels.data;
  for (int64_t left = channels.count; left > 0;) {
    const In* last = plane + (TOGETHER - 1) * channels.stride;
    const bool many = left >= TOGETHER && last + plan.reach <= channels.end;
    const auto sum = many ? sum_some_planes<In, T, TOGETHER> : sum_some_planes<In, T, 1>;
    sum(plan, pixel_weights, channels, plane, alpha, beta, scratch, target, end);
    const int64_t done = many ? TOGETHER : 1;
    left -= done, plane += done * channels.stride, target += done * taps;
  }
}

// All taps of neighbouring channels (channels last), a vector of them at a time: their pixels are
// summed by cells along x and then along y.
template <typename In, typename T>
KFAC_FAST_TARGET void sum_pixels(const SumPlan& plan, const T*, const Channels<In>& channels,
                                 T alpha, T beta, T* scratch, T* target) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  auto* cells = reinterpret_cast<Vector*>(scratch);
  auto* along_x = cells + plan.outer_cells * plan.cells;
  auto* taps = along_x + plan.outer_cells * plan.taps;
  const int64_t count = plan.outer_taps * plan.taps;
  for (int64_t c = 0; c < channels.count; c += LANES) {
    const int64_t width = std::min<int64_t>(LANES, channels.count - c);
    const bool whole = width == LANES;
    std::fill_n(cells, plan.outer_cells * plan.cells, Vector{});
    for (const SumPlan::Rows& rows : plan.rows) {
      const In* row = channels.data + c + rows.offset;
      for (int64_t r = 0; r < rows.count; ++r, row += rows.stride) {
        for (const SumPlan::Columns& columns : plan.columns) {
          Vector total{};
          for (int64_t x = columns.begin; x < columns.end; ++x) {
            const In* pixel = row + x * channels.pixel_stride;
            if (whole) {
              total += load_vector<In, T>(pixel);
            } else {
              for (int64_t i = 0; i < width; ++i) total[i] += static_cast<T>(pixel[i]);
            }
          }
          cells[rows.cell * plan.cells + columns.cell] += total;
        }
      }
    }
    for (int64_t outer = 0; outer < plan.outer_cells; ++outer) {
      for (int64_t tap = 0; tap < plan.taps; ++tap) {
        Vector total{};
        for (const SumPlan::Term& term : plan.terms_of(tap)) {
          total += cells[outer * plan.cells + term.cell] * static_cast<T>(term.weight);
        }
        along_x[outer * plan.taps + tap] = total * alpha;
      }
    }
    for (int64_t outer = 0; outer < plan.outer_taps; ++outer) {
      for (int64_t tap = 0; tap < plan.taps; ++tap) {
        Vector total{};
        for (const SumPlan::Term& term : plan.outer_terms_of(outer)) {
          total += along_x[term.cell * plan.taps + tap] * static_cast<T>(term.weight);
        }
        taps[outer * plan.taps + tap] = total;
      }
    }
    const T* sums = reinterpret_cast<const T*>(taps);
    for (int64_t lane = 0; lane < width; ++lane, target += count) {
      if (beta == 0) {
        for (int64_t k = 0; k < count; ++k) target[k] = sums[k * LANES + lane];
      } else {
        for (int64_t k = 0; k < count; ++k) target[k] = sums[k * LANES + lane] + beta * target[k];
      }
    }
  }
}
