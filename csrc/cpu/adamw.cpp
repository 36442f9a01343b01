// Plain loops: with no sum across elements the compiler vectorises them by itself, given
// -fno-math-errno for the square root.
#include "adamw.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace trivium {
namespace {

constexpr int64_t ELEMENTS_PER_TASK = 1 << 15;

struct Buffers {
    float* __restrict masters;
    float* __restrict exp_avg;
    float* __restrict exp_avg_sq;
    const float* __restrict grads;
};

TRIVIUM_INLINE void put(float* p, float value) { *p = value; }
TRIVIUM_INLINE void put(BFloat16* p, float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    const uint32_t rounded = word + 0x7fffu + ((word >> 16) & 1u);
    p->bits = static_cast<uint16_t>((value != value ? 0x7fc00000u : rounded) >> 16);
}

template <class T>
struct Update {
    template <int L>
    static TRIVIUM_INLINE void run(const AdamW s, const Buffers b, T* __restrict weights,
                                   int64_t begin, int64_t end) {
        const float root_factor =
            1.0f / s.root_correction;  // a product in the loop, where a second division would cost
                                       // as much as the root
        float* __restrict masters = b.masters;
        float* __restrict exp_avg = b.exp_avg;
        float* __restrict exp_avg_sq = b.exp_avg_sq;
        const float* __restrict grads = b.grads;
        for (int64_t i = begin; i < end; ++i) {
            const float g = grads[i] * s.grad_scale;
            const float m = exp_avg[i] + s.one_minus_beta1 * (g - exp_avg[i]);
            const float v = exp_avg_sq[i] * s.beta2 + s.one_minus_beta2 * (g * g);
            const float p =
                masters[i] * s.lr_decay - s.step_size * m / (std::sqrt(v) * root_factor + s.eps);
            exp_avg[i] = m;
            exp_avg_sq[i] = v;
            masters[i] = p;
            if (weights) put(weights + i, p);
        }
    }
};

}  // namespace

template <class T>
void adamw(const AdamW& a, float* masters, float* exp_avg, float* exp_avg_sq, const float* grads,
           T* weights, int64_t size, int threads) {
    const Buffers buffers{masters, exp_avg, exp_avg_sq, grads};
    parallel_for((size + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK, threads, [&](int64_t task) {
        const int64_t begin = task * ELEMENTS_PER_TASK;
        dispatch<Update<T>>(a, buffers, weights, begin, std::min(size, begin + ELEMENTS_PER_TASK));
    });
}

template void adamw(const AdamW&, float*, float*, float*, const float*, float*, int64_t, int);
template void adamw(const AdamW&, float*, float*, float*, const float*, BFloat16*, int64_t, int);

}  // namespace trivium
