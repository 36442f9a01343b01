// Python's way to the CPU kernels: addresses, sizes and strides, trusted as given; the caller owns
// the memory and checks the shapes. Every kernel exists for fp32 and bf16 under one name with that
// suffix; an address of 0 is null.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "activation.h"
#include "adamw.h"
#include "block_step.h"
#include "cross_entropy.h"
#include "few_rows.h"
#include "memory.h"
#include "norm.h"
#include "rope.h"
#include "squared_norm.h"

namespace py = pybind11;
using namespace trivium;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
void bind_norm_kernels(py::module_& m, const std::string& suffix,
                       const py::call_guard<py::gil_scoped_release>& release) {
    m.def(("norm_forward" + suffix).c_str(),
          [](bool centred, uintptr_t x, uintptr_t branch, uintptr_t weight, uintptr_t bias,
             uintptr_t sum, uintptr_t y, uintptr_t mean, uintptr_t rstd, int64_t rows,
             int64_t columns, float eps, int threads) {
              norm_forward<T>(centred ? NormKind::layer : NormKind::rms,
                              {at<T>(x), at<T>(branch), at<T>(weight), at<T>(bias), at<T>(sum),
                               at<T>(y), at<float>(mean), at<float>(rstd), rows, columns, eps},
                              threads);
          },
          release);
    m.def(("norm_backward" + suffix).c_str(),
          [](bool centred, uintptr_t dy, uintptr_t x, uintptr_t weight, uintptr_t mean,
             uintptr_t rstd, uintptr_t dsum, uintptr_t dx, uintptr_t dweight, uintptr_t dbias,
             int64_t rows, int64_t columns, int threads) {
              norm_backward<T>(
                  centred ? NormKind::layer : NormKind::rms,
                  {at<T>(dy), at<T>(x), at<T>(weight), at<float>(mean), at<float>(rstd),
                   at<T>(dsum), at<T>(dx), at<float>(dweight), at<float>(dbias), rows, columns},
                  threads);
          },
          release);
}

template <class T>
void bind_activation_kernels(py::module_& m, const std::string& suffix,
                             const py::call_guard<py::gil_scoped_release>& release) {
    m.def(("activation_forward" + suffix).c_str(),
          [](ActivationKind kind, uintptr_t x, uintptr_t y, int64_t size, int threads) {
              activation_forward<T>(kind, at<T>(x), at<T>(y), size, threads);
          },
          release);
    m.def(("activation_backward" + suffix).c_str(),
          [](ActivationKind kind, uintptr_t dy, uintptr_t x, uintptr_t dx, int64_t size,
             int threads) {
              activation_backward<T>(kind, at<T>(dy), at<T>(x), at<T>(dx), size, threads);
          },
          release);
    m.def(("gated_forward" + suffix).c_str(),
          [](ActivationKind kind, uintptr_t x, uintptr_t y, int64_t rows, int64_t columns,
             int threads) { gated_forward<T>(kind, at<T>(x), at<T>(y), rows, columns, threads); },
          release);
    m.def(("gated_backward" + suffix).c_str(),
          [](ActivationKind kind, uintptr_t dy, uintptr_t x, uintptr_t dx, int64_t rows,
             int64_t columns, int threads) {
              gated_backward<T>(kind, at<T>(dy), at<T>(x), at<T>(dx), rows, columns, threads);
          },
          release);
}

using Strides = std::array<int64_t, 3>;  // of samples, tokens and heads

template <class T>
void bind_rope(py::module_& m, const std::string& suffix,
               const py::call_guard<py::gil_scoped_release>& release) {
    m.def(
        ("rope" + suffix).c_str(),
        [](uintptr_t x, const Strides& from, uintptr_t y, const Strides& to, uintptr_t cos,
           uintptr_t sin, int64_t angles_of_sample, int64_t half, bool interleaved, float direction,
           int64_t batch, int64_t tokens, int64_t heads, int64_t size, int threads) {
            rope<T>(
                {at<float>(cos), at<float>(sin), angles_of_sample, half, interleaved, direction},
                {at<T>(x), from[0], from[1], from[2]}, {at<T>(y), to[0], to[1], to[2]}, batch,
                tokens, heads, size, threads);
        },
        release);
}

template <class T>
void bind_cross_entropy(py::module_& m, const std::string& suffix,
                        const py::call_guard<py::gil_scoped_release>& release) {
    m.def(("cross_entropy_statistics" + suffix).c_str(),
          [](uintptr_t logits, uintptr_t column, uintptr_t highest, uintptr_t rest,
             uintptr_t target, int64_t rows, int64_t columns, int64_t stride, int threads) {
              cross_entropy_statistics<T>(
                  {at<T>(logits), at<int64_t>(column), rows, columns, columns, stride},
                  at<float>(highest), at<float>(rest), at<float>(target), threads);
          },
          release);
    m.def(("cross_entropy_gradient" + suffix).c_str(),
          [](uintptr_t logits, uintptr_t column, uintptr_t highest, uintptr_t scale,
             uintptr_t target_gradient, int64_t rows, int64_t columns, int64_t padded,
             int64_t stride, int threads) {
              cross_entropy_gradient<T>(
                  {at<T>(logits), at<int64_t>(column), rows, columns, padded, stride},
                  at<float>(highest), at<float>(scale), at<float>(target_gradient), threads);
          },
          release);
}

template <class T>
void bind_few_rows(py::module_& m, const std::string& suffix,
                   const py::call_guard<py::gil_scoped_release>& release) {
    m.def(("few_rows_product" + suffix).c_str(),
          [](uintptr_t x, uintptr_t w, uintptr_t y, int64_t rows, int64_t outputs, int64_t inputs,
             int threads) {
              few_rows_product<T>(at<T>(x), at<T>(w), at<T>(y), rows, outputs, inputs, threads);
          },
          release);
}

// addresses: weight and bias of every norm and layer of the block, in the order of BlockWeights.
template <class T>
BlockWeights<T> weights_at(const std::array<uintptr_t, 20>& a) {
    BlockWeights<T> w;
    auto address = a.begin();
    for (Affine<T>* const affine :
         {&w.attention_norm, &w.qkv, &w.q_norm, &w.k_norm, &w.out, &w.attention_post_norm,
          &w.mlp_norm, &w.up, &w.down, &w.mlp_post_norm}) {
        affine->weight = at<T>(*address++);
        affine->bias = at<T>(*address++);
    }
    return w;
}

template <class T>
void bind_block_step(py::module_& m, const std::string& suffix,
                     const py::call_guard<py::gil_scoped_release>& release) {
    m.def(("block_step" + suffix).c_str(),
          [](const Block& block, const std::array<uintptr_t, 20>& addresses, uintptr_t cos,
             uintptr_t sin, int64_t half, uintptr_t keys, uintptr_t values, int64_t capacity,
             int64_t length, uintptr_t x, uintptr_t y, int64_t rows, int threads) {
              block_step<T>(block, weights_at<T>(addresses), {at<float>(cos), at<float>(sin), half},
                            {at<T>(keys), at<T>(values), capacity, length}, at<T>(x), at<T>(y),
                            rows, threads);
          },
          release);
}

// The factors that the caller holds as tensors come by address; `skip` (one byte, 0 or 1) leaves
// everything as it is.
template <class T>
void bind_adamw(py::module_& m, const std::string& suffix,
                const py::call_guard<py::gil_scoped_release>& release) {
    m.def(("adamw" + suffix).c_str(),
          [](uintptr_t masters, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t grads,
             uintptr_t weights, uintptr_t step_size, uintptr_t root_correction,
             uintptr_t grad_scale, uintptr_t skip, double lr_decay, double beta1, double beta2,
             double eps, int64_t size, int threads) {
              if (*at<uint8_t>(skip)) return;
              AdamW a;
              a.lr_decay = static_cast<float>(lr_decay);
              a.one_minus_beta1 = static_cast<float>(1 - beta1);
              a.beta2 = static_cast<float>(beta2);
              a.one_minus_beta2 = static_cast<float>(1 - beta2);
              a.eps = static_cast<float>(eps);
              a.step_size = *at<float>(step_size);
              a.root_correction = *at<float>(root_correction);
              a.grad_scale = *at<float>(grad_scale);
              adamw<T>(a, at<float>(masters), at<float>(exp_avg), at<float>(exp_avg_sq),
                       at<float>(grads), at<T>(weights), size, threads);
          },
          release);
}

template <class T>
void bind_all(py::module_& m, const std::string& suffix) {
    const py::call_guard<py::gil_scoped_release> release;
    bind_norm_kernels<T>(m, suffix, release);
    bind_activation_kernels<T>(m, suffix, release);
    bind_rope<T>(m, suffix, release);
    bind_cross_entropy<T>(m, suffix, release);
    bind_few_rows<T>(m, suffix, release);
    bind_block_step<T>(m, suffix, release);
    bind_adamw<T>(m, suffix, release);
}

std::string simd() {
    switch (isa()) {
        case Isa::avx512: return "AVX-512";
        case Isa::avx2: return "AVX2";
        default: return "portable";
    }
}

}  // namespace

void bind_kernels(py::module_& m) {
    py::enum_<ActivationKind>(m, "Activation")
        .value("silu", ActivationKind::silu)
        .value("gelu_tanh", ActivationKind::gelu_tanh)
        .value("gelu_erf", ActivationKind::gelu_erf)
        .value("squared_relu", ActivationKind::squared_relu);
    py::class_<Block>(m, "Block")
        .def(py::init([](int64_t hidden, int64_t ffn, int64_t heads, int64_t kv_heads, int64_t size,
                         int64_t window, float scale, float softcap, float eps, bool interleaved,
                         bool norm_of_projection, bool gated, bool parallel_residual,
                         ActivationKind activation) {
                 return Block{hidden,
                              ffn,
                              heads,
                              kv_heads,
                              size,
                              window,
                              scale,
                              softcap,
                              eps,
                              interleaved,
                              norm_of_projection,
                              gated,
                              parallel_residual,
                              activation};
             }),
             py::kw_only(), py::arg("hidden"), py::arg("ffn"), py::arg("heads"),
             py::arg("kv_heads"), py::arg("size"), py::arg("window"), py::arg("scale"),
             py::arg("softcap"), py::arg("eps"), py::arg("interleaved"),
             py::arg("norm_of_projection"), py::arg("gated"), py::arg("parallel_residual"),
             py::arg("activation"));
    bind_all<float>(m, "_fp32");
    bind_all<BFloat16>(m, "_bf16");
    m.def(
        "squared_norm",
        [](uintptr_t x, int64_t size, int threads) {
            return squared_norm(at<float>(x), size, threads);
        },
        py::call_guard<py::gil_scoped_release>());
    m.def("keep_freed_memory", &keep_freed_memory);
    m.def("simd", &simd, "The instruction set in use, for the log");
}
