// Products of a few rows with a large matrix on the CPU: one token at a time, where reading the
// matrix once is all there is to it.
#pragma once
#include <cstdint>

#include "simd.h"

namespace trivium {

// y [rows, outputs] = x [rows, inputs] times the transpose of w [outputs, inputs], all row after
// row; sums in fp32.
template <class T>
void few_rows_product(const T* x, const T* w, T* y, int64_t rows, int64_t outputs, int64_t inputs,
                      int threads);

}  // namespace trivium
