// RMSNorm on the CPU over raw pointers: rows of `columns` elements, fp32 arithmetic whatever the type in memory.
#pragma once
#include <cstdint>

#include "simd.h"

namespace trivium {

// y = weight * T(x * rstd), rstd = 1 / sqrt(mean(x^2) + eps); rstd[rows] is kept for the backward.
template <class T>
void rms_norm_forward(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int64_t columns, float eps, int threads);

// dx and dweight (fp32) from dy. The sum over rows is cut into the same blocks whatever the number of threads: equal bits on any machine
// of one instruction set.
template <class T>
void rms_norm_backward(const T* dy, const T* x, const T* weight, const float* rstd, T* dx, float* dweight, int64_t rows, int64_t columns,
                       int threads);

}  // namespace trivium
