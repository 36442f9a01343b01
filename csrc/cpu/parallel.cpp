// Why not -fopenmp: torch ships its own OpenMP runtime, under a hashed file name in some releases,
// so that a module linked to the system's would start a second pool; the two then spin against each
// other for the same cores. GOMP_parallel is the entry point that GCC's runtime and LLVM's both
// export. Looked up by name when first needed, it is the one in use.
#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace trivium {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

struct Team {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    const std::function<void(int64_t)>* body;
};

void work(void* argument) {
    auto* team = static_cast<Team*>(argument);
    for (int64_t i = team->next++; i < team->tasks; i = team->next++) (*team->body)(i);
}

void run_plain_threads(Team* team, int threads) {
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work, team);
    work(team);
    for (auto& thread : others) thread.join();
}

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
    Team team;
    team.tasks = tasks;
    team.body = &body;
    threads = static_cast<int>(std::min<int64_t>(threads, tasks));
    if (threads <= 1) return work(&team);
    static const auto gomp_parallel =
        reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (gomp_parallel) return gomp_parallel(work, &team, static_cast<unsigned>(threads), 0);
    run_plain_threads(&team, threads);
}

}  // namespace trivium
