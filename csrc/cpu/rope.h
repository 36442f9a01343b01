// Rotary position embedding on the CPU over raw pointers; fp32 arithmetic whatever the type in
// memory.
#pragma once
#include <cstdint>

#include "simd.h"

namespace trivium {

// Heads of D contiguous elements at base + b * batch + t * token + head * head, in elements.
template <class T>
struct Heads {
    T* base;
    int64_t batch, token, head;
};

// The angles of token t of sample b: `half` of them at cos + (b * batch + t) * half, where `batch`
// is 0 if all samples have the same. direction: 1, or -1 for the opposite rotation. Dim i turns
// with dim i + half, or 2i with 2i + 1 where interleaved; half 0 copies.
struct Rotation {
    const float* cos;
    const float* sin;
    int64_t batch, half;
    bool interleaved;
    float direction;
};

// y gets every head of x with its first 2 half dims rotated and the others copied; y may be x. Su
// et al. 2021, section 3.4.
template <class T>
void rope(const Rotation& rotation, const Heads<const T>& x, const Heads<T>& y, int64_t batch,
          int64_t tokens, int64_t heads, int64_t size, int threads);

}  // namespace trivium
