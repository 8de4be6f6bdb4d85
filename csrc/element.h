// The types that logits may have, by number: what kernels of both devices and their callers agree on.
#pragma once

#include <cstdint>

namespace semion {
enum class Element : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };
}  // namespace semion
