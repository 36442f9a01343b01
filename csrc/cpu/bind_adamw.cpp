// Python's way to AdamW on the CPU: addresses and sizes, trusted as given.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "adamw.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// The factors that the caller holds as tensors come by address; `skip` (one byte, 0 or 1) leaves everything as it is.
template <class T>
void adamw(uintptr_t masters, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t grads, uintptr_t weights, uintptr_t step_size,
           uintptr_t root_correction, uintptr_t grad_scale, uintptr_t skip, double lr_decay, double beta1, double beta2, double eps, int64_t size,
           int threads) {
    if (*at<uint8_t>(skip)) return;
    trivium::AdamW a;
    a.lr_decay = static_cast<float>(lr_decay);
    a.one_minus_beta1 = static_cast<float>(1 - beta1);
    a.beta2 = static_cast<float>(beta2);
    a.one_minus_beta2 = static_cast<float>(1 - beta2);
    a.eps = static_cast<float>(eps);
    a.step_size = *at<float>(step_size);
    a.root_correction = *at<float>(root_correction);
    a.grad_scale = *at<float>(grad_scale);
    trivium::adamw<T>(a, at<float>(masters), at<float>(exp_avg), at<float>(exp_avg_sq), at<float>(grads), at<T>(weights), size, threads);
}

constexpr const char* DOC =
    "(masters, exp_avg, exp_avg_sq, grads, weights, step_size, root_correction, grad_scale, skip, lr_decay, beta1, beta2, eps, size, threads), "
    "the first nine addresses; weights may be 0";

}  // namespace

void bind_adamw(py::module_& m) {
    const auto release = py::call_guard<py::gil_scoped_release>();
    m.def("adamw_fp32", &adamw<float>, release, DOC);
    m.def("adamw_bf16", &adamw<trivium::BFloat16>, release, DOC);
}
