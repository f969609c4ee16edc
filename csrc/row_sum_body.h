// Sums of rows for one instruction set; see compile_for_instruction_sets.h.

template <bool SQUARED, typename Value>
KFAC_FAST_TARGET inline Value term(Value value) {
  if constexpr (SQUARED) return value * value;
  return value;
}

// total[c] += Σ_r rows[r][c], or the squares, columns side by side: one row after the other, from
// end to end, which was faster than four rows at a time.
template <typename In, typename T, bool SQUARED>
KFAC_FAST_TARGET void add_rows(const In* rows, int64_t row_stride, int64_t count, int64_t columns,
                               T* total) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  for (; count > 0; --count, rows += row_stride) {
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) {
      *reinterpret_cast<Vector*>(total + c) += term<SQUARED>(load_vector<In, T>(rows + c));
    }
    for (; c < columns; ++c) total[c] += term<SQUARED>(static_cast<T>(rows[c]));
  }
}

// The same, columns apart: best where the rows are side by side.
template <typename In, typename T, bool SQUARED>
KFAC_FAST_TARGET void add_columns(const In* rows, int64_t row_stride, int64_t column_stride,
                                  int64_t count, int64_t columns, T* total) {
  using Vector = typename VectorOf<T>::type;
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
    for (; r < count; ++r) sum += term<SQUARED>(static_cast<T>(column[r * row_stride]));
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
