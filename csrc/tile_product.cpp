// The tile products and packings of all types, for every operator.

#include "tile_product.h"

namespace kfac_fast {

template const TileProduct<float>& tile_product<float>(InstructionSet set);
template const TileProduct<float>& tile_product<float, true>(InstructionSet set);
template const TileProduct<double>& tile_product<double>(InstructionSet set);
template const TileProduct<double>& tile_product<double, true>(InstructionSet set);
template Packing<float, float> packing(InstructionSet set);
template Packing<double, double> packing(InstructionSet set);
template Packing<BFloat16, float> packing(InstructionSet set);
template Packing<Half, float> packing(InstructionSet set);

}  // namespace kfac_fast
