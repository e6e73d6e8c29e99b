#include "wgmma.cuh"

namespace fewbit::linear {
namespace {
FEWBIT_UNIT_8(E4m3Unit, "e4m3.e4m3")
FEWBIT_UNIT_8(E5m2Unit, "e5m2.e5m2")
FEWBIT_UNIT_8(E4m3E5m2Unit, "e4m3.e5m2")
FEWBIT_UNIT_8(E5m2E4m3Unit, "e5m2.e4m3")
}  // namespace

cudaError_t product8(const Launch& launch, const Product& product) {
  const bool wideX = product.typeX == CublasLt::kE5m2, wideW = product.typeW == CublasLt::kE5m2;
  if (wideX) return wideW ? runProduct<E5m2Unit>(launch, product) : runProduct<E5m2E4m3Unit>(launch, product);
  return wideW ? runProduct<E4m3E5m2Unit>(launch, product) : runProduct<E4m3Unit>(launch, product);
}

}  // namespace fewbit::linear
