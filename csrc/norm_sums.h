#pragma once
// Sums over the entries that a normalisation sees, with the gradients of its output: of rows that
// are normalised one by one, and of parts of what is normalised together.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "row_sum.h"
#include "symmetric_store.h"
#include "tile_product.h"

namespace kfac_fast {

// So many vectors are summed plainly; their sums are added up with what rounding has taken.
constexpr int64_t vectors_a_chain = 32;
// Rows whose products with gradients are added up together.
constexpr int64_t most_rows_at_once = 8;

// Of a row x with gradients g: Σ (x - m), Σ (x - m)², Σ g (x - m) and Σ g, where m is the mean but
// for its rounding.
template <typename T>
struct RowMoments {
  T mean, rest, squares, products, gradients;
};

// Of a variance that is not finite there is none: it must not pass for zero.
template <typename T>
T inverse_deviation(T variance, T eps) {
  return std::isfinite(variance) ? T{1} / std::sqrt(variance + eps)
                                 : std::numeric_limits<T>::quiet_NaN();
}

// The functions of one instruction set.
template <typename In, typename T>
struct NormSums {
  RowMoments<T> (*moments)(const In* x, const In* g, int64_t count);
  // By whether the mean is taken away.
  void (*add_normalized[2])(const In* const* x, const In* const* g, int64_t rows, int64_t count,
                            T eps, T* products, T* sums);
  // total += chain, chain <- 0
  void (*end_chain)(T* chain, int64_t count, T* total, T* lost);
  // By whether there are biases.
  void (*add_outer_products[2])(const T* weight, const T* bias, int64_t units, T* total, T* lost);
  void (*add_deviations)(const In* x, const T* mean, int64_t count, T* total, T* lost);
  void (*weigh)(const In* x, const In* g, const T* mean, const T* rest, const T* scale,
                int64_t count, T* weight, T* bias);
};

#define KFAC_FAST_BODY "norm_sums_body.h"
#include "compile_for_instruction_sets.h"

template <typename In, typename T>
const NormSums<In, T>& norm_sums(InstructionSet set) {
  return KFAC_FAST_FORM(set, norm_sums<In, T>);
}

// Compiled once, in norm_sums.cpp.
extern template const NormSums<float, float>& norm_sums(InstructionSet set);
extern template const NormSums<double, double>& norm_sums(InstructionSet set);
extern template const NormSums<BFloat16, float>& norm_sums(InstructionSet set);
extern template const NormSums<Half, float>& norm_sums(InstructionSet set);

// A unit's block, with or without a bias, from the sums of weight with weight, weight with bias and
// bias with bias, `distance` apart.
template <typename T>
void store_unit(const SymmetricStore<T>& store, const TileSums<T>& sums, int64_t distance,
                int64_t unit, T* out) {
  T* matrix = out + unit * store.edge * store.edge;
  store(sums, 1, 1, true, matrix, 0, 0);
  if (store.edge == 1) return;
  store(sums.at(distance, 0), 1, 1, false, matrix, 1, 0);
  store(sums.at(2 * distance, 0), 1, 1, true, matrix, 1, 1);
}

}  // namespace kfac_fast
