#include "index.h"

#include <algorithm>
#include <limits>
#include <vector>

// The order of a blend is decided by float64 ties: a fused multiply-add rounds once where the
// contract rounds twice.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace trivium {

template <class T>
bool build_sample_index(const int32_t* lengths, int32_t first, const int32_t* documents,
                        int64_t num_documents, int64_t seq_length, int64_t num_samples, T* out) {
    out[0] = 0;
    out[1] = 0;
    int64_t begin = 0;  // token at which documents[position] begins
    int64_t position = 0;
    for (int64_t j = 1; j <= num_samples; ++j) {
        const int64_t token = j * seq_length;
        while (position < num_documents && begin + lengths[documents[position] - first] <= token) {
            begin += lengths[documents[position] - first];
            ++position;
        }
        if (position == num_documents) return false;
        out[2 * j] = static_cast<T>(position);
        out[2 * j + 1] = static_cast<T>(token - begin);
    }
    return true;
}

template bool build_sample_index<int32_t>(const int32_t*, int32_t, const int32_t*, int64_t, int64_t,
                                          int64_t, int32_t*);
template bool build_sample_index<int64_t>(const int32_t*, int32_t, const int32_t*, int64_t, int64_t,
                                          int64_t, int64_t*);

void build_blend_index(const double* weights, int32_t num_datasets, int64_t size, int16_t* dataset,
                       int64_t* sample) {
    std::vector<int64_t> used(num_datasets, 0);
    for (int64_t s = 0; s < size; ++s) {
        const double drawn = static_cast<double>(std::max<int64_t>(s, 1));
        int32_t best = 0;
        double best_lag = std::numeric_limits<double>::lowest();
        for (int32_t k = 0; k < num_datasets; ++k) {
            const double lag = weights[k] * drawn - static_cast<double>(used[k]);
            if (lag > best_lag) {
                best_lag = lag;
                best = k;
            }
        }
        dataset[s] = static_cast<int16_t>(best);
        sample[s] = used[best]++;
    }
}

void build_exhaustive_blend_index(const int64_t* sizes, int32_t num_datasets, int16_t* dataset,
                                  int64_t* sample) {
    int64_t total = 0;
    std::vector<int32_t> open;  // datasets with samples left, in order
    for (int32_t k = 0; k < num_datasets; ++k) {
        total += sizes[k];
        if (sizes[k] > 0) open.push_back(k);
    }
    std::vector<double> weights(num_datasets);
    for (int32_t k = 0; k < num_datasets; ++k)
        weights[k] = static_cast<double>(sizes[k]) / static_cast<double>(total);
    std::vector<int64_t> used(num_datasets, 0);
    for (int64_t s = 0; s < total; ++s) {
        const double drawn = static_cast<double>(std::max<int64_t>(s, 1));
        size_t best = 0;
        double best_lag = std::numeric_limits<double>::lowest();
        for (size_t i = 0; i < open.size(); ++i) {
            const double lag = weights[open[i]] * drawn - static_cast<double>(used[open[i]]);
            if (lag > best_lag) {
                best_lag = lag;
                best = i;
            }
        }
        const int32_t k = open[best];
        dataset[s] = static_cast<int16_t>(k);
        sample[s] = used[k]++;
        if (used[k] == sizes[k]) open.erase(open.begin() + static_cast<std::ptrdiff_t>(best));
    }
}

}  // namespace trivium
