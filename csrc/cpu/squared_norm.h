// The squared 2-norm of flat fp32 memory on the CPU.
#pragma once
#include <cstdint>

namespace trivium {

// The sum of the squares in fp64: fp32 only within a few thousand elements, then blocks in their
// order, so that the number of threads changes no bit.
double squared_norm(const float* x, int64_t size, int threads);

}  // namespace trivium
