// The tile product and the packing of its operands for one instruction set. tile_product.h includes
// this file once per set, inside a namespace of that name, after defining
//   KFAC_FAST_TARGET        the attribute that allows the set's instructions in one function
//   KFAC_FAST_VECTOR_BYTES  the size of its vector registers
//
// The attribute must sit on the very function that does the vector arithmetic: the compiler breaks
// wide vectors into narrow ones when it compiles a function without it, and inlining that function
// into one that has the attribute afterwards does not put them together again. Lambdas do not
// inherit it either.

// A vector that may lie anywhere: packed panels are aligned, rows read in place are not.
template <typename T>
struct VectorOf {
  typedef T type
      __attribute__((vector_size(KFAC_FAST_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};

// sum[r][c] (+)= Σ_k left[k][r] · right[k][c]. The sums stay in registers for the whole depth; a
// step k loads VECTORS vectors and ROWS scalars and multiplies all pairs. A multiply-add takes four
// cycles and two start in each, so narrow tiles keep SPLIT sets of sums to have eight under way.
template <typename T, int ROWS, int VECTORS, int SPLIT = std::max(1, 8 / (ROWS * VECTORS))>
KFAC_FAST_TARGET void tile_product(const T* left, int64_t left_stride, const T* right,
                                   int64_t right_stride, int64_t depth, T* sum, int64_t sum_stride,
                                   bool accumulate) {
  using Vector = typename VectorOf<T>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  Vector total[SPLIT][ROWS][VECTORS] = {};
  if (accumulate) {  // the old sums come from far caches: ask for them before the long loop
    for (int r = 0; r < ROWS; ++r) {
      for (int v = 0; v < VECTORS; ++v) __builtin_prefetch(sum + r * sum_stride + v * LANES);
    }
  }
  for (int64_t step = depth / SPLIT; step > 0; --step) {
#pragma GCC unroll 8
    for (int s = 0; s < SPLIT; ++s, left += left_stride, right += right_stride) {
      Vector columns[VECTORS];
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) {
        columns[v] = *reinterpret_cast<const Vector*>(right + v * LANES);
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; ++v) total[s][r][v] += columns[v] * left[r];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) {
#pragma GCC unroll 8
      for (int s = 1; s < SPLIT; ++s) total[0][r][v] += total[s][r][v];
      Vector* target = reinterpret_cast<Vector*>(sum + r * sum_stride + v * LANES);
      *target = accumulate ? *target + total[0][r][v] : total[0][r][v];
    }
  }
  if constexpr (SPLIT > 1) {
    if (depth % SPLIT != 0) {
      tile_product<T, ROWS, VECTORS, 1>(left, left_stride, right, right_stride, depth % SPLIT, sum,
                                        sum_stride, true);
    }
  }
}

// Packs rows whose columns are adjacent in memory. Vectors are copied one by one: the compiler
// would turn a loop over the width into a call of memcpy, slow for so few bytes.
template <typename In, typename T>
KFAC_FAST_TARGET void pack_adjacent(const In* source, int64_t row_stride, int64_t rows,
                                    int64_t columns, int64_t columns_a_panel, T* panel,
                                    int64_t panel_width, int64_t panel_distance) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  for (int64_t r = 0; r < rows; ++r, source += row_stride, panel += panel_width) {
    const In* __restrict from = source;
    T* __restrict to = panel;
    for (int64_t left = columns; left > 0; left -= columns_a_panel) {
      const int64_t width = std::min(columns_a_panel, left);
      int64_t c = 0;
      for (; c + LANES <= width; c += LANES) {
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

// Packs rows of any strides, best where neighbouring rows are adjacent (a channels-first tensor
// seen channels-last): reads 16 rows of 4 columns, whole cache lines, and transposes them in cache.
template <typename In, typename T>
KFAC_FAST_TARGET void pack_strided(const In* source, int64_t row_stride, int64_t column_stride,
                                   int64_t rows, int64_t columns, int64_t columns_a_panel, T* panel,
                                   int64_t panel_width, int64_t panel_distance) {
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  constexpr int64_t LINES = 4, LINE = 16;
  T block[LINES][LINE];
  for (int64_t left = columns; left > 0; left -= columns_a_panel, panel += panel_distance) {
    const int64_t width = std::min(columns_a_panel, left);
    for (int64_t r = 0; r < rows; r += LINE) {
      const int64_t height = std::min(LINE, rows - r);
      for (int64_t c = 0; c < width; c += LINES) {
        const int64_t lines = std::min(LINES, width - c);
        for (int64_t line = 0; line < lines; ++line) {
          const In* from = source + r * row_stride + (c + line) * column_stride;
          if (row_stride == 1 && height == LINE) {
            for (int64_t i = 0; i < LINE; ++i) block[line][i] = static_cast<T>(from[i]);
          } else {
            for (int64_t i = 0; i < height; ++i) {
              block[line][i] = static_cast<T>(from[i * row_stride]);
            }
          }
        }
        transpose(block[0], LINE, lines, height, panel + r * panel_width + c, panel_width);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = width; c % LANES != 0; ++c) panel[r * panel_width + c] = 0;
    }
    source += columns_a_panel * column_stride;
  }
}
