#include "fewbit/cublaslt.hpp"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>

namespace fewbit {
namespace {

struct Loaded {
  CublasLt functions;
  std::string reason;
};

template <class Function>
bool find(void* library, const char* name, Function& function, std::string& reason) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) reason = std::string("libcublasLt has no ") + name;
  return function != nullptr;
}

void* open(std::string& reason) {
  // By major version: their interfaces are the same where they are used here. RTLD_LOCAL, so that a process's own copy stays its own.
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"}) {
    if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
    if (reason.empty()) {
      const char* error = dlerror();
      reason = error == nullptr ? name : error;
    }
  }
  return nullptr;
}

Loaded load() {
  Loaded loaded;
  auto& [f, reason] = loaded;
  void* library = open(reason);
  if (library == nullptr) return loaded;
  reason.clear();
  const bool complete =
      find(library, "cublasLtCreate", f.create, reason) && find(library, "cublasLtDestroy", f.destroy, reason) &&
      find(library, "cublasLtGetVersion", f.getVersion, reason) &&
      find(library, "cublasLtMatmulDescCreate", f.descCreate, reason) &&
      find(library, "cublasLtMatmulDescDestroy", f.descDestroy, reason) &&
      find(library, "cublasLtMatmulDescSetAttribute", f.descSet, reason) &&
      find(library, "cublasLtMatrixLayoutCreate", f.layoutCreate, reason) &&
      find(library, "cublasLtMatrixLayoutDestroy", f.layoutDestroy, reason) &&
      find(library, "cublasLtMatmulPreferenceCreate", f.preferenceCreate, reason) &&
      find(library, "cublasLtMatmulPreferenceDestroy", f.preferenceDestroy, reason) &&
      find(library, "cublasLtMatmulPreferenceSetAttribute", f.preferenceSet, reason) &&
      find(library, "cublasLtMatmulAlgoGetHeuristic", f.heuristic, reason) &&
      find(library, "cublasLtMatmul", f.matmul, reason);
  if (!complete) return loaded;
  if (const int status = f.create(&f.handle)) {
    f.handle = nullptr;
    reason = "cublasLtCreate failed with status " + std::to_string(status);
    return loaded;
  }
  f.version = f.getVersion();
  return loaded;
}

}  // namespace

const CublasLt* loadCublasLt(const char** reason) {
  // A handle belongs to the device that is current when it is made.
  static std::mutex mutex;
  static std::map<int, Loaded>* devices = new std::map<int, Loaded>;  // never destroyed: the driver may be gone by then
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    if (reason != nullptr) *reason = "no CUDA device";
    return nullptr;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = devices->find(device);
  if (found == devices->end()) found = devices->emplace(device, load()).first;
  if (reason != nullptr) *reason = found->second.reason.c_str();
  return found->second.functions.handle == nullptr ? nullptr : &found->second.functions;
}

}  // namespace fewbit
