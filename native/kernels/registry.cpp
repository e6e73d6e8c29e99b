#include "fewbit/registry.hpp"

#include <cstring>

// One line for each .cu file that exports entries: k<Name>Entries and k<Name>EntryCount.
#define FEWBIT_TABLES(TABLE) \
  TABLE(Fill)              \
  TABLE(Elementwise)       \
  TABLE(Norm)              \
  TABLE(Quantize)          \
  TABLE(Rope)              \
  TABLE(GeneralLinear)     \
  TABLE(GeneralSdpa)       \
  TABLE(LinearSkinny)      \
  TABLE(LinearMixed)       \
  TABLE(LinearGemm)        \
  TABLE(LinearBlockscaled) \
  TABLE(SdpaDecode)        \
  TABLE(SdpaPrefill16)     \
  TABLE(SdpaPrefill8)      \
  TABLE(SdpaPrefillScaled) \
  TABLE(Conv)              \
  TABLE(Sample)            \
  TABLE(RowsNorm)          \
  TABLE(RowsQuantize)      \
  TABLE(RowsRope)          \
  TABLE(RowsSample)

namespace fewbit {

#define DECLARE(name)                 \
  extern const Entry k##name##Entries[]; \
  extern const size_t k##name##EntryCount;
FEWBIT_TABLES(DECLARE)
#undef DECLARE

const std::vector<Entry>& registry() {
  static const std::vector<Entry> all = [] {
    std::vector<Entry> entries;
#define APPEND(name) entries.insert(entries.end(), k##name##Entries, k##name##Entries + k##name##EntryCount);
    FEWBIT_TABLES(APPEND)
#undef APPEND
    return entries;
  }();
  return all;
}

const Entry* find(const char* name) {
  for (const Entry& entry : registry())
    if (std::strcmp(entry.name, name) == 0) return &entry;
  return nullptr;
}

}  // namespace fewbit
