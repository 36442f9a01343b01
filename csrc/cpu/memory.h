// The C library's memory.
#pragma once

namespace trivium {

// Keeps what is freed, of any size, for the next allocation, where by default large blocks go back
// to the system at once: every large temporary of a training step would then cost a page fault for
// each 4 KiB. False where there is no such setting.
bool keep_freed_memory();

}  // namespace trivium
