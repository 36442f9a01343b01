// Memory plan: each element read once.
#include "squared_norm.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace trivium {
namespace {

constexpr int64_t ELEMENTS_PER_TASK = 1 << 16;
constexpr int64_t ELEMENTS_IN_FP32 = 1 << 11;

struct Block {
    template <int L>
    static TRIVIUM_INLINE void run(const float* x, int64_t size, double* total) {
        Floats<L> squares[4] = {};
        int64_t j = 0;
        for (; j + 4 * L <= size; j += 4 * L)
            for (int k = 0; k < 4; ++k) {
                const Floats<L> v = load<L>(x + j + k * L);
                squares[k] += v * v;
            }
        for (; j < size; j += L) {
            const Floats<L> v = load<L>(x + j, std::min<int64_t>(L, size - j));
            squares[0] += v * v;
        }
        *total +=
            static_cast<double>(sum<L>((squares[0] + squares[1]) + (squares[2] + squares[3])));
    }
};

}  // namespace

double squared_norm(const float* x, int64_t size, int threads) {
    const int64_t tasks = (size + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK;
    std::vector<double> totals(static_cast<size_t>(tasks), 0.0);
    parallel_for(tasks, threads, [&](int64_t task) {
        const int64_t end = std::min(size, (task + 1) * ELEMENTS_PER_TASK);
        for (int64_t begin = task * ELEMENTS_PER_TASK; begin < end; begin += ELEMENTS_IN_FP32)
            dispatch<Block>(x + begin, std::min(ELEMENTS_IN_FP32, end - begin), &totals[task]);
    });
    double total = 0.0;
    for (const double part : totals) total += part;
    return total;
}

}  // namespace trivium
