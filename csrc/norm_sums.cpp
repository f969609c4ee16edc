// The sums of all types, for every kind of normalisation.

#include "norm_sums.h"

namespace kfac_fast {

template const NormSums<float, float>& norm_sums(InstructionSet set);
template const NormSums<double, double>& norm_sums(InstructionSet set);
template const NormSums<BFloat16, float>& norm_sums(InstructionSet set);
template const NormSums<Half, float>& norm_sums(InstructionSet set);

}  // namespace kfac_fast
