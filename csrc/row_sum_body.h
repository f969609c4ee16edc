// Sums of rows for one instruction set; see compile_for_instruction_sets.h.

template <bool SQUARED, typename Value>
KFAC_FAST_TARGET inline Value term(Value value) {
  if constexpr (SQUARED) return value * value;
  return value;
}

// The sum of four rows at a vector of columns, `distance` apart.
template <typename In, typename T, bool SQUARED>
KFAC_FAST_TARGET inline auto sum_of_four(const In* row, int64_t distance) {
  return (term<SQUARED>(load_vector<In, T>(row)) +
          term<SQUARED>(load_vector<In, T>(row + distance))) +
         (term<SQUARED>(load_vector<In, T>(row + 2 * distance)) +
          term<SQUARED>(load_vector<In, T>(row + 3 * distance)));
}

// total[c] += row[c], or as well those of three rows more, `distance` apart.
template <typename In, typename T, bool SQUARED, bool FOUR>
KFAC_FAST_TARGET inline void add_row(const In* row, int64_t distance, int64_t columns, T* total) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  int64_t c = 0;
  for (; c + LANES <= columns; c += LANES) {
    auto& sum = *reinterpret_cast<Vector*>(total + c);
    if constexpr (FOUR) {
      sum += sum_of_four<In, T, SQUARED>(row + c, distance);
    } else {
      sum += term<SQUARED>(load_vector<In, T>(row + c));
    }
  }
  for (; c < columns; ++c) {  // in the same order
    T sum = term<SQUARED>(static_cast<T>(row[c]));
    if constexpr (FOUR) {
      sum += term<SQUARED>(static_cast<T>(row[distance + c]));
      sum += term<SQUARED>(static_cast<T>(row[2 * distance + c])) +
             term<SQUARED>(static_cast<T>(row[3 * distance + c]));
    }
    total[c] += sum;
  }
}

// What add_rows computes of VECTORS vectors of columns, whose totals stay in registers.
template <typename In, typename T, bool SQUARED, int VECTORS>
KFAC_FAST_TARGET inline void add_block(const In* rows, int64_t row_stride, int64_t count,
                                       T* total) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  Vector sums[VECTORS];
  for (int v = 0; v < VECTORS; ++v) sums[v] = load_vector<T, T>(total + v * LANES);
  const int64_t quarter = count / 4, distance = quarter * row_stride;
  for (int64_t r = 0; r < quarter; ++r, rows += row_stride) {
    for (int v = 0; v < VECTORS; ++v) {
      sums[v] += sum_of_four<In, T, SQUARED>(rows + v * LANES, distance);
    }
  }
  rows += 3 * distance;
  for (int64_t r = 4 * quarter; r < count; ++r, rows += row_stride) {
    for (int v = 0; v < VECTORS; ++v) {
      sums[v] += term<SQUARED>(load_vector<In, T>(rows + v * LANES));
    }
  }
  for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<Vector*>(total + v * LANES) = sums[v];
}

// total[c] += Σ_r rows[r][c], or the squares, columns side by side. Four rows at a time share the
// loads and stores of the totals; they are a quarter of all rows apart, so that memory is read in
// four long streams: four rows side by side were slower than one. Totals of narrow rows are loaded
// and stored once.
template <typename In, typename T, bool SQUARED>
KFAC_FAST_TARGET void add_rows(const In* rows, int64_t row_stride, int64_t count, int64_t columns,
                               T* total) {
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  const int64_t vectors = columns / LANES;
  if (vectors == 1) add_block<In, T, SQUARED, 1>(rows, row_stride, count, total);
  if (vectors == 2) add_block<In, T, SQUARED, 2>(rows, row_stride, count, total);
  if (vectors == 3) add_block<In, T, SQUARED, 3>(rows, row_stride, count, total);
  if (vectors == 4) add_block<In, T, SQUARED, 4>(rows, row_stride, count, total);
  if (vectors <= 4) {
    const int64_t done = vectors * LANES;
    if (done == columns) return;
    rows += done, total += done, columns -= done;
  }
  const int64_t quarter = count / 4;
  for (int64_t r = 0; r < quarter; ++r, rows += row_stride) {
    add_row<In, T, SQUARED, true>(rows, quarter * row_stride, columns, total);
  }
  rows += 3 * quarter * row_stride;
  for (int64_t r = 4 * quarter; r < count; ++r, rows += row_stride) {
    add_row<In, T, SQUARED, false>(rows, 0, columns, total);
  }
}

// The same, columns apart: best where the rows are side by side. Those that are not are added one
// by one, in parts: a chain of so many would round too much.
template <typename In, typename T, bool SQUARED>
KFAC_FAST_TARGET void add_columns(const In* rows, int64_t row_stride, int64_t column_stride,
                                  int64_t count, int64_t columns, T* total) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t ROWS_A_PART = 32;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  for (int64_t c = 0; c < columns; ++c) {
    const In* column = rows + c * column_stride;
    int64_t r = 0;
    T sum = 0;
    if (row_stride == 1 && count >= LANES) {
      Vector lanes[4] = {};
      for (; r + 4 * LANES <= count; r += 4 * LANES) {
        for (int v = 0; v < 4; ++v) {
          lanes[v] += term<SQUARED>(load_vector<In, T>(column + r + v * LANES));
        }
      }
      for (; r + LANES <= count; r += LANES) {
        lanes[0] += term<SQUARED>(load_vector<In, T>(column + r));
      }
      const Vector all = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
      for (int64_t i = 0; i < LANES; ++i) sum += all[i];
    }
    while (r < count) {
      T part = 0;
      for (const int64_t end = std::min(r + ROWS_A_PART, count); r < end; ++r) {
        part += term<SQUARED>(static_cast<T>(column[r * row_stride]));
      }
      sum += part;
    }
    total[c] += sum;
  }
}

// total += chain, chain <- 0.
template <typename T>
KFAC_FAST_TARGET void end_chain(T* chain, int64_t columns, T* total, T* lost) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  int64_t c = 0;
  for (; c + LANES <= columns; c += LANES) {
    auto& more = *reinterpret_cast<Vector*>(chain + c);
    add_compensated(*reinterpret_cast<Vector*>(total + c), *reinterpret_cast<Vector*>(lost + c),
                    more);
    more = Vector{};
  }
  for (; c < columns; ++c) {
    add_compensated(total[c], lost[c], chain[c]);
    chain[c] = 0;
  }
}

template <typename In, typename T, bool SQUARED>
inline constexpr RowSumFunctions<In, T> row_sum_functions{
    add_rows<In, T, SQUARED>, add_columns<In, T, SQUARED>, end_chain<T>};
