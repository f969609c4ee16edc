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

// Σ_i x_i.
template <typename In, typename T>
KFAC_FAST_TARGET T sum_entries(const In* x, int64_t count) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  Vector total{}, lost{};
  int64_t i = 0;
  while (i + LANES <= count) {
    const int64_t end = std::min(count, i + vectors_a_chain * LANES);
    Vector sums[2] = {};
    for (; i + 2 * LANES <= end; i += 2 * LANES) {
      sums[0] += load_vector<In, T>(x + i);
      sums[1] += load_vector<In, T>(x + i + LANES);
    }
    for (; i + LANES <= end; i += LANES) sums[0] += load_vector<In, T>(x + i);
    add_compensated(total, lost, sums[0] + sums[1]);
  }
  T sum = sum_of<T>(total);
  for (; i < count; ++i) sum += static_cast<T>(x[i]);
  return sum;
}

// The sums of x_i - m, `rest`, and of its squares.
template <typename In, typename T>
KFAC_FAST_TARGET void sum_deviations(const In* x, int64_t count, T m, T& rest, T& squares) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  Vector totals[2] = {}, lost[2] = {};
  int64_t i = 0;
  while (i + LANES <= count) {
    const int64_t end = std::min(count, i + vectors_a_chain * LANES);
    Vector sum{}, square{};
    for (; i + LANES <= end; i += LANES) {
      const Vector centred = load_vector<In, T>(x + i) - m;
      sum += centred;
      square += centred * centred;
    }
    add_compensated(totals[0], lost[0], sum);
    add_compensated(totals[1], lost[1], square);
  }
  rest = sum_of<T>(totals[0]);
  squares = sum_of<T>(totals[1]);
  for (; i < count; ++i) {
    const T centred = static_cast<T>(x[i]) - m;
    rest += centred;
    squares += centred * centred;
  }
}

// products += Σ_r g_r (x_r - mean) / √(variance + eps) and sums += Σ_r g_r, with the mean and
// variance of each row x_r itself; without CENTER the mean is left out of both. Of all rows
// together first the means, then the variances: a row's own one after the other would keep the
// processor waiting.
template <typename In, typename T, bool CENTER>
KFAC_FAST_TARGET void add_normalized(const In* const* x, const In* const* g, int64_t rows,
                                     int64_t count, T eps, T* products, T* sums) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  const T entries = static_cast<T>(count);
  T shift[most_rows_at_once] = {}, mean[most_rows_at_once] = {}, scale[most_rows_at_once];
  if constexpr (CENTER) {
    for (int64_t r = 0; r < rows; ++r) shift[r] = sum_entries<In, T>(x[r], count) / entries;
  }
  for (int64_t r = 0; r < rows; ++r) {
    T rest, squares;
    sum_deviations(x[r], count, shift[r], rest, squares);
    if constexpr (CENTER) mean[r] = rest / entries;  // what rounding has left of it
    scale[r] = inverse_deviation(squares / entries - mean[r] * mean[r], eps);
  }
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    Vector product = load_vector<T, T>(products + i), sum = load_vector<T, T>(sums + i);
    for (int64_t r = 0; r < rows; ++r) {
      const Vector gradient = load_vector<In, T>(g[r] + i);
      product += gradient * ((load_vector<In, T>(x[r] + i) - shift[r] - mean[r]) * scale[r]);
      sum += gradient;
    }
    *reinterpret_cast<Vector*>(products + i) = product;
    *reinterpret_cast<Vector*>(sums + i) = sum;
  }
  for (; i < count; ++i) {
    for (int64_t r = 0; r < rows; ++r) {
      const T gradient = g[r][i];
      products[i] += gradient * ((static_cast<T>(x[r][i]) - shift[r] - mean[r]) * scale[r]);
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
  const T mean = sum_entries<In, T>(x, count) / entries;
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
