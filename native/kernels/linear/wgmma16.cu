#include "wgmma.cuh"

namespace fewbit::linear {
namespace {
FEWBIT_UNIT_16(Bf16Unit, "bf16")
FEWBIT_UNIT_16(F16Unit, "f16")
}  // namespace

cudaError_t product16(const Launch& launch, const Product& product) {
  return product.typeX == CublasLt::kF16 ? runProduct<F16Unit>(launch, product) : runProduct<Bf16Unit>(launch, product);
}

}  // namespace fewbit::linear
