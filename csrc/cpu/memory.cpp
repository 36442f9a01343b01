#include "memory.h"

#include <cstdlib>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace trivium {

bool keep_freed_memory() {
#if defined(__GLIBC__)
    const bool no_maps = mallopt(M_MMAP_MAX, 0);
    const bool no_trim = mallopt(M_TRIM_THRESHOLD, -1);
    return no_maps && no_trim;
#else
    return false;
#endif
}

}  // namespace trivium
