// Which instruction set the kernels run in.
#include "simd.h"

#include <cstdlib>

namespace trivium {
namespace {

Isa supported() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::plain;
}

// TRIVIUM_SIMD=plain or avx2 asks for less than the processor has: to test the narrower paths on
// it, and to compare.
Isa chosen() {
    const char* const asked = std::getenv("TRIVIUM_SIMD");
    if (asked && std::strcmp(asked, "plain") == 0) return Isa::plain;
    if (asked && std::strcmp(asked, "avx2") == 0 && supported() != Isa::plain) return Isa::avx2;
    return supported();
}

}  // namespace

Isa isa() {
    static const Isa found = chosen();
    return found;
}

}  // namespace trivium
