// Python's way to the index builder: numpy arrays in, new numpy arrays out.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <numeric>
#include <stdexcept>

#include "index.h"

namespace py = pybind11;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
Array<T> sample_index(const Array<int32_t>& lengths, int32_t first, const Array<int32_t>& documents,
                      int64_t seq_length, int64_t num_samples) {
    Array<T> out({num_samples + 1, int64_t{2}});
    const int32_t *length = lengths.data(), *document = documents.data();
    T* target = out.mutable_data();
    const int64_t num_documents = documents.size();
    bool complete;
    {
        py::gil_scoped_release release;
        complete = trivium::build_sample_index<T>(length, first, document, num_documents,
                                                  seq_length, num_samples, target);
    }
    if (!complete)
        throw std::invalid_argument(
            "the documents hold fewer tokens than num_samples * seq_length + 1");
    return out;
}

py::tuple blend_index(const Array<double>& weights, int64_t size) {
    Array<int16_t> dataset(size);
    Array<int64_t> sample(size);
    const double* weight = weights.data();
    const auto num_datasets = static_cast<int32_t>(weights.size());
    int16_t* datasets = dataset.mutable_data();
    int64_t* samples = sample.mutable_data();
    {
        py::gil_scoped_release release;
        trivium::build_blend_index(weight, num_datasets, size, datasets, samples);
    }
    return py::make_tuple(dataset, sample);
}

py::tuple exhaustive_blend_index(const Array<int64_t>& sizes) {
    const int64_t* size = sizes.data();
    const auto num_datasets = static_cast<int32_t>(sizes.size());
    const int64_t total = std::accumulate(size, size + num_datasets, int64_t{0});
    Array<int16_t> dataset(total);
    Array<int64_t> sample(total);
    int16_t* datasets = dataset.mutable_data();
    int64_t* samples = sample.mutable_data();
    {
        py::gil_scoped_release release;
        trivium::build_exhaustive_blend_index(size, num_datasets, datasets, samples);
    }
    return py::make_tuple(dataset, sample);
}

}  // namespace

void bind_index(py::module_& m) {
    m.def("sample_index_int32", &sample_index<int32_t>,
          "(lengths, first, documents, seq_length, num_samples) -> [num_samples + 1, 2]");
    m.def("sample_index_int64", &sample_index<int64_t>,
          "As sample_index_int32, for positions or offsets above 2^31 - 1");
    m.def("blend_index", &blend_index,
          "(weights, size) -> (dataset [size] int16, sample [size] int64)");
    m.def("exhaustive_blend_index", &exhaustive_blend_index,
          "(sizes) -> (dataset [sum] int16, sample [sum] int64)");
}
