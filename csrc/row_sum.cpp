// The sums of rows of all types, for every operator.

#include "row_sum.h"

namespace kfac_fast {

template const RowSumFunctions<float, float>& row_sum_functions<float, float, false>(
    InstructionSet set);
template const RowSumFunctions<double, double>& row_sum_functions<double, double, false>(
    InstructionSet set);
template const RowSumFunctions<BFloat16, float>& row_sum_functions<BFloat16, float, false>(
    InstructionSet set);
template const RowSumFunctions<Half, float>& row_sum_functions<Half, float, false>(
    InstructionSet set);

}  // namespace kfac_fast
