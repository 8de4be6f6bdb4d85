// Which of the compiled instruction sets this processor runs; asked once.
#pragma once

namespace semion {
enum class Isa { baseline, avx2, avx512 };

inline Isa best_isa() {
  static const Isa isa = [] {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
  }();
  return isa;
}

template <class Function>
Function* pick(Function* baseline, Function* avx2, Function* avx512) {
  return best_isa() == Isa::avx512 ? avx512 : best_isa() == Isa::avx2 ? avx2 : baseline;
}
}  // namespace semion

// Declares a kernel in the namespace of every instruction set, and chooses among them.
#define SEMION_DECLARE(result, name, ...)     \
  namespace semion {                          \
  namespace baseline {                        \
  result name(__VA_ARGS__);                   \
  }                                           \
  namespace avx2 {                            \
  result name(__VA_ARGS__);                   \
  }                                           \
  namespace avx512 {                          \
  result name(__VA_ARGS__);                   \
  }                                           \
  }
#define SEMION_PICK(name) semion::pick(&semion::baseline::name, &semion::avx2::name, &semion::avx512::name)
