// Python's way to the CPU norm: addresses and sizes, trusted as given; the caller owns the memory and checks the shapes.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "rms_norm.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
void forward(uintptr_t x, uintptr_t weight, uintptr_t y, uintptr_t rstd, int64_t rows, int64_t columns, float eps, int threads) {
    trivium::rms_norm_forward<T>(at<T>(x), at<T>(weight), at<T>(y), at<float>(rstd), rows, columns, eps, threads);
}

template <class T>
void backward(uintptr_t dy, uintptr_t x, uintptr_t weight, uintptr_t rstd, uintptr_t dx, uintptr_t dweight, int64_t rows, int64_t columns,
              int threads) {
    trivium::rms_norm_backward<T>(at<T>(dy), at<T>(x), at<T>(weight), at<float>(rstd), at<T>(dx), at<float>(dweight), rows, columns, threads);
}

std::string simd() {
    switch (trivium::isa()) {
        case trivium::Isa::avx512: return "AVX-512";
        case trivium::Isa::avx2: return "AVX2";
        default: return "portable";
    }
}

}  // namespace

void bind_norm(py::module_& m) {
    const auto release = py::call_guard<py::gil_scoped_release>();
    m.def("rms_norm_forward_fp32", &forward<float>, release, "(x, weight, y, rstd, rows, columns, eps, threads), the first four addresses");
    m.def("rms_norm_forward_bf16", &forward<trivium::BFloat16>, release, "As rms_norm_forward_fp32; rstd stays fp32");
    m.def("rms_norm_backward_fp32", &backward<float>, release, "(dy, x, weight, rstd, dx, dweight, rows, columns, threads), the first six addresses");
    m.def("rms_norm_backward_bf16", &backward<trivium::BFloat16>, release, "As rms_norm_backward_fp32; rstd and dweight stay fp32");
    m.def("simd", &simd, "The instruction set in use, for the log");
}
