// The tile product and the packing of its operands for one instruction set; see
// compile_for_instruction_sets.h.

// A vector that may lie anywhere: packed panels are aligned, rows read in place are not.
template <typename T>
struct VectorOf {
  typedef T type
      __attribute__((vector_size(KFAC_FAST_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};

// The narrow floats whose bits are the lanes, as in narrow_float.h.
template <typename In, typename Vector, typename Lanes>
KFAC_FAST_TARGET inline Vector widened(Lanes bits) {
  if constexpr (std::is_same_v<In, BFloat16>) {
    return (Vector)(bits << 16);
  } else {
    const Lanes magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
    const Lanes infinite = (magnitude >= 0x7c00) & 0x7f800000;
    const Lanes normal = (magnitude << 13) + (112 << 23);
    const Lanes subnormal = (Lanes)(__builtin_convertvector(magnitude, Vector) * 0x1p-24f);
    return (Vector)((magnitude < 0x0400 ? subnormal : normal) | infinite | sign);
  }
}

// A vector of any size of T. The loop over narrow floats only moves their bits, which the compiler
// makes one instruction of; one over whole conversions takes long to compile, and may stay scalar.
template <typename Vector, typename T, typename In>
KFAC_FAST_TARGET inline Vector load_as(const In* from) {
  if constexpr (std::is_same_v<In, T>) {
    return *reinterpret_cast<const Vector*>(from);
  } else {
    decltype(Vector{} < Vector{}) lanes;
#pragma GCC unroll 16
    for (size_t i = 0; i < sizeof(Vector) / sizeof(T); ++i) lanes[i] = from[i].bits;
    return widened<In, Vector>(lanes);
  }
}

template <typename In, typename T>
KFAC_FAST_TARGET inline typename VectorOf<T>::type load_vector(const In* from) {
  return load_as<typename VectorOf<T>::type, T>(from);
}

// Adds to a sum what the last addition to it rounded off (Kahan), too.
template <typename Value>
KFAC_FAST_TARGET inline void add_compensated(Value& sum, Value& lost, Value more) {
  more -= lost;
  const Value total = sum + more;
  lost = (total - sum) - more;
  sum = total;
}

// total[r][v] += left[r] · the v-th vector of right
template <typename T, int ROWS, int VECTORS>
KFAC_FAST_TARGET inline void multiply_step(const T* left, const T* right, int64_t vector_stride,
                                           typename VectorOf<T>::type (&total)[ROWS][VECTORS]) {
  typename VectorOf<T>::type columns[VECTORS];
#pragma GCC unroll 3
  for (int v = 0; v < VECTORS; ++v) columns[v] = load_vector<T, T>(right + v * vector_stride);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) total[r][v] += columns[v] * left[r];
  }
}

// A multiply-add takes four cycles and two start in each, so narrow tiles keep that many sets of
// sums to have eight under way.
constexpr int sets_of_sums(int rows, int vectors) { return std::max(1, 8 / (rows * vectors)); }

// total[r][v] += Σ_k left[k][r] · the v-th vector of right[k], in registers for the whole depth, in
// SPLIT sets of sums, of which all but the first start from zero.
template <typename T, int SPLIT, int ROWS, int VECTORS>
KFAC_FAST_TARGET inline void multiply_steps(const T* left, int64_t left_stride, const T* right,
                                            int64_t right_stride, int64_t vector_stride,
                                            int64_t depth,
                                            typename VectorOf<T>::type (&total)[ROWS][VECTORS]) {
  typename VectorOf<T>::type sums[SPLIT][ROWS][VECTORS] = {};
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) sums[0][r][v] = total[r][v];
  }
#pragma GCC unroll 4
  for (int64_t step = depth / SPLIT; step > 0; --step) {
#pragma GCC unroll 8
    for (int s = 0; s < SPLIT; ++s, left += left_stride, right += right_stride) {
      // A step of a wide panel on the left is on a line of its own: asked for before it is needed.
      if constexpr (SPLIT == 1) __builtin_prefetch(left + 32 * left_stride);
      multiply_step<T>(left, right, vector_stride, sums[s]);
    }
  }
  for (int rest = 0; rest < depth % SPLIT; ++rest, left += left_stride, right += right_stride) {
    multiply_step<T>(left, right, vector_stride, sums[0]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) {
      total[r][v] = sums[0][r][v];
#pragma GCC unroll 8
      for (int s = 1; s < SPLIT; ++s) total[r][v] += sums[s][r][v];
    }
  }
}

// sum[r][c] (+)= Σ_k left[k][r] · right[k][c]. CONTINUED sums that accumulate start from the old
// ones, to which every product is added in turn.
template <typename T, bool CONTINUED, int ROWS, int VECTORS>
KFAC_FAST_TARGET void tile_product(const T* left, int64_t left_stride, const T* right,
                                   int64_t right_stride, int64_t depth, T* sum, int64_t sum_stride,
                                   bool accumulate) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  Vector total[ROWS][VECTORS] = {};
  if constexpr (CONTINUED) {
    if (accumulate) {
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) {
          total[r][v] = load_vector<T, T>(sum + r * sum_stride + v * LANES);
        }
      }
    }
  } else if (accumulate) {  // the old sums come from far caches: asked for before the long loop
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < VECTORS; ++v) __builtin_prefetch(sum + r * sum_stride + v * LANES);
    }
  }
  constexpr int SETS = CONTINUED ? 1 : sets_of_sums(ROWS, VECTORS);
  multiply_steps<T, SETS>(left, left_stride, right, right_stride, LANES, depth, total);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) {
      Vector* target = reinterpret_cast<Vector*>(sum + r * sum_stride + v * LANES);
      *target = accumulate && !CONTINUED ? *target + total[r][v] : total[r][v];
    }
  }
}

// sums[v][r][c] += Σ_k left[k][r] · right[k][v · vector_stride + c], a vector of columns c
template <typename T, int ROWS, int VECTORS>
KFAC_FAST_TARGET void spread_product(const T* left, int64_t left_stride, const T* right,
                                     int64_t right_stride, int64_t vector_stride, int64_t depth,
                                     T* const* sums, int64_t sum_stride) {
  using Vector = typename VectorOf<T>::type;
  for (int v = 0; v < VECTORS; ++v) {
    for (int r = 0; r < ROWS; ++r) __builtin_prefetch(sums[v] + r * sum_stride);
  }
  Vector total[ROWS][VECTORS] = {};
  multiply_steps<T, sets_of_sums(ROWS, VECTORS)>(left, left_stride, right, right_stride,
                                                 vector_stride, depth, total);
#pragma GCC unroll 3
  for (int v = 0; v < VECTORS; ++v) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      *reinterpret_cast<Vector*>(sums[v] + r * sum_stride) += total[r][v];
    }
  }
}

// sums[v][c] += Σ_k left[k][c] · right[k][v · vector_stride + c], a vector of columns c: the
// diagonals of spread products.
template <typename T, int VECTORS>
KFAC_FAST_TARGET void lanewise_product(const T* left, int64_t left_stride, const T* right,
                                       int64_t right_stride, int64_t vector_stride, int64_t depth,
                                       T* const* sums) {
  using Vector = typename VectorOf<T>::type;
  constexpr int SPLIT = sets_of_sums(1, VECTORS);
  Vector total[SPLIT][VECTORS] = {};
  const auto step = [&](int64_t k, Vector(&own)[VECTORS]) KFAC_FAST_TARGET {
    const Vector lanes = load_vector<T, T>(left + k * left_stride);
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) {
      own[v] += lanes * load_vector<T, T>(right + k * right_stride + v * vector_stride);
    }
  };
  int64_t k = 0;
  for (; k + SPLIT <= depth; k += SPLIT) {
#pragma GCC unroll 8
    for (int s = 0; s < SPLIT; ++s) step(k + s, total[s]);
  }
  for (; k < depth; ++k) step(k, total[0]);
#pragma GCC unroll 3
  for (int v = 0; v < VECTORS; ++v) {
#pragma GCC unroll 8
    for (int s = 1; s < SPLIT; ++s) total[0][v] += total[s][v];
    *reinterpret_cast<Vector*>(sums[v]) += total[0][v];
  }
}

// Packs rows whose columns are adjacent in memory. Vectors are copied one by one: the compiler
// would turn a loop over the width into a call of memcpy, slow for so few bytes.
template <typename In, typename T>
KFAC_FAST_TARGET void pack_adjacent(const In* source, int64_t row_stride, int64_t rows,
                                    int64_t columns, int64_t columns_a_panel, T* panel,
                                    int64_t panel_stride, int64_t panel_distance) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  for (int64_t r = 0; r < rows; ++r, source += row_stride, panel += panel_stride) {
    const In* __restrict from = source;
    T* __restrict to = panel;
    for (int64_t left = columns; left > 0; left -= columns_a_panel) {
      const int64_t width = std::min(columns_a_panel, left);
      int64_t c = 0;
      for (; c + LANES <= width; c += LANES) {
        __builtin_prefetch(from + 8 * row_stride + c);
        if constexpr (std::is_same_v<In, T>) {
          *reinterpret_cast<Vector*>(to + c) = *reinterpret_cast<const Vector*>(from + c);
        } else {
          for (int64_t i = 0; i < LANES; ++i) to[c + i] = static_cast<T>(from[c + i]);
        }
      }
      for (; c < width || c % LANES != 0; ++c) to[c] = c < width ? static_cast<T>(from[c]) : T{0};
      from += columns_a_panel;
      to += panel_distance;
    }
  }
}

// Exchanges, between rows that lie D apart, the entries off the diagonal of D x D blocks.
template <typename T, int D, int... I>
KFAC_FAST_TARGET inline void exchange(typename VectorOf<T>::type& upper,
                                      typename VectorOf<T>::type& lower,
                                      std::integer_sequence<int, I...>) {
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  constexpr int LANES = sizeof...(I);
  using Choice = typename VectorOf<Index>::type;
  const Choice left = {((I & D) ? LANES + I - D : I)...};
  const Choice right = {((I & D) ? LANES + I : I + D)...};
  const auto first = __builtin_shuffle(upper, lower, left);
  lower = __builtin_shuffle(upper, lower, right);
  upper = first;
}

// Transposes ROWS vectors: each stretch of ROWS lanes for itself, if there are fewer rows than
// lanes.
template <typename T, int ROWS, int D = 1>
KFAC_FAST_TARGET inline void transpose_lanes(typename VectorOf<T>::type (&rows)[ROWS]) {
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  if constexpr (D < ROWS) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      if (!(i & D)) {
        exchange<T, D>(rows[i], rows[i + D], std::make_integer_sequence<int, LANES>{});
      }
    }
    transpose_lanes<T, ROWS, 2 * D>(rows);
  }
}

// Writes the first `count` columns of a square, a vector wide, as rows.
template <typename T>
KFAC_FAST_TARGET inline void store_transposed(const T* square, int64_t square_stride, int64_t count,
                                              T* target, int64_t target_stride) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  Vector rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    rows[i] = *reinterpret_cast<const Vector*>(square + i * square_stride);
  }
  transpose_lanes<T>(rows);
  if (count == LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      *reinterpret_cast<Vector*>(target + i * target_stride) = rows[i];
    }
  } else {
    for (int i = 0; i < count; ++i) {
      *reinterpret_cast<Vector*>(target + i * target_stride) = rows[i];
    }
  }
}

// Packs rows of any strides, best where neighbouring rows are adjacent (a channels-first tensor
// seen channels-last): reads squares of a vector of rows by as many columns and transposes them.
template <typename In, typename T>
KFAC_FAST_TARGET void pack_strided(const In* source, int64_t row_stride, int64_t column_stride,
                                   int64_t rows, int64_t columns, int64_t columns_a_panel, T* panel,
                                   int64_t panel_stride, int64_t panel_distance) {
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  T square[LANES][LANES];
  for (int64_t left = columns; left > 0; left -= columns_a_panel, panel += panel_distance) {
    const int64_t width = std::min(columns_a_panel, left);
    for (int64_t r = 0; r < rows; r += LANES) {
      const int64_t height = std::min(LANES, rows - r);
      for (int64_t c = 0; c < width; c += LANES) {
        const In* from = source + r * row_stride + c * column_stride;
        for (int64_t line = 0; line < LANES; ++line, from += column_stride) {
          if (c + line >= width) {
            for (int64_t i = 0; i < LANES; ++i) square[line][i] = 0;
          } else if (row_stride == 1 && height == LANES) {
            for (int64_t i = 0; i < LANES; ++i) square[line][i] = static_cast<T>(from[i]);
          } else {
            for (int64_t i = 0; i < height; ++i) {
              square[line][i] = static_cast<T>(from[i * row_stride]);
            }
          }
        }
        store_transposed(square[0], LANES, height, panel + r * panel_stride + c, panel_stride);
      }
    }
    source += columns_a_panel * column_stride;
  }
}

// Writes a panel's first `columns` columns to the rows of a matrix and returns Σ panel · other over
// them, summed in double but for stretches of a few rows.
template <typename T>
KFAC_FAST_TARGET double store_and_multiply(const T* panel, const T* other, int64_t panel_stride,
                                           int64_t rows, int64_t columns, T* target,
                                           int64_t target_stride) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  constexpr int64_t STRETCH = 8;
  double lanes[LANES] = {}, rest = 0;
  for (int64_t first = 0; first < rows; first += STRETCH) {
    Vector sum = {};
    for (int64_t r = first; r < std::min(first + STRETCH, rows); ++r) {
      int64_t c = 0;
      for (; c + LANES <= columns; c += LANES) {
        const Vector value = *reinterpret_cast<const Vector*>(panel + c);
        *reinterpret_cast<Vector*>(target + c) = value;
        sum += value * *reinterpret_cast<const Vector*>(other + c);
      }
      for (; c < columns; ++c) {
        target[c] = panel[c];
        rest += static_cast<double>(panel[c]) * static_cast<double>(other[c]);
      }
      panel += panel_stride;
      other += panel_stride;
      target += target_stride;
    }
    for (int64_t i = 0; i < LANES; ++i) lanes[i] += static_cast<double>(sum[i]);
  }
  for (const double lane : lanes) rest += lane;
  return rest;
}
