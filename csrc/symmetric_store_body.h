// The store of a tile and its mirror image for one instruction set; see
// compile_for_instruction_sets.h.

// Stores a whole cache line past the caches, where a vector is one. Such stores come in runs, with
// as few as possible to memory that is cached in between: those keep their order and wait for them.
template <typename T>
KFAC_FAST_TARGET inline void store_past_caches(T* target, typename VectorOf<T>::type value) {
#if KFAC_FAST_VECTOR_BYTES == 64
  __builtin_ia32_movntps512(reinterpret_cast<float*>(target),
                            reinterpret_cast<VectorOf<float>::type>(value));
#else
  *reinterpret_cast<typename VectorOf<T>::type*>(target) = value;
#endif
}

// One row: values[c] = target[c] <- beta · target[c] + alpha · sum[c]; past the caches the target's
// whole vectors are left to the caller.
template <typename T>
KFAC_FAST_TARGET inline void store_row(const TileSums<T>& sums, int64_t width, T alpha, T beta,
                                       T* target, T* values, bool past_caches) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) {
    const T* sum = sums.data + c;
    Vector value = *reinterpret_cast<const Vector*>(sum);
    for (int64_t part = 1; part < sums.parts; ++part) {
      value += *reinterpret_cast<const Vector*>(sum + part * sums.distance);
    }
    value *= alpha;
    auto* place = reinterpret_cast<Vector*>(target + c);
    if (beta != 0) value += *place * beta;
    if (!past_caches) *place = value;
    *reinterpret_cast<Vector*>(values + c) = value;
  }
  for (; c < width; ++c) {
    T value = sums.data[c];
    for (int64_t part = 1; part < sums.parts; ++part) value += sums.data[part * sums.distance + c];
    value *= alpha;
    if (beta != 0) value += beta * target[c];
    target[c] = values[c] = value;
  }
}

// Writes the columns of a square of whole lines as rows.
template <typename T>
KFAC_FAST_TARGET inline void store_transposed_past_caches(const T* square, int64_t square_stride,
                                                          T* target, int64_t target_stride) {
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  typename VectorOf<T>::type rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) rows[i] = load_vector<T, T>(square + i * square_stride);
  transpose_lanes<T>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) store_past_caches(target + i * target_stride, rows[i]);
}

// See SymmetricStore.
template <typename T>
KFAC_FAST_TARGET void store_symmetric(const TileSums<T>& sums, int64_t rows, int64_t columns,
                                      bool diagonal, T alpha, T beta, T* target, T* mirror,
                                      int64_t edge, bool past_caches) {
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  constexpr int64_t HEIGHT = 32;  // the mirror image is written by pairs of cache lines
  T values[HEIGHT][max_tile_edge];
  T square[LANES][LANES];
  for (int64_t top = 0; top < rows; top += HEIGHT) {
    const int64_t count = std::min(HEIGHT, rows - top);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t width = diagonal ? std::min(columns, top + r + 1) : columns;
      store_row(sums.at(top + r, 0), width, alpha, beta, target + (top + r) * edge, values[r],
                past_caches);
    }
    for (int64_t r = 0; past_caches && r < count; ++r) {
      const int64_t width = diagonal ? std::min(columns, top + r + 1) : columns;
      for (int64_t c = 0; c + LANES <= width; c += LANES) {
        store_past_caches(target + (top + r) * edge + c, load_vector<T, T>(values[r] + c));
      }
    }
    const int64_t left = diagonal ? std::min(top, columns) : columns;  // of the diagonal
    T* image = mirror + top;
    int64_t c = 0;
    for (; c + LANES <= left; c += LANES) {
      for (int64_t r = 0; r < count; r += LANES) {
        T* place = image + c * edge + r;
        if (r + LANES <= count && !past_caches) {
          store_transposed(values[r] + c, max_tile_edge, LANES, place, edge);
        } else if (r + LANES <= count) {
          store_transposed_past_caches(values[r] + c, max_tile_edge, place, edge);
        } else {
          store_transposed(values[r] + c, max_tile_edge, LANES, square[0], LANES);
          for (int64_t i = 0; i < LANES; ++i) std::copy_n(square[i], count - r, place + i * edge);
        }
      }
    }
    for (; c < std::min(columns, diagonal ? top + count : columns); ++c) {
      const int64_t first = diagonal ? std::max(c - top, int64_t{0}) : 0;
      for (int64_t r = first; r < count; ++r) image[c * edge + r] = values[r][c];
    }
  }
}

// total[v][r] = Σ_k left[k][r] · the v-th vector of right[k]
template <typename T, int VECTORS, int ROWS>
KFAC_FAST_TARGET inline void multiply_in_registers(
    const T* left, const T* right, int64_t stride, int64_t depth,
    typename VectorOf<T>::type (&total)[VECTORS][ROWS]) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k, left += stride, right += stride) {
    Vector columns[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) columns[v] = load_vector<T, T>(right + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) total[v][r] += columns[v] * left[r];
    }
  }
}

// Asks for the ends of some rows of a narrow tile, between which the processor brings the rest, and
// for its mirror image. Always inlined: see SymmetricStore::prefetch.
template <typename T>
KFAC_FAST_TARGET __attribute__((always_inline)) inline void prefetch_tile(const T* target,
                                                                          const T* mirror,
                                                                          int64_t edge, int rows,
                                                                          int columns) {
  for (int r = 0; r < rows; ++r) {
    __builtin_prefetch(target + r * edge, 1);
    __builtin_prefetch(target + r * edge + columns - 1, 1);
  }
  for (int c = 0; c < columns; ++c) __builtin_prefetch(mirror + c * edge, 1);
}

// The products of the strip's columns [begin, end) with a panel of these vectors, stored as they
// leave the registers; see SymmetricStore::multiply. Each tile has half as many rows as a vector
// has lanes, so that transposing the halves of its vectors gives the rows of the mirror image.
template <typename T, int VECTORS>
KFAC_FAST_TARGET void multiply_symmetric(const Panels<T>& strip, int64_t begin, int64_t end,
                                         const T* right, T alpha, T beta, T* target, T* mirror,
                                         int64_t edge) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T), ROWS = LANES / 2;
  constexpr int64_t AHEAD = 2 * ROWS;  // from a product to that whose entries are asked for
  typedef T Half
      __attribute__((vector_size(KFAC_FAST_VECTOR_BYTES / 2), aligned(alignof(T)), may_alias));
  for (int64_t row = begin; row < end; row += ROWS) {
    const int64_t next = row + AHEAD;
    if (next < end) {
      prefetch_tile(target + next * edge, mirror + next, edge, ROWS, VECTORS * LANES);
    } else {  // of the next panel
      const int64_t place = begin + next - end;
      prefetch_tile(target + place * edge + VECTORS * LANES,
                    mirror + place + VECTORS * LANES * edge, edge, ROWS, VECTORS * LANES);
    }
    Vector total[VECTORS][ROWS] = {};
    multiply_in_registers<T>(strip.at(row), right, strip.row_stride, strip.depth, total);
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) {
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        auto& place = *reinterpret_cast<Vector*>(target + (row + r) * edge + v * LANES);
        total[v][r] *= alpha;
        if (beta != 0) total[v][r] += place * beta;
        place = total[v][r];
      }
      transpose_lanes<T>(total[v]);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        T* image = mirror + (v * LANES + i) * edge + row;
        const Half* halves = reinterpret_cast<const Half*>(&total[v][i]);
        *reinterpret_cast<Half*>(image) = halves[0];
        *reinterpret_cast<Half*>(image + ROWS * edge) = halves[1];
      }
    }
  }
}

// The same of some whole vectors past the caches, with nothing to add to, by squares whose rows and
// columns are both whole lines.
template <typename T>
KFAC_FAST_TARGET void multiply_symmetric_past_caches(const Panels<T>& strip, int64_t begin,
                                                     int64_t end, const T* right, int64_t columns,
                                                     T alpha, T* target, T* mirror, int64_t edge) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  for (int64_t row = begin; row < end; row += LANES) {
    for (int64_t c = 0; c < columns; c += LANES) {
      Vector total[1][LANES] = {};
      multiply_in_registers<T>(strip.at(row), right + c, strip.row_stride, strip.depth, total);
#pragma GCC unroll 16
      for (int r = 0; r < LANES; ++r) {
        total[0][r] *= alpha;
        store_past_caches(target + (row + r) * edge + c, total[0][r]);
      }
      transpose_lanes<T>(total[0]);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) store_past_caches(mirror + (c + i) * edge + row, total[0][i]);
    }
  }
}

// target[r][c] <- alpha · Σ_k left[k][r] · right[k][c] for rows x columns, at most these vectors,
// as the products leave the registers. Before `end` the last vector of a row may reach over what is
// stored later.
template <typename T, int ROWS, int VECTORS>
KFAC_FAST_TARGET __attribute__((always_inline)) inline void multiply_and_store(
    const T* left, const T* right, int64_t stride, int64_t depth, int64_t rows, int64_t columns,
    T alpha, T* target, const T* end, int64_t edge, bool past_caches) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  Vector total[VECTORS][ROWS] = {};
  multiply_in_registers<T>(left, right, stride, depth, total);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r, target += edge) {
    if (r == rows) break;
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) {
      T* place = target + v * LANES;
      const Vector value = total[v][r] * alpha;
      if (past_caches) {
        store_past_caches(place, value);
      } else if ((v + 1) * LANES <= columns || end - place >= LANES) {
        *reinterpret_cast<Vector*>(place) = value;
      } else {
        for (int64_t c = v * LANES; c < columns; ++c) target[c] = value[c - v * LANES];
      }
    }
  }
}

// The same of one column, by vectors of its rows.
template <typename T, int ROWS>
KFAC_FAST_TARGET __attribute__((always_inline)) inline void multiply_and_store_column(
    const T* left, const T* right, int64_t stride, int64_t depth, int64_t rows, T alpha, T* target,
    int64_t edge) {
  typedef T Vector __attribute__((vector_size(ROWS * sizeof(T)), aligned(alignof(T)), may_alias));
  Vector total{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k, left += stride, right += stride) {
    total += *reinterpret_cast<const Vector*>(left) * *right;
  }
  total *= alpha;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r, target += edge) {
    if (r == rows) break;
    *target = total[r];
  }
}

// The same of the panels' columns [row, row + rows) with the first `columns` of them; see
// SymmetricStore::multiply_all. It goes along the rows of one tile, for the same columns of many
// rows may share few sets of a cache, and begins at their end, where vectors reach too far.
template <typename T>
KFAC_FAST_TARGET void multiply_rows(const Panels<T>& panels, int64_t row, int64_t rows,
                                    int64_t columns, T alpha, T* target, const T* end, int64_t edge,
                                    bool past_caches) {
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T), WIDE = 3 * LANES;
  constexpr int ROWS = KFAC_FAST_VECTOR_BYTES / 8;  // of full tile products
  constexpr int64_t AHEAD = 4 * WIDE;  // from a product to that whose entries are asked for
  // Few columns after the last whole vector, as of square kernels of odd edges, one by one.
  const int64_t few = columns % LANES <= LANES / 4 ? columns % LANES : 0;
  const int64_t full = columns / WIDE * WIDE, rest = columns - few - full;
  const bool past_rest = past_caches && rest % LANES == 0;
  const T* left = panels.at(row);
  int64_t left_in_panel = panels.width - row % panels.width;
  for (int64_t r = 0; r < rows; r += ROWS, target += ROWS * edge, left += ROWS) {
    if (left_in_panel == 0) {
      left += panels.distance - panels.width;
      left_in_panel = panels.width;
    }
    left_in_panel -= ROWS;
    const auto multiply = [&]<int VECTORS>(const T* right, int64_t first, int64_t width,
                                           bool past) KFAC_FAST_TARGET {
      multiply_and_store<T, ROWS, VECTORS>(left, right, panels.row_stride, panels.depth, rows - r,
                                           width, alpha, target + first, end, edge, past);
    };
    const T* right = panels.data + full / WIDE * panels.distance;
    if (rest > 2 * LANES) {
      multiply.template operator()<3>(right, full, rest, past_rest);
    } else if (rest > LANES) {
      multiply.template operator()<2>(right, full, rest, past_rest);
    } else if (rest > 0) {
      multiply.template operator()<1>(right, full, rest, past_rest);
    }
    for (int64_t c = columns - few; c < columns; ++c) {
      multiply_and_store_column<T, ROWS>(left, right + c - full, panels.row_stride, panels.depth,
                                         rows - r, alpha, target + c, edge);
    }
    right = panels.data;
    for (int64_t first = 0; first < full; first += WIDE, right += panels.distance) {
      if (!past_caches && full > AHEAD) {
        const int64_t next = first + AHEAD;
        const T* place = target + (next < full ? next : next - full + ROWS * edge);
        for (int i = 0; i < ROWS; ++i, place += edge) {
          __builtin_prefetch(place, 1);
          __builtin_prefetch(place + WIDE / 2, 1);
        }
      }
      multiply.template operator()<3>(right, first, WIDE, past_caches);
    }
  }
}

template <typename T>
inline constexpr SymmetricStoreFunctions<T> symmetric_store_functions{
    store_symmetric<T>,
    multiply_rows<T>,
    multiply_symmetric_past_caches<T>,
    {multiply_symmetric<T, 1>, multiply_symmetric<T, 2>, multiply_symmetric<T, 3>}};
