// Window sums in one pass over the pixels, for one instruction set; see
// compile_for_instruction_sets.h.

// The sums of rows by cells of PLANES planes, one vector of pixels along x of each. Not inlined:
// its loop needs all registers.
template <typename In, typename T, int PLANES>
KFAC_FAST_TARGET __attribute__((noinline)) void sum_rows_of_planes(const SumPlan& plan,
                                                                   const In* plane,
                                                                   int64_t plane_stride, T* sums) {
  using Vector = typename VectorOf<T>::type;
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
      auto& sum = *reinterpret_cast<Vector*>(target + p * plan.sums_a_plane());
      sum = rows.first ? total[p] : sum + total[p];
    }
  }
}

// The same of several vectors of one plane: long rows are best read from end to end.
template <typename In, typename T, int VECTORS>
KFAC_FAST_TARGET __attribute__((noinline)) void sum_long_rows(const SumPlan& plan, const In* plane,
                                                              T* sums) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
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

// Adds to a sum what the last addition to it rounded off (Kahan), too.
template <typename Vector>
KFAC_FAST_TARGET inline void add_compensated(Vector& sum, Vector& lost, Vector more) {
  more -= lost;
  const Vector total = sum + more;
  lost = (total - sum) - more;
  sum = total;
}

// From sums by cells to taps, along x and then along z and y, for a vector of channels.
template <typename T>
KFAC_FAST_TARGET inline void sum_taps(const SumPlan& plan, T alpha,
                                      const typename VectorOf<T>::type* cells,
                                      typename VectorOf<T>::type* along_x,
                                      typename VectorOf<T>::type* taps) {
  using Vector = typename VectorOf<T>::type;
  for (int64_t outer = 0; outer < plan.outer_cells; ++outer, cells += plan.cells) {
    for (int64_t tap = 0; tap < plan.taps; ++tap) {
      Vector total{};
      for (const SumPlan::Term& term : plan.terms_of(tap)) {
        total += cells[term.cell] * static_cast<T>(term.weight);
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
}

// target[channel][tap] <- beta · target + taps[tap][channel]. Few taps are stored with whole
// vectors: what comes after them is written later.
template <typename T>
KFAC_FAST_TARGET inline void store_taps(const typename VectorOf<T>::type* taps, int64_t count,
                                        int64_t channels, T beta, T* target) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  T turned[LANES * LANES];
  const T* end = target + channels * count;
  for (int64_t first = 0; first < count; first += LANES) {
    const int64_t width = std::min(LANES, count - first);
    store_transposed(reinterpret_cast<const T*>(taps + first), LANES, LANES, turned, LANES);
    for (int64_t c = 0; c < channels; ++c) {
      T* place = target + c * count + first;
      const T* value = turned + c * LANES;
      const bool free = count <= LANES ? end - place >= LANES : width == LANES;
      if (beta == 0 && free) {
        *reinterpret_cast<Vector*>(place) = *reinterpret_cast<const Vector*>(value);
      } else {
        for (int64_t i = 0; i < width; ++i) {
          place[i] = beta == 0 ? value[i] : value[i] + beta * place[i];
        }
      }
    }
  }
}

// The rows of some planes summed by cells; false where no whole vectors may be read.
template <typename In, typename T, int PLANES>
KFAC_FAST_TARGET inline bool sum_planes_rows(const SumPlan& plan, const Channels<In>& channels,
                                             const In* plane, T* sums) {
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  if (channels.pixel_stride != 1 ||
      plane + (PLANES - 1) * channels.stride + plan.reach > channels.end) {
    return false;
  }
  int64_t x = 0;
  for (; plan.padded_width - x >= 4 * LANES; x += 4 * LANES) {
    for (int p = 0; p < PLANES; ++p) {
      sum_long_rows<In, T, 4>(plan, plane + p * channels.stride + x,
                              sums + p * plan.sums_a_plane() + x);
    }
  }
  for (; plan.padded_width - x >= 2 * LANES; x += 2 * LANES) {
    for (int p = 0; p < PLANES; ++p) {
      sum_long_rows<In, T, 2>(plan, plane + p * channels.stride + x,
                              sums + p * plan.sums_a_plane() + x);
    }
  }
  if (x < plan.padded_width) {
    sum_rows_of_planes<In, T, PLANES>(plan, plane + x, channels.stride, sums + x);
  }
  return true;
}

// The cells of a vector of planes or fewer: their rows are summed along y first, a vector of
// neighbouring pixels at a time, and the few sums transposed.
template <typename In, typename T>
KFAC_FAST_TARGET void sum_cells_of_planes(const SumPlan& plan, const Channels<In>& channels,
                                          const In* first, int64_t planes, T* rows,
                                          typename VectorOf<T>::type* cells) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  constexpr int64_t TOGETHER = KFAC_FAST_VECTOR_BYTES == 16 ? 4 : 8;  // sums that registers hold
  for (int64_t p = 0, next; p < planes; p = next) {
    const In* plane = first + p * channels.stride;
    T* sums = rows + p * plan.sums_a_plane();
    next = p + TOGETHER;
    if (next <= planes && sum_planes_rows<In, T, TOGETHER>(plan, channels, plane, sums)) continue;
    next = p + 1;
    if (!sum_planes_rows<In, T, 1>(plan, channels, plane, sums)) {
      sum_rows_one_by_one(plan, plane, channels.pixel_stride, sums);
    }
  }
  T turned[LANES * LANES];
  Vector* lost = cells + plan.outer_cells * plan.cells;
  std::fill_n(cells, 2 * plan.outer_cells * plan.cells, Vector{});
  for (int64_t outer = 0; outer < plan.outer_cells; ++outer) {
    auto columns = plan.columns.begin();
    for (int64_t x = 0; x < plan.width; x += LANES) {
      const int64_t width = std::min(LANES, plan.width - x);
      store_transposed(rows + outer * plan.padded_width + x, plan.sums_a_plane(), LANES, turned,
                       LANES);
      for (; columns != plan.columns.end() && columns->begin < x + width; ++columns) {
        const int64_t begin = std::max(columns->begin - x, int64_t{0});
        const int64_t end = std::min(columns->end - x, width);
        Vector total{};
        for (int64_t i = begin; i < end; ++i) {
          total += *reinterpret_cast<const Vector*>(turned + i * LANES);
        }
        const int64_t cell = outer * plan.cells + columns->cell;
        add_compensated(cells[cell], lost[cell], total);
        if (columns->end > x + width) break;  // the rest is in the next vector
      }
    }
  }
}

// Channels that lie far apart (channels first), a vector of them at a time.
template <typename In, typename T>
KFAC_FAST_TARGET void sum_planes(const SumPlan& plan, const Channels<In>& channels, T alpha, T beta,
                                 T* scratch, T* target) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  auto* cells = reinterpret_cast<Vector*>(scratch);
  auto* along_x = cells + 2 * plan.outer_cells * plan.cells;
  auto* taps = along_x + plan.outer_cells * plan.taps;
  T* rows = reinterpret_cast<T*>(taps + round_up(plan.outer_taps * plan.taps, LANES));
  const int64_t count = plan.outer_taps * plan.taps;
  for (int64_t c = 0; c < channels.count; c += LANES, target += LANES * count) {
    const In* first = channels.data + c * channels.stride;
    const int64_t planes = std::min(LANES, channels.count - c);
    sum_cells_of_planes(plan, channels, first, planes, rows, cells);
    sum_taps(plan, alpha, cells, along_x, taps);
    store_taps(taps, count, planes, beta, target);
  }
}

// The pixels of VECTORS vectors of neighbouring channels summed by cells, along x first. `chains`
// is room for the sums of some rows, which then are added to the cells: less rounding.
template <typename In, typename T, int VECTORS>
KFAC_FAST_TARGET void sum_cells_of_pixels(const SumPlan& plan, const In* data, int64_t pixel_stride,
                                          typename VectorOf<T>::type* cells,
                                          typename VectorOf<T>::type* chains) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  const int64_t count = plan.outer_cells * plan.cells;
  Vector* lost = cells + VECTORS * count;
  std::fill_n(cells, 2 * VECTORS * count, Vector{});
  for (const SumPlan::Rows& rows : plan.rows) {
    const In* row = data + rows.offset;
    std::fill_n(chains, VECTORS * plan.columns.size(), Vector{});
    for (int64_t r = 0; r < rows.count; ++r, row += rows.stride) {
      Vector* chain = chains;
      for (const SumPlan::Columns& columns : plan.columns) {
        Vector total[VECTORS] = {};
        const In* pixel = row + columns.begin * pixel_stride;
        for (int64_t x = columns.begin; x < columns.end; ++x, pixel += pixel_stride) {
#pragma GCC unroll 4
          for (int v = 0; v < VECTORS; ++v) total[v] += load_vector<In, T>(pixel + v * LANES);
        }
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) *chain++ += total[v];
      }
    }
    const Vector* chain = chains;
    for (const SumPlan::Columns& columns : plan.columns) {
      const int64_t cell = rows.cell * plan.cells + columns.cell;
      for (int v = 0; v < VECTORS; ++v) {
        add_compensated(cells[v * count + cell], lost[v * count + cell], *chain++);
      }
    }
  }
}

// The cells of fewer channels than a vector holds.
template <typename In, typename T>
KFAC_FAST_TARGET void sum_cells_of_few(const SumPlan& plan, const Channels<In>& channels,
                                       const In* data, int64_t width, T* cells) {
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  T* lost = cells + plan.outer_cells * plan.cells * LANES;
  std::fill_n(cells, 2 * plan.outer_cells * plan.cells * LANES, T{0});
  for (const SumPlan::Rows& rows : plan.rows) {
    for (const SumPlan::Columns& columns : plan.columns) {
      const int64_t cell = (rows.cell * plan.cells + columns.cell) * LANES;
      for (int64_t i = 0; i < width; ++i) {
        T chain = 0;
        for (int64_t r = 0; r < rows.count; ++r) {
          const In* row = data + rows.offset + r * rows.stride + i;
          T total = 0;
          for (int64_t x = columns.begin; x < columns.end; ++x) {
            total += static_cast<T>(row[x * channels.pixel_stride]);
          }
          chain += total;
        }
        add_compensated(cells[cell + i], lost[cell + i], chain);
      }
    }
  }
}

// Neighbouring channels (channels last), some vectors of them at a time.
template <typename In, typename T>
KFAC_FAST_TARGET void sum_pixels(const SumPlan& plan, const Channels<In>& channels, T alpha, T beta,
                                 T* scratch, T* target) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T), TOGETHER = channel_vectors;
  auto* cells = reinterpret_cast<Vector*>(scratch);
  auto* along_x = cells + 2 * TOGETHER * plan.outer_cells * plan.cells;
  auto* taps = along_x + plan.outer_cells * plan.taps;
  auto* chains = taps + round_up(plan.outer_taps * plan.taps, LANES);
  const int64_t count = plan.outer_taps * plan.taps;
  for (int64_t c = 0, next; c < channels.count; c = next) {
    const int64_t left = channels.count - c;
    next = c + (left >= TOGETHER * LANES ? TOGETHER * LANES : std::min(LANES, left));
    const In* data = channels.data + c;
    if (left >= TOGETHER * LANES) {
      sum_cells_of_pixels<In, T, TOGETHER>(plan, data, channels.pixel_stride, cells, chains);
    } else if (left >= LANES) {
      sum_cells_of_pixels<In, T, 1>(plan, data, channels.pixel_stride, cells, chains);
    } else {
      sum_cells_of_few(plan, channels, data, left, reinterpret_cast<T*>(cells));
    }
    for (int64_t first = c; first < next; first += LANES) {
      sum_taps(plan, alpha, cells + (first - c) / LANES * plan.outer_cells * plan.cells, along_x,
               taps);
      store_taps(taps, count, std::min(LANES, next - first), beta, target + first * count);
    }
  }
}
