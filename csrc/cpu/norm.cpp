// Memory plan. Forward: each row is read from memory once, and again from cache, then written once.
// Backward: x and dy likewise, dx written once; the sums for dweight and dbias stay in cache, one
// row of partial sums per block of rows.
#include "norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"

namespace trivium {
namespace {

constexpr int64_t ELEMENTS_PER_TASK =
    1 << 15;  // 128 KiB of fp32: some 10 us, well above the cost of handing out a task
constexpr int64_t BACKWARD_BLOCKS = 32;  // rows of partial sums for dweight

// The sum of value(j, n) over a row, in four chains: one chain would wait for its own addition.
template <int L, class Value>
TRIVIUM_INLINE float sum_of_row(int64_t columns, const Value& value) {
    Floats<L> total[4] = {};
    int64_t j = 0;
    for (; j + 4 * L <= columns; j += 4 * L)
        for (int k = 0; k < 4; ++k) total[k] += value(j + k * L, static_cast<int64_t>(L));
    for (; j + L <= columns; j += L) total[0] += value(j, static_cast<int64_t>(L));
    if (j < columns) total[1] += value(j, columns - j);
    return sum<L>((total[0] + total[1]) + (total[2] + total[3]));
}

template <NormKind kind, class T>
struct Forward {
    template <int L>
    static TRIVIUM_INLINE void run(const NormForward<T> a, int64_t begin, int64_t end) {
        const int64_t columns = a.columns;
        for (int64_t row = begin; row < end; ++row) {
            const T* x = a.x + row * columns;
            T* y = a.y + row * columns;
            if (a.branch) {
                const T* branch = a.branch + row * columns;
                T* added = a.sum + row * columns;
                each_vector<L>(columns, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                    store<L>(added + j, load<L>(x + j, n) + load<L>(branch + j, n), n);
                });
                x = added;
            }
            float mean = 0.0f;
            if (kind == NormKind::layer) {
                mean = sum_of_row<L>(columns, [&](int64_t j, int64_t n) __attribute__((
                                                  always_inline)) { return load<L>(x + j, n); }) /
                       static_cast<float>(columns);
                a.mean[row] = mean;
            }
            const float squares =
                sum_of_row<L>(columns, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                    const Floats<L> v = first<L>(load<L>(x + j, n) - mean, n);
                    return v * v;
                });
            const float rstd = 1.0f / std::sqrt(squares / static_cast<float>(columns) + a.eps);
            a.rstd[row] = rstd;
            each_vector<L>(columns, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                const Floats<L> x_hat = (load<L>(x + j, n) - mean) * rstd,
                                w = load<L>(a.weight + j, n);
                if (kind == NormKind::rms)
                    store<L>(y + j, w * rounded_to<L>(x, x_hat), n);
                else
                    store<L>(y + j, a.bias ? x_hat * w + load<L>(a.bias + j, n) : x_hat * w, n);
            });
        }
    }
};

// With g = dy * weight: dx = rstd * (g - x_hat * mean(g * x_hat)), less rstd * mean(g) for a layer
// norm; dweight += dy * x_hat; dbias += dy.
template <NormKind kind, class T>
struct Backward {
    template <int L>
    static TRIVIUM_INLINE void run(const NormBackward<T> a, float* dweight, float* dbias,
                                   int64_t begin, int64_t end) {
        const int64_t columns = a.columns;
        for (int64_t row = begin; row < end; ++row) {
            const T* dy = a.dy + row * columns;
            const T* x = a.x + row * columns;
            const T* dsum = a.dsum ? a.dsum + row * columns : nullptr;
            T* dx = a.dx + row * columns;
            const float mean = kind == NormKind::layer ? a.mean[row] : 0.0f, rstd = a.rstd[row],
                        count = static_cast<float>(columns);
            const float projection =
                sum_of_row<L>(columns,
                              [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                                  return load<L>(dy + j, n) * load<L>(a.weight + j, n) *
                                         (load<L>(x + j, n) - mean);
                              }) *
                rstd / count;
            float mean_g = 0.0f;
            if (kind == NormKind::layer)
                mean_g = sum_of_row<L>(columns,
                                       [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                                           return load<L>(dy + j, n) * load<L>(a.weight + j, n);
                                       }) /
                         count;
            each_vector<L>(columns, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                const Floats<L> g = load<L>(dy + j, n), x_hat = (load<L>(x + j, n) - mean) * rstd;
                store<L>(dweight + j, load<L>(dweight + j, n) + g * x_hat, n);
                if (dbias) store<L>(dbias + j, load<L>(dbias + j, n) + g, n);
                Floats<L> d = rstd * (g * load<L>(a.weight + j, n) - mean_g - x_hat * projection);
                if (dsum) d += load<L>(dsum + j, n);
                store<L>(dx + j, d, n);
            });
        }
    }
};

template <NormKind kind, class T>
void forward(const NormForward<T>& a, int threads) {
    const int64_t step = std::max<int64_t>(1, ELEMENTS_PER_TASK / a.columns);
    parallel_for((a.rows + step - 1) / step, threads, [&](int64_t task) {
        dispatch<Forward<kind, T>>(a, task * step, std::min(a.rows, (task + 1) * step));
    });
}

template <NormKind kind, class T>
void backward(const NormBackward<T>& a, int threads) {
    const int64_t columns = a.columns;
    const int64_t step = std::max<int64_t>(std::max<int64_t>(1, ELEMENTS_PER_TASK / columns),
                                           (a.rows + BACKWARD_BLOCKS - 1) / BACKWARD_BLOCKS);
    const int64_t blocks = (a.rows + step - 1) / step;
    const size_t size = static_cast<size_t>(blocks * columns);
    std::vector<float> dweight(size, 0.0f), dbias(a.dbias ? size : 0, 0.0f);
    parallel_for(blocks, threads, [&](int64_t block) {
        float* const to_dbias = a.dbias ? dbias.data() + block * columns : nullptr;
        dispatch<Backward<kind, T>>(a, dweight.data() + block * columns, to_dbias, block * step,
                                    std::min(a.rows, (block + 1) * step));
    });
    for (int64_t j = 0; j < columns; ++j) {
        a.dweight[j] = 0.0f;
        for (int64_t block = 0; block < blocks; ++block)
            a.dweight[j] += dweight[block * columns + j];
    }
    for (int64_t j = 0; a.dbias && j < columns; ++j) {
        a.dbias[j] = 0.0f;
        for (int64_t block = 0; block < blocks; ++block) a.dbias[j] += dbias[block * columns + j];
    }
}

}  // namespace

template <class T>
void norm_forward(NormKind kind, const NormForward<T>& a, int threads) {
    kind == NormKind::rms ? forward<NormKind::rms>(a, threads)
                          : forward<NormKind::layer>(a, threads);
}

template <class T>
void norm_backward(NormKind kind, const NormBackward<T>& a, int threads) {
    kind == NormKind::rms ? backward<NormKind::rms>(a, threads)
                          : backward<NormKind::layer>(a, threads);
}

template void norm_forward(NormKind, const NormForward<float>&, int);
template void norm_forward(NormKind, const NormForward<BFloat16>&, int);
template void norm_backward(NormKind, const NormBackward<float>&, int);
template void norm_backward(NormKind, const NormBackward<BFloat16>&, int);

}  // namespace trivium
