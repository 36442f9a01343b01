// Memory plan. Statistics: a row is read once from memory for its maximum and again from cache for
// the sum. Gradient: read and written once. Rows are counted in int64: their product with the
// stride passes 2^31 at 16,744 rows of 128,256 columns.
#include "cross_entropy.h"

#include <algorithm>
#include <limits>

#include "math.h"
#include "parallel.h"

namespace trivium {
namespace {

constexpr int64_t ELEMENTS_PER_TASK = 1 << 15;

template <int L, class T>
TRIVIUM_INLINE float highest_of(const T* x, int64_t columns) {
    float found = -std::numeric_limits<float>::infinity();
    Floats<L> best[4] = {all<L>(found), all<L>(found), all<L>(found), all<L>(found)};
    Words<L> is_nan = {};
    int64_t j = 0;
    for (; j + 4 * L <= columns; j += 4 * L)
        for (int k = 0; k < 4; ++k) {
            const Floats<L> v = load<L>(x + j + k * L);
            best[k] = larger<L>(v, best[k]);
            is_nan |= (Words<L>)(v != v);
        }
    float lanes[L];
    for (; j < columns; j += L) {
        const int64_t n = std::min<int64_t>(L, columns - j);
        store<L>(lanes, load<L>(x + j, n));
        for (int64_t i = 0; i < n; ++i)
            found = lanes[i] > found || lanes[i] != lanes[i] ? lanes[i] : found;
    }
    store<L>(lanes, larger<L>(larger<L>(best[0], best[1]), larger<L>(best[2], best[3])));
    for (int i = 0; i < L; ++i) found = lanes[i] > found ? lanes[i] : found;
    uint32_t any = 0;
    for (int i = 0; i < L; ++i) any |= is_nan[i];
    return any ? std::numeric_limits<float>::quiet_NaN() : found;
}

// The sum of exp(x - highest) over [begin, end), in two chains.
template <int L, class T>
TRIVIUM_INLINE float sum_of_exponentials(const T* x, float highest, int64_t begin, int64_t end) {
    Floats<L> total[2] = {};
    int64_t j = begin;
    for (; j + 2 * L <= end; j += 2 * L)
        for (int k = 0; k < 2; ++k) total[k] += exp<L>(load<L>(x + j + k * L) - highest);
    for (; j < end; j += L) {
        const int64_t n = std::min<int64_t>(L, end - j);
        total[0] += first<L>(exp<L>(load<L>(x + j, n) - highest), n);
    }
    return sum<L>(total[0] + total[1]);
}

template <class T>
struct Statistics {
    template <int L>
    static TRIVIUM_INLINE void run(const Logits<const T> a, float* highest, float* rest,
                                   float* target, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* x = a.logits + row * a.stride;
            const int64_t column = a.column[row];
            const float top = highest_of<L>(x, a.columns);
            highest[row] = top;
            float label[1] = {0.0f};
            if (column >= 0) store<L>(label, load<L>(x + column, 1), 1);
            target[row] = label[0];
            const int64_t until = column >= 0 ? column : a.columns;
            rest[row] = sum_of_exponentials<L>(x, top, 0, until);
            if (column >= 0) rest[row] += sum_of_exponentials<L>(x, top, column + 1, a.columns);
        }
    }
};

template <class T>
struct Gradient {
    template <int L>
    static TRIVIUM_INLINE void run(const Logits<T> a, const float* highest, const float* scale,
                                   const float* target_gradient, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            T* x = a.logits + row * a.stride;
            const float top = highest[row], factor = scale[row];
            if (factor == 0.0f) {
                std::memset(x, 0, a.padded * sizeof(T));
                continue;
            }
            each_vector<L>(a.columns, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
                store<L>(x + j, exp<L>(load<L>(x + j, n) - top) * factor, n);
            });
            if (a.column[row] >= 0) store<L>(x + a.column[row], all<L>(target_gradient[row]), 1);
            std::memset(x + a.columns, 0, (a.padded - a.columns) * sizeof(T));
        }
    }
};

}  // namespace

template <class T>
void cross_entropy_statistics(const Logits<const T>& a, float* highest, float* rest, float* target,
                              int threads) {
    const int64_t step = std::max<int64_t>(1, ELEMENTS_PER_TASK / std::max<int64_t>(1, a.columns));
    parallel_for((a.rows + step - 1) / step, threads, [&](int64_t task) {
        dispatch<Statistics<T>>(a, highest, rest, target, task * step,
                                std::min(a.rows, (task + 1) * step));
    });
}

template <class T>
void cross_entropy_gradient(const Logits<T>& a, const float* highest, const float* scale,
                            const float* target_gradient, int threads) {
    const int64_t step = std::max<int64_t>(1, ELEMENTS_PER_TASK / std::max<int64_t>(1, a.columns));
    parallel_for((a.rows + step - 1) / step, threads, [&](int64_t task) {
        dispatch<Gradient<T>>(a, highest, scale, target_gradient, task * step,
                              std::min(a.rows, (task + 1) * step));
    });
}

template void cross_entropy_statistics(const Logits<const float>&, float*, float*, float*, int);
template void cross_entropy_statistics(const Logits<const BFloat16>&, float*, float*, float*, int);
template void cross_entropy_gradient(const Logits<float>&, const float*, const float*, const float*,
                                     int);
template void cross_entropy_gradient(const Logits<BFloat16>&, const float*, const float*,
                                     const float*, int);

}  // namespace trivium
