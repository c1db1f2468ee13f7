#include "cpu/thread_pool.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "eesd/threads.h"

namespace eesd::cpu {
namespace {

constexpr int kMaxThreads = 64;
constexpr int kSpinMicroseconds = 60;
constexpr int kWaitPauses = 4096;  // about 70 microseconds: many times a chunk
constexpr int kLeastJobsAlone = 64;
constexpr int kMostJobsAlone = 16384;  // a few tenths of a second of decoding
constexpr int kCleanJobs = 16;         // that buy back one job of the next time alone
constexpr uint64_t kLeftMask = 0xFFFFFFFFu;

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int default_threads() {
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {
    const int count = std::atoi(text);
    if (count >= 1) return count < kMaxThreads ? count : kMaxThreads;
  }
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t allowed;  // taskset and containers allow fewer than there are
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) count = CPU_COUNT(&allowed);
#endif
  return count < 1 ? 1 : (count < kMaxThreads ? count : kMaxThreads);
}

std::atomic<int>& thread_setting() {
  static std::atomic<int> setting{default_threads()};
  return setting;
}

class Pool {
 public:
  void run(int64_t chunks, chunk_fn fn, void* context, int threads) {
    const bool taken = busy_.exchange(true, std::memory_order_acquire);
    if (taken || jobs_alone_ > 0) {
      if (!taken) {
        --jobs_alone_;
        busy_.store(false, std::memory_order_release);
      }
      for (int64_t c = 0; c < chunks; ++c) fn(context, c);
      return;
    }
    start_workers(threads - 1);
    fn_ = fn;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    active_.store(threads - 1, std::memory_order_relaxed);
    const uint64_t epoch = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    ticket_.store((epoch << 32) | static_cast<uint64_t>(chunks), std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
    work();
    int pauses = 0;
    for (; done_.load(std::memory_order_acquire) != chunks; ++pauses) {
      if (pauses < kWaitPauses) {
        pause_cpu();
      } else {
        std::this_thread::yield();
      }
    }
    // A long wait means that a worker was descheduled inside its chunk: other programs want the
    // cores. Stay alone for a while, twice as long each time it happens again.
    if (pauses >= kWaitPauses) {
      jobs_alone_ = next_alone_;
      next_alone_ = next_alone_ < kMostJobsAlone ? 2 * next_alone_ : kMostJobsAlone;
    } else if (++clean_jobs_ % kCleanJobs == 0 && next_alone_ > kLeastJobsAlone) {
      --next_alone_;
    }
    busy_.store(false, std::memory_order_release);
  }

 private:
  // Takes chunks until none is left. The ticket is (job number, chunks left): a successful exchange
  // proves that the job is still the one whose fn_ and context_ are read after it, since a job ends
  // only when each of its chunks is done.
  void work() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (ticket & kLeftMask) {
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acquire)) continue;
      fn_(context_, static_cast<int64_t>((ticket & kLeftMask) - 1));
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  bool has_work(int id) const {
    return (ticket_.load(std::memory_order_seq_cst) & kLeftMask) != 0 &&
           id < active_.load(std::memory_order_relaxed);
  }

  void worker(int id) {
    using clock = std::chrono::steady_clock;
    for (;;) {
      const auto limit = clock::now() + std::chrono::microseconds(kSpinMicroseconds);
      bool found = has_work(id);
      while (!found && clock::now() < limit) {
        for (int i = 0; i < 32 && !found; ++i) {
          pause_cpu();
          found = has_work(id);
        }
      }
      if (!found) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return has_work(id); });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      work();
    }
  }

  void start_workers(int wanted) {
    while (started_ < wanted) {
      try {
        std::thread(&Pool::worker, this, started_).detach();
      } catch (const std::system_error&) {
        return;  // no more threads to be had: the caller does what the missing ones would
      }
      ++started_;
    }
  }

  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> busy_{false};
  std::atomic<int> sleepers_{0};
  std::atomic<int> active_{0};
  chunk_fn fn_ = nullptr;
  void* context_ = nullptr;
  int started_ = 0;  // this and the next three: guarded by busy_
  unsigned clean_jobs_ = 0;
  int jobs_alone_ = 0;
  int next_alone_ = kLeastJobsAlone;
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Never freed: workers may outlive static destructors, and a forked child's copy of a pool has
// no workers and locks in an unknown state.
std::atomic<Pool*> current_pool{nullptr};

Pool* pool() {
  Pool* found = current_pool.load(std::memory_order_acquire);
  if (found) return found;
  static std::once_flag fork_handler;
  std::call_once(fork_handler, [] {
    pthread_atfork(nullptr, nullptr,
                   [] { current_pool.store(nullptr, std::memory_order_release); });
  });
  Pool* fresh = new (std::nothrow) Pool;
  if (!fresh) return nullptr;
  if (current_pool.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return fresh;
  delete fresh;
  return found;
}

}  // namespace

int num_threads() { return thread_setting().load(std::memory_order_relaxed); }

void set_num_threads(int count) {
  thread_setting().store(count < kMaxThreads ? count : kMaxThreads, std::memory_order_relaxed);
}

void run_chunks(int64_t chunks, chunk_fn fn, void* context) {
  const int threads = num_threads();
  Pool* shared = threads > 1 && chunks > 1 ? pool() : nullptr;
  if (shared) {
    shared->run(chunks, fn, context, threads);
    return;
  }
  for (int64_t c = 0; c < chunks; ++c) fn(context, c);
}

}  // namespace eesd::cpu

eesd_status eesd_set_num_threads(int count) {
  if (count < 1) return EESD_ERROR_SIZE;
  eesd::cpu::set_num_threads(count);
  return EESD_OK;
}

int eesd_get_num_threads(void) { return eesd::cpu::num_threads(); }
