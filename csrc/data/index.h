// The orders of samples as plain functions over raw pointers; docs of the format:
// core/data/order.py, which holds the numpy reference.
#pragma once

#include <cstdint>

namespace trivium {

// out[j] = (position in `documents`, token offset) of token j * seq_length of the documents laid
// end to end, j = 0 .. num_samples. lengths[d - first] is the length of document d. Returns false
// if the tokens end before the last sample does.
template <class T>
bool build_sample_index(const int32_t* lengths, int32_t first, const int32_t* documents,
                        int64_t num_documents, int64_t seq_length, int64_t num_samples, T* out);

// For s = 0 .. size - 1: the dataset k with the greatest weights[k] * max(s, 1) - used[k], the
// first of equals, and its next sample.
void build_blend_index(const double* weights, int32_t num_datasets, int64_t size, int16_t* dataset,
                       int64_t* sample);

// The same until every dataset has given sizes[k] samples, among those that have some left; weights
// are the shares of the sizes.
void build_exhaustive_blend_index(const int64_t* sizes, int32_t num_datasets, int16_t* dataset,
                                  int64_t* sample);

}  // namespace trivium
