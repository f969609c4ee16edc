// The stores of all types, for every operator.

#include "symmetric_store.h"

namespace kfac_fast {

template const SymmetricStoreFunctions<float>& symmetric_store_functions(InstructionSet set);
template const SymmetricStoreFunctions<double>& symmetric_store_functions(InstructionSet set);

}  // namespace kfac_fast
