// The library used as a C++ engine would use it: no Python, no torch, raw pointers.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "eesd/eesd.h"

namespace {

int failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what);
}

// Known answers of Random123 (kat_vectors, philox4x32 with 10 rounds).
void philox_known_answers() {
  struct {
    uint32_t counter[4], key[2], want[4];
  } const cases[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& c : cases) {
    const eesd::philox_words w = eesd::philox4x32_10(c.key[0], c.key[1], c.counter[0], c.counter[1],
                                                     c.counter[2], c.counter[3]);
    expect(w.x == c.want[0] && w.y == c.want[1] && w.z == c.want[2] && w.w == c.want[3],
           "philox known answer");
  }
}

void uniforms() {
  expect(eesd::philox_uniform24(0) == 0.0f, "uniform24 starts at 0");
  expect(eesd::philox_uniform24(~0u) < 1.0f, "uniform24 stays below 1");
  expect(eesd::philox_race_uniform(0) > 0.0f, "race uniform is above 0");
  expect(eesd::philox_race_uniform(~0u) == 1.0f - 0x1p-24f, "race uniform is clamped");
  for (uint32_t x = 1; x < 0xF0000000u; x = x * 3 + 1) {
    const float want = static_cast<float>((static_cast<double>(x) + 0.5) * 0x1p-32);
    expect(eesd::philox_uniform32(x) == want, "uniform32 is rounded once");
  }
}

void philox_bulk() {
  const int64_t seed = -12345678901;
  const int32_t position = 17, base = -3, parent = 5;
  constexpr int n = 517;
  std::vector<uint32_t> bulk(n), one(n);
  std::vector<int32_t> ids(n);
  for (int i = 0; i < n; ++i) ids[i] = i;
  eesd_philox_words_params p{};
  p.seed = &seed;
  p.position = &position;
  p.base = &base;
  p.parent = &parent;
  p.purpose = eesd::philox_purpose_word(eesd::PHILOX_DRAFT, 2);
  p.rows = 1;
  p.n = n;
  p.out = bulk.data();
  expect(eesd_philox_words_cpu(&p) == EESD_OK, "philox_words");
  p.ids = ids.data();
  p.out = one.data();
  expect(eesd_philox_words_cpu(&p) == EESD_OK, "philox_words with ids");
  expect(bulk == one, "the bulk path equals the path by id");
}

// The vector path gives the very bits of the function a CUDA thread would run.
void beta_samples() {
  const float shapes[] = {0.01f, 0.05f, 0.5f, 1.0f, 2.0f, 50.0f, 1e4f, 1e30f, 3e38f, 1e-38f};
  constexpr int buckets = 10;
  for (const float alpha : shapes) {
    std::vector<float> a(300, alpha), b, out(300);
    std::vector<int64_t> seed(30, 7);
    std::vector<int32_t> position(30), status(300, -1);
    for (int i = 0; i < 300; ++i) b.push_back(shapes[i % buckets]);
    for (int i = 0; i < 30; ++i) position[i] = i - 3;
    eesd_sample_beta_params p{a.data(), b.data(), seed.data(), position.data(),
                              300,      buckets,  out.data(),  status.data()};
    expect(eesd_sample_beta_cpu(&p) == EESD_OK, "sample_beta");
    for (int i = 0; i < 300; ++i) {
      const float want =
          eesd::sample_beta_one(a[i], b[i], 7, static_cast<uint32_t>(position[i / buckets]),
                                static_cast<uint32_t>(i % buckets));
      expect(out[i] > 0.0f && out[i] < 1.0f && status[i] == 0, "beta sample inside (0, 1)");
      expect(std::memcmp(&out[i], &want, 4) == 0, "beta sample equals the scalar function");
    }
  }
}

void run_linear(const std::vector<float>& x, const std::vector<float>& weight, int64_t rows,
                int64_t in, int64_t out_features, float* out) {
  eesd_linear_params p{};
  p.x = x.data();
  p.weight = weight.data();
  p.weight_dtype = EESD_FLOAT32;
  p.out = out;
  p.rows = rows;
  p.in_features = in;
  p.out_features = out_features;
  expect(eesd_linear_cpu(&p) == EESD_OK, "linear");
}

void linear_rows() {
  constexpr int64_t rows = 21, in = 301, outs = 259;
  std::vector<float> x(rows * in), weight(outs * in), all(rows * outs), one(outs);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i));
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = std::cos(static_cast<float>(3 * i));
  expect(eesd_set_num_threads(0) == EESD_ERROR_SIZE, "no threads is refused");
  for (const int threads : {1, 2, 5}) {
    eesd_set_num_threads(threads);
    run_linear(x, weight, rows, in, outs, all.data());
    for (int64_t r = 0; r < rows; ++r) {
      const std::vector<float> row(x.begin() + r * in, x.begin() + (r + 1) * in);
      run_linear(row, weight, 1, in, outs, one.data());
      expect(std::memcmp(one.data(), &all[r * outs], outs * sizeof(float)) == 0,
             "a row's bits do not depend on its batch");
      double want = 0;
      for (int64_t k = 0; k < in; ++k) want += static_cast<double>(row[k]) * weight[k];
      expect(std::fabs(want - one[0]) < 1e-4, "linear value");
    }
  }
  // A forked child has no workers of its own yet; its products must neither hang nor differ.
  const pid_t child = fork();
  if (child == 0) {
    std::vector<float> again(all.size());
    for (int i = 0; i < 50; ++i) run_linear(x, weight, rows, in, outs, again.data());
    _exit(std::memcmp(again.data(), all.data(), all.size() * sizeof(float)) == 0 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "linear after fork");
}

void refusals() {
  eesd_linear_params p{};
  expect(eesd_linear_cpu(nullptr) == EESD_ERROR_NULL_POINTER, "null params");
  p.rows = p.in_features = p.out_features = 4;
  expect(eesd_linear_cpu(&p) == EESD_ERROR_NULL_POINTER, "null pointers");
  p.x_stride = 3;
  expect(eesd_linear_cpu(&p) == EESD_ERROR_STRIDE, "stride below the row");
  p.rows = -1;
  expect(eesd_linear_cpu(&p) == EESD_ERROR_SIZE, "negative size");
  expect(std::strlen(eesd_status_string(EESD_ERROR_STRIDE)) > 0, "status string");
}

}  // namespace

int main() {
  philox_known_answers();
  uniforms();
  philox_bulk();
  beta_samples();
  linear_rows();
  refusals();
  std::printf("eesd %s, %s: %s\n", eesd_version(), eesd_cpu_isa(), failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}
