// Memory plan: w is read once from memory, four of its rows at a time, which stay in the first cache, widened to fp32, while all rows of x
// pass; x and y are small.
#include "few_rows.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace trivium {
namespace {

constexpr int64_t ELEMENTS_PER_TASK = 1 << 16;
constexpr int64_t TILE = 4;  // rows of w

template <class T>
struct Widen {
    template <int L>
    static TRIVIUM_INLINE void run(const T* from, float* to, int64_t size) {
        each_vector<L>(size, [&](int64_t j, int64_t n) __attribute__((always_inline)) { store<L>(to + j, load<L>(from + j, n), n); });
    }
};

// The numbers as fp32: where they are if they are that already, else in `memory`.
const float* widened(const float* x, std::vector<float>&, int64_t) { return x; }
const float* widened(const BFloat16* x, std::vector<float>& memory, int64_t size) {
    memory.resize(size);
    dispatch<Widen<BFloat16>>(x, memory.data(), size);
    return memory.data();
}

// Sums of ROWS rows of x with COUNT rows of w: enough chains of additions to keep the units busy, few enough for the registers.
template <int L, int ROWS, int COUNT, class T>
TRIVIUM_INLINE void tile(const float* x, const float* w, T* y, int64_t outputs, int64_t inputs) {
    Floats<L> total[ROWS][COUNT] = {};
    each_vector<L>(inputs, [&](int64_t j, int64_t n) __attribute__((always_inline)) {
        Floats<L> column[COUNT];
        for (int k = 0; k < COUNT; ++k) column[k] = load<L>(w + k * inputs + j, n);
        for (int i = 0; i < ROWS; ++i) {
            const Floats<L> v = load<L>(x + i * inputs + j, n);
            for (int k = 0; k < COUNT; ++k) total[i][k] += v * column[k];
        }
    });
    for (int i = 0; i < ROWS; ++i)
        for (int k = 0; k < COUNT; ++k) store<L>(y + i * outputs + k, all<L>(sum<L>(total[i][k])), 1);
}

template <class T, int COUNT>
struct Columns {
    template <int L>
    static TRIVIUM_INLINE void run(const float* x, const float* w, T* y, int64_t rows, int64_t outputs, int64_t inputs) {
        int64_t i = 0;
        for (; i + 2 <= rows; i += 2) tile<L, 2, COUNT>(x + i * inputs, w, y + i * outputs, outputs, inputs);
        if (i < rows) tile<L, 1, COUNT>(x + i * inputs, w, y + i * outputs, outputs, inputs);
    }
};

}  // namespace

template <class T>
void few_rows_product(const T* x, const T* w, T* y, int64_t rows, int64_t outputs, int64_t inputs, int threads) {
    std::vector<float> memory;
    const float* const wide = widened(x, memory, rows * inputs);
    const int64_t step = std::max<int64_t>(TILE, ELEMENTS_PER_TASK / std::max<int64_t>(1, inputs) / TILE * TILE);
    parallel_for((outputs + step - 1) / step, threads, [&](int64_t task) {
        const int64_t end = std::min(outputs, (task + 1) * step);
        std::vector<float> tiles;
        int64_t o = task * step;
        for (; o + TILE <= end; o += TILE)
            dispatch<Columns<T, TILE>>(wide, widened(w + o * inputs, tiles, TILE * inputs), y + o, rows, outputs, inputs);
        for (; o < end; ++o) dispatch<Columns<T, 1>>(wide, widened(w + o * inputs, tiles, inputs), y + o, rows, outputs, inputs);
    });
}

template void few_rows_product(const float*, const float*, float*, int64_t, int64_t, int64_t, int);
template void few_rows_product(const BFloat16*, const BFloat16*, BFloat16*, int64_t, int64_t, int64_t, int);

}  // namespace trivium
