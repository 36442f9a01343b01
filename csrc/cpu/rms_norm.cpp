// Memory plan. Forward: each row is read from memory once, and a second time from cache, then written once. Backward: x and dy likewise,
// dx written once; the sum for dweight stays in cache, one row of partial sums per block of rows.
#include "rms_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace trivium {
namespace {

constexpr int64_t ELEMENTS_PER_TASK = 1 << 15;  // 128 KiB of fp32: some 10 us, well above the cost of handing out a task
constexpr int64_t BACKWARD_BLOCKS = 32;         // rows of partial sums for dweight

template <class T>
struct Forward {
    const T* x;
    const T* weight;
    T* y;
    float* rstd;
    int64_t columns;
    float eps;
};

template <class T>
struct Backward {
    const T* dy;
    const T* x;
    const T* weight;
    const float* rstd;
    T* dx;
    int64_t columns;
};

// The sum of squares of a row, in four chains of 16: one chain would wait for its own addition.
template <class T>
TRIVIUM_INLINE float sum_of_squares(const T* x, int64_t columns) {
    Float16 total[4] = {};
    Float16 v;
    int64_t j = 0;
    for (; j + 4 * LANES <= columns; j += 4 * LANES)
        for (int k = 0; k < 4; ++k) {
            load(v, x + j + k * LANES);
            total[k] += v * v;
        }
    for (; j + LANES <= columns; j += LANES) {
        load(v, x + j);
        total[0] += v * v;
    }
    if (j < columns) {
        load_tail(v, x + j, columns - j);
        total[1] += v * v;
    }
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <class T>
TRIVIUM_INLINE Float16 normalised(const T* x, const Float16& v, const Float16& w, float rstd) {
    Float16 x_hat = v * rstd;
    round_to(x, x_hat);
    return w * x_hat;
}

template <class T>
TRIVIUM_INLINE void forward_rows(const Forward<T>& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* x = a.x + row * a.columns;
        T* y = a.y + row * a.columns;
        const float rstd = 1.0f / std::sqrt(sum_of_squares(x, a.columns) / static_cast<float>(a.columns) + a.eps);
        a.rstd[row] = rstd;
        Float16 v, w;
        int64_t j = 0;
        for (; j + LANES <= a.columns; j += LANES) {
            load(v, x + j);
            load(w, a.weight + j);
            store(y + j, normalised(x, v, w, rstd));
        }
        if (const int64_t n = a.columns - j) {
            load_tail(v, x + j, n);
            load_tail(w, a.weight + j, n);
            store_tail(y + j, normalised(x, v, w, rstd), n);
        }
    }
}

// The sum of dy * x * weight of a row, in two chains.
template <class T>
TRIVIUM_INLINE float dot_of_row(const T* dy, const T* x, const T* weight, int64_t columns) {
    Float16 total[2] = {};
    Float16 g, v, w;
    int64_t j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES)
        for (int k = 0; k < 2; ++k) {
            load(g, dy + j + k * LANES);
            load(v, x + j + k * LANES);
            load(w, weight + j + k * LANES);
            total[k] += g * w * v;
        }
    if (j + LANES <= columns) {
        load(g, dy + j);
        load(v, x + j);
        load(w, weight + j);
        total[0] += g * w * v;
        j += LANES;
    }
    if (const int64_t n = columns - j) {
        load_tail(g, dy + j, n);
        load_tail(v, x + j, n);
        load_tail(w, weight + j, n);
        total[1] += g * w * v;
    }
    return sum(total[0] + total[1]);
}

// dx = rstd * (dy * weight - x_hat * mean(dy * weight * x_hat)); dweight += dy * x_hat.
template <class T>
TRIVIUM_INLINE void backward_rows(const Backward<T>& a, float* dweight, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const T* dy = a.dy + row * a.columns;
        const T* x = a.x + row * a.columns;
        T* dx = a.dx + row * a.columns;
        const float rstd = a.rstd[row];
        const float mean = dot_of_row(dy, x, a.weight, a.columns) * rstd / static_cast<float>(a.columns);
        Float16 g, v, w, d;
        int64_t j = 0;
        for (; j + LANES <= a.columns; j += LANES) {
            load(g, dy + j);
            load(v, x + j);
            load(w, a.weight + j);
            load(d, dweight + j);
            const Float16 x_hat = v * rstd;
            store(dweight + j, d + g * x_hat);
            store(dx + j, rstd * (g * w - x_hat * mean));
        }
        if (const int64_t n = a.columns - j) {
            load_tail(g, dy + j, n);
            load_tail(v, x + j, n);
            load_tail(w, a.weight + j, n);
            load_tail(d, dweight + j, n);
            const Float16 x_hat = v * rstd;
            store_tail(dweight + j, d + g * x_hat, n);
            store_tail(dx + j, rstd * (g * w - x_hat * mean), n);
        }
    }
}

#if defined(__x86_64__)
template <class T>
TRIVIUM_AVX512 void forward_avx512(const Forward<T>& a, int64_t begin, int64_t end) {
    forward_rows(a, begin, end);
}
template <class T>
TRIVIUM_AVX2 void forward_avx2(const Forward<T>& a, int64_t begin, int64_t end) {
    forward_rows(a, begin, end);
}
template <class T>
TRIVIUM_AVX512 void backward_avx512(const Backward<T>& a, float* dweight, int64_t begin, int64_t end) {
    backward_rows(a, dweight, begin, end);
}
template <class T>
TRIVIUM_AVX2 void backward_avx2(const Backward<T>& a, float* dweight, int64_t begin, int64_t end) {
    backward_rows(a, dweight, begin, end);
}
#endif

template <class T>
void forward_dispatch(const Forward<T>& a, int64_t begin, int64_t end) {
#if defined(__x86_64__)
    if (isa() == Isa::avx512) return forward_avx512(a, begin, end);
    if (isa() == Isa::avx2) return forward_avx2(a, begin, end);
#endif
    forward_rows(a, begin, end);
}

template <class T>
void backward_dispatch(const Backward<T>& a, float* dweight, int64_t begin, int64_t end) {
#if defined(__x86_64__)
    if (isa() == Isa::avx512) return backward_avx512(a, dweight, begin, end);
    if (isa() == Isa::avx2) return backward_avx2(a, dweight, begin, end);
#endif
    backward_rows(a, dweight, begin, end);
}

}  // namespace

template <class T>
void rms_norm_forward(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int64_t columns, float eps, int threads) {
    const Forward<T> arguments{x, weight, y, rstd, columns, eps};
    const int64_t step = std::max<int64_t>(1, ELEMENTS_PER_TASK / columns);
    parallel_for((rows + step - 1) / step, threads,
                 [&](int64_t task) { forward_dispatch(arguments, task * step, std::min(rows, (task + 1) * step)); });
}

template <class T>
void rms_norm_backward(const T* dy, const T* x, const T* weight, const float* rstd, T* dx, float* dweight, int64_t rows, int64_t columns,
                       int threads) {
    const Backward<T> arguments{dy, x, weight, rstd, dx, columns};
    const int64_t step = std::max<int64_t>(std::max<int64_t>(1, ELEMENTS_PER_TASK / columns), (rows + BACKWARD_BLOCKS - 1) / BACKWARD_BLOCKS);
    const int64_t blocks = (rows + step - 1) / step;
    std::vector<float> partial(static_cast<size_t>(blocks * columns), 0.0f);
    parallel_for(blocks, threads, [&](int64_t block) {
        backward_dispatch(arguments, partial.data() + block * columns, block * step, std::min(rows, (block + 1) * step));
    });
    std::fill(dweight, dweight + columns, 0.0f);
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t j = 0; j < columns; ++j) dweight[j] += partial[block * columns + j];
}

template void rms_norm_forward(const float*, const float*, float*, float*, int64_t, int64_t, float, int);
template void rms_norm_forward(const BFloat16*, const BFloat16*, BFloat16*, float*, int64_t, int64_t, float, int);
template void rms_norm_backward(const float*, const float*, const float*, const float*, float*, float*, int64_t, int64_t, int);
template void rms_norm_backward(const BFloat16*, const BFloat16*, const BFloat16*, const float*, BFloat16*, float*, int64_t, int64_t, int);

}  // namespace trivium
