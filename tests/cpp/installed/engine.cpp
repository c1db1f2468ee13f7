// The controller of a C++ engine, on the CPU and, where there is one, on the GPU: rounds of plan
// and update, then the calibrated rule's steps. No Python, no torch. Prints what it ran; 0 where
// every result is as promised, and the GPU's bits are the CPU's.
#include <eesd/eesd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#if defined(EESD_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what);
}

constexpr int64_t kBuckets = 5, kDraws = 20000;

struct sizes {
  int64_t batch, costs;
};
// One draft step, a usual batch, and more rows and lengths than a block of threads or a tile holds.
constexpr sizes kSizes[] = {{1, 2}, {67, 9}, {300, 70}};

struct host_memory {
  static constexpr bool device = false;
  template <class T>
  T* put(std::vector<T>& v) {
    return v.data();
  }
  void fetch() {}
};

#if defined(EESD_WITH_CUDA)
// Copies of the vectors on the device; fetch() brings all of them back.
struct device_memory {
  static constexpr bool device = true;
  struct block {
    void* host;
    void* there;
    size_t bytes;
  };
  std::vector<block> blocks;
  template <class T>
  T* put(std::vector<T>& v) {
    block b{v.data(), nullptr, v.size() * sizeof(T)};
    expect(cudaMalloc(&b.there, b.bytes) == cudaSuccess, "cudaMalloc");
    expect(cudaMemcpy(b.there, b.host, b.bytes, cudaMemcpyHostToDevice) == cudaSuccess,
           "to device");
    blocks.push_back(b);
    return static_cast<T*>(b.there);
  }
  void fetch() {
    expect(cudaDeviceSynchronize() == cudaSuccess, "the kernels ran");
    for (const block& b : blocks) {
      expect(cudaMemcpy(b.host, b.there, b.bytes, cudaMemcpyDeviceToHost) == cudaSuccess, "back");
    }
  }
  ~device_memory() {
    for (const block& b : blocks) cudaFree(b.there);
  }
};
#endif

#if defined(EESD_WITH_CUDA)
#define EESD_BOTH(op) eesd_##op##_cpu, eesd_##op##_cuda
#else
#define EESD_BOTH(op) eesd_##op##_cpu, nullptr
#endif

// All inputs and results of a run, in host memory when it has ended.
struct run {
  int64_t batch, drafts;
  std::vector<float> alpha, beta, prior_alpha, prior_beta, costs, top_prob, state, drawn, credit;
  std::vector<int64_t> seed, draw_seed;
  std::vector<int32_t> cap, position, draw_position, accepted, lengths, length, bucket, looking;
  std::vector<uint32_t> words;

  explicit run(const sizes& n)
      : batch(n.batch),
        drafts(n.costs - 1),
        prior_alpha(batch * kBuckets, 2.0f),
        prior_beta(batch * kBuckets, 1.0f),
        state(batch * 3),
        drawn(kDraws),
        credit(batch, 2.56f),
        draw_seed(kDraws, 11),
        draw_position(kDraws),
        length(batch),
        bucket(batch * drafts),
        looking(batch),
        words(batch * drafts) {
    alpha = prior_alpha;
    beta = prior_beta;
    for (int i = 0; i < kDraws; ++i) draw_position[i] = i;
    for (int l = 0; l <= drafts; ++l) costs.push_back(1.0f + 0.11f * static_cast<float>(l));
    for (int b = 0; b < batch; ++b) {
      seed.push_back(b * 1000003LL - 5);
      cap.push_back(static_cast<int32_t>((b + 2) % (drafts + 2) - 1));
      position.push_back(17 * b);
      accepted.push_back(b % 4);
      top_prob.push_back(static_cast<float>(b % 9) / 8.0f);
    }
  }
};

template <class Memory>
run go(const sizes& n) {
  run r(n);
  Memory memory;
  const auto call = [](auto on_cpu, [[maybe_unused]] auto on_cuda, const auto& params) {
    eesd_status status = EESD_OK;
    if constexpr (Memory::device) {
      status = on_cuda(&params, nullptr);
    } else {
      status = on_cpu(&params);
    }
    expect(status == EESD_OK, eesd_status_string(status));
  };
  float *alpha = memory.put(r.alpha), *beta = memory.put(r.beta);
  float *prior_alpha = memory.put(r.prior_alpha), *prior_beta = memory.put(r.prior_beta);
  const float *costs = memory.put(r.costs), *top_prob = memory.put(r.top_prob);
  const int64_t* seed = memory.put(r.seed);
  const int32_t *cap = memory.put(r.cap), *position = memory.put(r.position);
  const int32_t* accepted = memory.put(r.accepted);
  int32_t *length = memory.put(r.length), *bucket = memory.put(r.bucket);
  int32_t* looking = memory.put(r.looking);
  float *state = memory.put(r.state), *credit = memory.put(r.credit);
  uint32_t* words = memory.put(r.words);

  eesd_philox_words_params noise{};
  noise.seed = seed;
  noise.position = position;
  noise.base = position;
  noise.purpose = eesd::PHILOX_TARGET;
  noise.rows = r.batch;
  noise.n = r.drafts;
  noise.out = words;
  call(EESD_BOTH(philox_words), noise);

  std::vector<float> two(kDraws, 2.0f), five(kDraws, 5.0f);
  eesd_sample_beta_params draw{};
  draw.alpha = memory.put(two);
  draw.beta = memory.put(five);
  draw.seed = memory.put(r.draw_seed);
  draw.position = memory.put(r.draw_position);
  draw.n = kDraws;
  draw.buckets = 1;
  draw.out = memory.put(r.drawn);
  call(EESD_BOTH(sample_beta), draw);

  // Plan by cost and update, round after round; then one round of the calibrated rule.
  eesd_thompson_draft_length_params plan{};
  plan.alpha = alpha;
  plan.beta = beta;
  plan.cap = cap;
  plan.costs = costs;
  plan.seed = seed;
  plan.position = position;
  plan.batch = r.batch;
  plan.buckets = 1;
  plan.num_costs = n.costs;
  plan.length = length;
  plan.credit = credit;
  eesd_thompson_update_params update{};
  update.alpha = alpha;
  update.beta = beta;
  update.prior_alpha = prior_alpha;
  update.prior_beta = prior_beta;
  update.drafted = length;
  update.accepted = accepted;
  update.batch = r.batch;
  update.buckets = 1;
  update.discount = 0.98f;
  update.credit = credit;
  update.token_credit = 1.01;
  update.credit_limit = 20.0;
  for (const eesd_rule rule : {EESD_RULE_COST, EESD_RULE_BERNOULLI, EESD_RULE_CONSTANT}) {
    plan.rule = rule;
    call(EESD_BOTH(thompson_draft_length), plan);
    call(EESD_BOTH(thompson_update), update);
  }

  eesd_thompson_look_params look{};
  look.alpha = alpha;
  look.beta = beta;
  look.cap = cap;
  look.costs = costs;
  look.exit_cost = 0.03;
  look.seed = seed;
  look.position = position;
  look.top_prob = top_prob;
  look.batch = r.batch;
  look.buckets = kBuckets;
  look.num_costs = n.costs;
  look.length = length;
  look.bucket = bucket;
  look.run = state;
  look.looking = looking;
  look.credit = credit;
  for (look.step = 0; look.step <= r.drafts; ++look.step) call(EESD_BOTH(thompson_look), look);
  update.bucket = bucket;
  update.buckets = kBuckets;
  update.max_draft = r.drafts;
  call(EESD_BOTH(thompson_update), update);
  memory.fetch();
  return r;
}

template <class T>
[[maybe_unused]] bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

void check(const run& r) {
  double sum = 0.0;
  for (const float x : r.drawn) {
    expect(x > 0.0f && x < 1.0f, "a draw inside (0, 1)");
    sum += x;
  }
  // Beta(2, 5): mean 2/7, standard deviation 0.16; five standard errors.
  expect(sum / kDraws > 2.0 / 7 - 0.006 && sum / kDraws < 2.0 / 7 + 0.006, "mean of Beta(2, 5)");
  int32_t longest = 0;
  for (int b = 0; b < r.batch; ++b) {
    expect(r.length[b] >= 0 && r.length[b] <= (r.cap[b] > 0 ? r.cap[b] : 0), "length within cap");
    expect(r.cap[b] < 0 || r.credit[b] != 2.56f, "a round is paid for");
    longest = r.length[b] > longest ? r.length[b] : longest;
    for (int i = 0; i < r.drafts; ++i) {
      const int32_t j = r.bucket[b * r.drafts + i];
      expect(i < r.length[b] ? j >= 0 && j < kBuckets : j == -1, "a bucket for each draft token");
    }
  }
  expect(longest > 0, "somebody drafts");
}

bool gpu_is_there() {
#if defined(EESD_WITH_CUDA)
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
#else
  return false;
#endif
}

}  // namespace

int main() {
  const bool gpu_there = gpu_is_there();
  for (const sizes& n : kSizes) {
    const run cpu = go<host_memory>(n);
    check(cpu);
    if (!gpu_there) continue;
#if defined(EESD_WITH_CUDA)
    const run gpu = go<device_memory>(n);
    expect(same(cpu.words, gpu.words), "words: GPU and CPU have the same bits");
    expect(same(cpu.drawn, gpu.drawn), "draws: GPU and CPU have the same bits");
    expect(same(cpu.alpha, gpu.alpha) && same(cpu.beta, gpu.beta), "posteriors have the same bits");
    expect(same(cpu.length, gpu.length) && same(cpu.bucket, gpu.bucket), "lengths are equal");
    expect(same(cpu.state, gpu.state) && same(cpu.looking, gpu.looking), "states are equal");
    expect(same(cpu.credit, gpu.credit), "credits have the same bits");
#endif
  }
  eesd_thompson_draft_length_params empty{};
  expect(eesd_thompson_draft_length_cpu(&empty) == EESD_ERROR_SIZE, "no costs is refused");
  expect(eesd_thompson_draft_length_cpu(nullptr) == EESD_ERROR_NULL_POINTER, "null is refused");
#if defined(EESD_WITH_CUDA)
  const char* gpu_result = gpu_there ? "same bits" : "no device";
#else
  const char* gpu_result = "built without";
#endif
  std::printf("eesd %s, cpu %s, cuda: %s: %s\n", eesd_version(), eesd_cpu_isa(), gpu_result,
              failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}
