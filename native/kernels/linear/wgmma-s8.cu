#include "wgmma.cuh"

namespace fewbit::linear {
namespace {
FEWBIT_UNIT_S8(S8Unit)
}

cudaError_t productS8(const Launch& launch, const Product& product) { return runProduct<S8Unit>(launch, product); }

}  // namespace fewbit::linear
