// The Gram matrix of the rows of a tensor on the CPU; see block_gram.h.

#include <optional>

#include "block_gram.h"
#include "checks.h"
#include "diagonal_gram.h"
#include "operators.h"

namespace kfac_fast {
namespace {

template <typename In, typename T>
void gram_of(const Tensor& x, const std::optional<Tensor>& mask, int64_t groups, bool bias,
             double alpha, double beta, const Result& out) {
  const int64_t columns = x.size(x.dim() - 1);
  const RowSource<In> source = rows_of<In>(x, mask);
  const SymmetricStore<T> store{static_cast<T>(alpha), static_cast<T>(beta),
                                columns / groups + bias};
  T* data = static_cast<T*>(out.data());
  if (columns == groups) {
    diagonal_gram(source, columns, store, bias, data);
  } else if (columns > 0) {
    gram_of_rows(source, columns, groups, store, bias, data);
  }
  if (bias) store_count(store, source.counted(0, source.rows()), groups, data);
}

}  // namespace

bool gram(const Tensor& x, const std::optional<Tensor>& mask, int64_t groups, bool bias,
          double alpha, double beta, Result& out) {
  if (!rows_pass(x, mask, groups)) return false;
  const int64_t width = x.size(x.dim() - 1) / groups + bias;
  if (!tensors_pass({&x}, mask, {}, out, stack_of_squares(groups, width))) return false;
  for_dtype(x, [&]<typename In, typename T>() {
    gram_of<In, T>(x, mask, groups, bias, alpha, beta, out);
  });
  return true;
}

}  // namespace kfac_fast
