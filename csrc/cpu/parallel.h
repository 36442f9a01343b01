// Threads for the CPU kernels: the OpenMP runtime the process already has, or plain threads where
// it has none.
#pragma once
#include <cstdint>
#include <functional>

namespace trivium {

// Calls body(i) once for every i in [0, tasks), on at most `threads` threads, the caller's among
// them. Tasks are handed out in order; a body must not depend on which thread runs it, and must not
// throw.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body);

}  // namespace trivium
