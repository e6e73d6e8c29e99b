// All entries of this addon.
#pragma once
#include <vector>

#include "launch.hpp"

namespace fewbit {

/** Every kernel that was built in, in no particular order; names are unique. */
const std::vector<Entry>& registry();

/** The entry of a name, or null. */
const Entry* find(const char* name);

}  // namespace fewbit
