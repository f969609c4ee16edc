// Sums over normalised entries for one instruction set; see compile_for_instruction_sets.h.

template <typename T, int BYTES = KFAC_FAST_VECTOR_BYTES>
KFAC_FAST_TARGET inline T sum_lanes(const T* lanes) {
  if constexpr (BYTES == sizeof(T)) {
    return *lanes;
  } else {
    typedef T Half __attribute__((vector_size(BYTES / 2), aligned(alignof(T)), may_alias));
    constexpr int LANES = BYTES / 2 / sizeof(T);
    T sums[LANES];
    *reinterpret_cast<Half*>(sums) = *reinterpret_cast<const Half*>(lanes) +
                                     *reinterpret_cast<const Half*>(lanes + LANES);
    return sum_lanes<T, BYTES / 2>(sums);
  }
}

template <typename T>
KFAC_FAST_TARGET inline T sum_of(typename VectorOf<T>::type vector) {
  return sum_lanes<T>(reinterpret_cast<const T*>(&vector));
}

// Σ_i x_i, or of the squares of x_i - mean.
template <typename T, typename In, bool SQUARED>
KFAC_FAST_TARGET T sum_entries(const In* x, int64_t count, T mean) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  T total = 0;
  for (int64_t i = 0; i < count;) {
    const int64_t end = std::min(count, i + entries_a_chain);
    Vector sums[2] = {};
    for (; i + 2 * LANES <= end; i += 2 * LANES) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        sums[v] += term<SQUARED>(load_vector<In, T>(x + i + v * LANES) - mean);
      }
    }
    for (; i + LANES <= end; i += LANES) {
      sums[0] += term<SQUARED>(load_vector<In, T>(x + i) - mean);
    }
    T chain = sum_of<T>(sums[0] + sums[1]);
    for (; i < end; ++i) chain += term<SQUARED>(static_cast<T>(x[i]) - mean);
    total += chain;
  }
  return total;
}

// products += g (x - mean) / √(variance + eps) and sums += g, with the mean and variance of the row
// x itself; without CENTER the mean is left out of both.
template <typename In, typename T, bool CENTER>
KFAC_FAST_TARGET void add_normalized(const In* x, const In* g, int64_t count, T eps, T* products,
                                     T* sums) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  const T mean = CENTER ? sum_entries<T, In, false>(x, count, T{0}) / static_cast<T>(count) : T{0};
  const T variance = sum_entries<T, In, true>(x, count, mean) / static_cast<T>(count);
  const T scale = T{1} / std::sqrt(variance + eps);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Vector gradient = load_vector<In, T>(g + i);
    const Vector normalized = (load_vector<In, T>(x + i) - mean) * scale;
    *reinterpret_cast<Vector*>(products + i) += gradient * normalized;
    *reinterpret_cast<Vector*>(sums + i) += gradient;
  }
  for (; i < count; ++i) {
    const T gradient = g[i];
    products[i] += gradient * ((static_cast<T>(x[i]) - mean) * scale);
    sums[i] += gradient;
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

// The moments of a row x and of its gradients g, about the row's own mean.
template <typename In, typename T>
KFAC_FAST_TARGET RowMoments<T> row_moments(const In* x, const In* g, int64_t count) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t LANES = KFAC_FAST_VECTOR_BYTES / sizeof(T);
  const T mean = sum_entries<T, In, false>(x, count, T{0}) / static_cast<T>(count);
  RowMoments<T> total{mean, 0, 0, 0};
  for (int64_t i = 0; i < count;) {
    const int64_t end = std::min(count, i + entries_a_chain);
    Vector squares{}, products{}, gradients{};
    for (; i + LANES <= end; i += LANES) {
      const Vector centred = load_vector<In, T>(x + i) - mean;
      const Vector gradient = load_vector<In, T>(g + i);
      squares += centred * centred;
      products += centred * gradient;
      gradients += gradient;
    }
    total.squares += sum_of<T>(squares);
    total.products += sum_of<T>(products);
    total.gradients += sum_of<T>(gradients);
    for (; i < end; ++i) {
      const T centred = static_cast<T>(x[i]) - mean, gradient = g[i];
      total.squares += centred * centred;
      total.products += centred * gradient;
      total.gradients += gradient;
    }
  }
  return total;
}
