// The native module `trivium._native`: numpy arrays and raw addresses in, plain functions below.
// Nothing here knows torch.
#include <pybind11/pybind11.h>

void bind_kernels(pybind11::module_& m);
void bind_index(pybind11::module_& m);

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native code of Trivium: index builder and CPU kernels.";
    bind_kernels(m);
    bind_index(m);
}
