// Sums over normalised entries for one instruction set; see compile_for_instruction_sets.h.

template <typename T, int BYTES = KFAC_FAST_VECTOR_BYTES>
KFAC_FAST_TARGET inline T sum_lanes(const T* lanes) {
  if constexpr (BYTES == sizeof(T)) {
    return *lanes;
  } else {
    typedef T Half __attribute__((vector_size(BYTES / 2), aligned(alignof(T)), may_alias));
    constexpr int LANES = BYTES / 2 / sizeof(T);
    T sums[LANES];
    *reinterpret_cast<Half*>(sums) =
        *reinterpret_cast<const Half*>(lanes) + *reinterpret_cast<const Half*>(lanes + LANES);
    return sum_lanes<T, BYTES / 2>(sums);
  }
}

template <typename T>
KFAC_FAST_TARGET inline T sum_of(typename VectorOf<T>::type vector) {
  return sum_lanes<T>(reinterpret_cast<const T*>(&vector));
}

// Of a vector whose last lanes hold entries that are left over: those, and zeros before them.
template <typename T>
KFAC_FAST_TARGET inline typename VectorOf<T>::type last_lanes(typename VectorOf<T>::type vector,
                                                              int64_t left) {
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Choice = typename VectorOf<Integer>::type;
  constexpr int LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  Choice place;
  for (int i = 0; i < LANES; ++i) place[i] = i;
  return (typename VectorOf<T>::type)((Choice)vector &
                                      (place >= static_cast<Integer>(LANES - left)));
}

// sums[r] = Σ_i (x_r,i - m_r) and, with SQUARES, those of its squares, of ROWS rows.
template <typename In, typename T, int ROWS, bool SQUARES>
KFAC_FAST_TARGET inline void sum_deviations(const In* const* x, int64_t count, const T* m, T* sums,
                                            T* squares) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  constexpr int VECTORS = 4 / ROWS;  // side by side: an addition need not wait for the last one
  Vector totals[2][ROWS] = {}, lost[2][ROWS] = {};
  const int64_t whole = count - count % LANES;
  for (int64_t begin = 0, end; begin < whole; begin = end) {
    end = std::min(whole, begin + vectors_a_chain * LANES);
    Vector chains[2][ROWS][VECTORS] = {};
    const auto add = [&](int64_t i, int r, int v) KFAC_FAST_TARGET {
      const Vector deviation = load_vector<In, T>(x[r] + i) - m[r];
      chains[0][r][v] += deviation;
      if constexpr (SQUARES) chains[1][r][v] += deviation * deviation;
    };
    int64_t i = begin;
    for (; i + VECTORS * LANES <= end; i += VECTORS * LANES) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) add(i + v * LANES, r, v);
      }
    }
    for (; i < end; i += LANES) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) add(i, r, 0);
    }
#pragma GCC unroll 2
    for (int part = 0; part < 1 + SQUARES; ++part) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        Vector chain{};
        for (const Vector& more : chains[part][r]) chain += more;
        if (begin == 0) {
          totals[part][r] = chain;
        } else {
          add_compensated(totals[part][r], lost[part][r], chain);
        }
      }
    }
  }
  const bool over = whole > 0 && whole < count;
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    if (over) {
      const Vector last = load_vector<In, T>(x[r] + count - LANES) - m[r];
      const Vector deviation = last_lanes<T>(last, count - whole);
      totals[0][r] += deviation;
      if constexpr (SQUARES) totals[1][r] += deviation * deviation;
    }
    sums[r] = sum_of<T>(totals[0][r]);
    if constexpr (SQUARES) squares[r] = sum_of<T>(totals[1][r]);
    for (int64_t i = over ? count : whole; i < count; ++i) {
      const T deviation = static_cast<T>(x[r][i]) - m[r];
      sums[r] += deviation;
      if constexpr (SQUARES) squares[r] += deviation * deviation;
    }
  }
}

// How the entries of rows are normalised: (x_i - shift) scale - offset.
template <typename T>
struct Normalizations {
  T shift[most_rows_at_once] = {}, scale[most_rows_at_once], offset[most_rows_at_once];
};

// From row `first` on.
template <typename In, typename T, int ROWS, bool CENTER>
KFAC_FAST_TARGET inline void find_normalizations(const In* const* x, int64_t count, T eps,
                                                 int64_t first, Normalizations<T>& of) {
  const T entries = static_cast<T>(count);
  T* shift = of.shift + first;
  if constexpr (CENTER) {
    T sums[ROWS];
    sum_deviations<In, T, ROWS, false>(x, count, shift, sums, nullptr);
    for (int r = 0; r < ROWS; ++r) shift[r] = sums[r] / entries;
  }
  T rest[ROWS], squares[ROWS];
  sum_deviations<In, T, ROWS, true>(x, count, shift, rest, squares);
  for (int r = 0; r < ROWS; ++r) {
    const T mean = CENTER ? rest[r] / entries : 0;  // what rounding has left of it
    const T scale = inverse_deviation(squares[r] / entries - mean * mean, eps);
    of.scale[first + r] = scale;
    of.offset[first + r] = mean == 0 ? 0 : mean * scale;  // the scale may be infinite
  }
}

// products += Σ_r g_r z_r and sums += Σ_r g_r of VECTORS vectors of columns, from the first on,
// with the normalised entries z_r of the rows; of the last `left` of them, if they are not all.
template <typename In, typename T, int VECTORS>
KFAC_FAST_TARGET inline void add_columns(const In* const* x, const In* const* g, int64_t rows,
                                         const Normalizations<T>& of, int64_t first, T* products,
                                         T* sums, int64_t left = 0) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  Vector product[VECTORS] = {}, sum[VECTORS] = {};
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const Vector gradient = load_vector<In, T>(g[r] + first + v * LANES);
      const Vector centred = load_vector<In, T>(x[r] + first + v * LANES) - of.shift[r];
      product[v] += gradient * (centred * of.scale[r] - of.offset[r]);
      sum[v] += gradient;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    if (left > 0) {
      product[v] = last_lanes<T>(product[v], left);
      sum[v] = last_lanes<T>(sum[v], left);
    }
    *reinterpret_cast<Vector*>(products + first + v * LANES) += product[v];
    *reinterpret_cast<Vector*>(sums + first + v * LANES) += sum[v];
  }
}

// products += Σ_r g_r (x_r - mean) / √(variance + eps) and sums += Σ_r g_r, with the mean and
// variance of each row x_r itself; without CENTER the mean is left out of both. Of four rows at a
// time first the means, then the variances: a row's own one after the other would keep the
// processor waiting.
template <typename In, typename T, bool CENTER>
KFAC_FAST_TARGET void add_normalized(const In* const* x, const In* const* g, int64_t rows,
                                     int64_t count, T eps, T* products, T* sums) {
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  int64_t r = 0;
  Normalizations<T> of;
  for (; r + 4 <= rows; r += 4) find_normalizations<In, T, 4, CENTER>(x + r, count, eps, r, of);
  for (; r < rows; ++r) find_normalizations<In, T, 1, CENTER>(x + r, count, eps, r, of);
  int64_t i = 0;
  for (; i + 4 * LANES <= count; i += 4 * LANES) {
    add_columns<In, T, 4>(x, g, rows, of, i, products, sums);
  }
  for (; i + LANES <= count; i += LANES) add_columns<In, T, 1>(x, g, rows, of, i, products, sums);
  if (i < count && count >= LANES) {
    add_columns<In, T, 1>(x, g, rows, of, count - LANES, products, sums, count - i);
    i = count;
  }
  for (; i < count; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      const T gradient = g[r][i];
      const T centred = static_cast<T>(x[r][i]) - of.shift[r];
      products[i] += gradient * (centred * of.scale[r] - of.offset[r]);
      sums[i] += gradient;
    }
  }
}

// total += the products of an example's gradients of every unit: weight with weight, and if there
// are biases, weight with bias and bias with bias.
template <typename T, bool BIAS>
KFAC_FAST_TARGET void add_outer_products(const T* weight, const T* bias, int64_t units, T* total,
                                         T* lost) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  constexpr int PARTS = BIAS ? 3 : 1;
  int64_t i = 0;
  for (; i + LANES <= units; i += LANES) {
    const Vector w = load_vector<T, T>(weight + i), b = load_vector<T, T>(bias + i);
    const Vector products[3] = {w * w, w * b, b * b};
    for (int part = 0; part < PARTS; ++part) {
      add_compensated(*reinterpret_cast<Vector*>(total + part * units + i),
                      *reinterpret_cast<Vector*>(lost + part * units + i), products[part]);
    }
  }
  for (; i < units; ++i) {
    const T w = weight[i], b = bias[i];
    const T products[3] = {w * w, w * b, b * b};
    for (int part = 0; part < PARTS; ++part) {
      add_compensated(total[part * units + i], lost[part * units + i], products[part]);
    }
  }
}

// The moments of a row x and of its gradients g.
template <typename In, typename T>
KFAC_FAST_TARGET RowMoments<T> row_moments(const In* x, const In* g, int64_t count) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  if (count == 1) return {static_cast<T>(x[0]), 0, 0, 0, static_cast<T>(g[0])};
  const auto entries = static_cast<T>(std::max<int64_t>(count, 1));
  T sum, zero = 0;
  sum_deviations<In, T, 1, false>(&x, count, &zero, &sum, nullptr);
  const T mean = sum / entries;
  Vector totals[4] = {}, lost[4] = {};
  int64_t i = 0;
  while (i + LANES <= count) {
    const int64_t end = std::min(count, i + vectors_a_chain * LANES);
    Vector rest{}, squares{}, products{}, gradients{};
    for (; i + LANES <= end; i += LANES) {
      const Vector centred = load_vector<In, T>(x + i) - mean;
      const Vector gradient = load_vector<In, T>(g + i);
      rest += centred;
      squares += centred * centred;
      products += centred * gradient;
      gradients += gradient;
    }
    add_compensated(totals[0], lost[0], rest);
    add_compensated(totals[1], lost[1], squares);
    add_compensated(totals[2], lost[2], products);
    add_compensated(totals[3], lost[3], gradients);
  }
  RowMoments<T> sums{mean, sum_of<T>(totals[0]), sum_of<T>(totals[1]), sum_of<T>(totals[2]),
                     sum_of<T>(totals[3])};
  for (; i < count; ++i) {
    const T centred = static_cast<T>(x[i]) - mean, gradient = g[i];
    sums.rest += centred;
    sums.squares += centred * centred;
    sums.products += centred * gradient;
    sums.gradients += gradient;
  }
  return sums;
}

// total += x - mean and its squares, each of `count` columns.
template <typename In, typename T>
KFAC_FAST_TARGET void add_deviations(const In* x, const T* mean, int64_t count, T* total, T* lost) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Vector centred = load_vector<In, T>(x + i) - load_vector<T, T>(mean + i);
    add_compensated(*reinterpret_cast<Vector*>(total + i), *reinterpret_cast<Vector*>(lost + i),
                    centred);
    add_compensated(*reinterpret_cast<Vector*>(total + count + i),
                    *reinterpret_cast<Vector*>(lost + count + i), centred * centred);
  }
  for (; i < count; ++i) {
    const T centred = static_cast<T>(x[i]) - mean[i];
    add_compensated(total[i], lost[i], centred);
    add_compensated(total[count + i], lost[count + i], centred * centred);
  }
}

// weight = g (x - mean - rest) scale and bias = g, column by column.
template <typename In, typename T>
KFAC_FAST_TARGET void weigh(const In* x, const In* g, const T* mean, const T* rest, const T* scale,
                            int64_t count, T* weight, T* bias) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Vector centred = load_vector<In, T>(x + i) - load_vector<T, T>(mean + i);
    const Vector gradient = load_vector<In, T>(g + i);
    *reinterpret_cast<Vector*>(weight + i) =
        gradient * ((centred - load_vector<T, T>(rest + i)) * load_vector<T, T>(scale + i));
    *reinterpret_cast<Vector*>(bias + i) = gradient;
  }
  for (; i < count; ++i) {
    bias[i] = g[i];
    weight[i] = bias[i] * ((static_cast<T>(x[i]) - mean[i] - rest[i]) * scale[i]);
  }
}

template <typename In, typename T>
inline constexpr NormSums<In, T> norm_sums{
    row_moments<In, T>,    {add_normalized<In, T, false>, add_normalized<In, T, true>},
    end_chain<T>,          {add_outer_products<T, false>, add_outer_products<T, true>},
    add_deviations<In, T>, weigh<In, T>};
