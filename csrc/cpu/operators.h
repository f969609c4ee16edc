#pragma once
// The operators on the CPU. Their arguments are those of kfac_fast/schema.py, and they check them:
// where they refuse, they return false and have written nothing but a result of their own.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "tensors.h"

namespace kfac_fast {

bool gram(const Tensor& x, const std::optional<Tensor>& mask, int64_t groups, bool bias,
          double alpha, double beta, Result& out);

bool shared_gram(const Tensor& x, const std::optional<Tensor>& mask,
                 const std::optional<Tensor>& segments, int64_t num_segments,
                 const std::string& reduction, int64_t groups, bool bias, double alpha, double beta,
                 Result& out);

bool feature_norm_gram(const Tensor& x, const Tensor& gradient, const std::optional<Tensor>& mask,
                       const std::optional<Tensor>& segments, int64_t num_segments, double eps,
                       bool center, bool bias, double alpha, double beta, Result& out);
bool channel_norm_gram(const Tensor& x, const Tensor& gradient, const std::optional<Tensor>& mean,
                       const std::optional<Tensor>& variance, int64_t num_groups, double eps,
                       bool bias, double alpha, double beta, Result& out);

// The kernels of convolutions take a plan of kfac_fast/conv.py in place of the geometry, and with
// it the sizes of the images that it is of.
using ConvKernel =
    std::function<bool(const Tensor& x, bool bias, double alpha, double beta, Result& out)>;
using MakeConvKernel = ConvKernel(const std::vector<int64_t>& plan,
                                  const std::vector<int64_t>& sizes, int64_t groups);
MakeConvKernel conv_offset_gram, conv_patch_gram, conv_reduce_gram, conv_window_sum;

bool mean_eigenvalues(const std::vector<Tensor>& matrices, const Tensor& out);
bool update_averages(const std::vector<Tensor>& sums, const std::vector<double>& terms,
                     double decay, bool covariances, const std::vector<Tensor>& out,
                     const std::vector<Tensor>& weights, const std::vector<Tensor>& skipped);

bool eigh(const std::vector<Tensor>& matrices, const std::vector<Tensor>& values,
          const std::vector<Tensor>& vectors, const Tensor& info);

bool damped_inverse(const std::vector<Tensor>& matrices, const std::vector<Tensor>& damping,
                    const std::vector<Tensor>& out, const Tensor& info,
                    const std::optional<Tensor>& logdet);
bool damped_cholesky(const std::vector<Tensor>& matrices, const std::vector<Tensor>& damping,
                     const std::vector<Tensor>& out, const Tensor& info,
                     const std::optional<Tensor>& logdet);

bool precondition(const std::vector<Tensor>& grads, const std::vector<Tensor>& input_sides,
                  const std::vector<Tensor>& gradient_sides, const std::vector<Tensor>& out,
                  const Tensor& inner);
bool cholesky_precondition(const std::vector<Tensor>& grads, const std::vector<Tensor>& input_sides,
                           const std::vector<Tensor>& gradient_sides,
                           const std::vector<Tensor>& out, const Tensor& inner);

}  // namespace kfac_fast
