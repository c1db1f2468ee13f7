// A persistent pool for products of a few microseconds.
//
// The caller posts a job of numbered chunks and works on it itself; workers help if they come in
// time, so a worker that the system has not scheduled delays nobody. Workers watch for the next
// job for kSpinMicroseconds (the gap between two products of a decoding step) and then sleep.
// A fork leaves the child with no pool; its first job makes a new one.
#pragma once

#include <cstdint>

namespace eesd::cpu {

using chunk_fn = void (*)(void* context, int64_t chunk);

// Runs fn(context, c) for every c in [0, chunks), at most 2^31 of them, and returns when all are
// done. Where another thread's job has the pool, or one thread is set, the caller does it alone.
void run_chunks(int64_t chunks, chunk_fn fn, void* context);

int num_threads();
void set_num_threads(int count);

}  // namespace eesd::cpu
