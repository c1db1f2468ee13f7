// eesd_kernels._C: the library over integer addresses (`tensor.data_ptr()`), so that it needs
// neither torch's headers nor its ABI. Checks shapes and dtypes nowhere: its callers do.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "eesd/eesd.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(eesd_status status, const char* what) {
  if (status == EESD_OK) return;
  const std::string message = std::string(what) + ": " + eesd_status_string(status);
  if (status == EESD_ERROR_OUT_OF_MEMORY || status == EESD_ERROR_CUDA) {
    throw std::runtime_error(message);
  }
  throw py::value_error(message);
}

// Handing the GIL over costs about as much as a few thousand operations.
template <class Params>
void call(eesd_status (*function)(const Params*), const Params& params, bool release,
          const char* what) {
  eesd_status status;
  {
    std::optional<py::gil_scoped_release> released;
    if (release) released.emplace();
    status = function(&params);
  }
  check(status, what);
}

#if defined(EESD_WITH_CUDA)
#define EESD_CUDA(function) function
constexpr bool kWithCuda = true;
#else
#define EESD_CUDA(function) nullptr
constexpr bool kWithCuda = false;
#endif

// stream None: host pointers. Else the address of a cudaStream_t of the current device.
template <class Params>
void call_on(std::optional<uintptr_t> stream, eesd_status (*on_cpu)(const Params*),
             std::common_type_t<eesd_status (*)(const Params*, void*)> on_cuda,
             const Params& params, bool release, const char* what) {
  if (!stream) return call(on_cpu, params, release, what);
  if (!on_cuda) throw py::value_error(std::string(what) + ": stream: built without CUDA");
  check(on_cuda(&params, pointer<void>(*stream)), what);
}

void philox_words(uintptr_t seed, uintptr_t position, uintptr_t base, uint32_t purpose,
                  int64_t rows, int64_t n, uintptr_t out, uintptr_t ids, uintptr_t parent,
                  std::optional<uintptr_t> stream) {
  eesd_philox_words_params p{};
  p.seed = pointer<const int64_t>(seed);
  p.position = pointer<const int32_t>(position);
  p.base = pointer<const int32_t>(base);
  p.ids = pointer<const int32_t>(ids);
  p.parent = pointer<const int32_t>(parent);
  p.purpose = purpose;
  p.rows = rows;
  p.n = n;
  p.out = pointer<uint32_t>(out);
  call_on(stream, eesd_philox_words_cpu, EESD_CUDA(eesd_philox_words_cuda), p,
          n > 4096 || rows > 4096, "philox_words");
}

void sample_beta(uintptr_t alpha, uintptr_t beta, uintptr_t seed, uintptr_t position, int64_t n,
                 int64_t buckets, uintptr_t out, uintptr_t status,
                 std::optional<uintptr_t> stream) {
  eesd_sample_beta_params p{};
  p.alpha = pointer<const float>(alpha);
  p.beta = pointer<const float>(beta);
  p.seed = pointer<const int64_t>(seed);
  p.position = pointer<const int32_t>(position);
  p.n = n;
  p.buckets = buckets;
  p.out = pointer<float>(out);
  p.status = pointer<int32_t>(status);
  call_on(stream, eesd_sample_beta_cpu, EESD_CUDA(eesd_sample_beta_cuda), p, n > 256,
          "sample_beta");
}

void thompson_draft_length(uintptr_t alpha, uintptr_t beta, uintptr_t cap, int32_t rule,
                           uintptr_t costs, uintptr_t seed, uintptr_t position, int64_t batch,
                           int64_t buckets, int64_t num_costs, uintptr_t length, uintptr_t credit,
                           std::optional<uintptr_t> stream) {
  eesd_thompson_draft_length_params p{};
  p.alpha = pointer<const float>(alpha);
  p.beta = pointer<const float>(beta);
  p.cap = pointer<const int32_t>(cap);
  p.costs = pointer<const float>(costs);
  p.seed = pointer<const int64_t>(seed);
  p.position = pointer<const int32_t>(position);
  p.batch = batch;
  p.buckets = buckets;
  p.num_costs = num_costs;
  p.rule = rule;
  p.length = pointer<int32_t>(length);
  p.credit = pointer<float>(credit);
  call_on(stream, eesd_thompson_draft_length_cpu, EESD_CUDA(eesd_thompson_draft_length_cuda), p,
          batch > 256, "thompson_draft_length");
}

void thompson_look(uintptr_t alpha, uintptr_t beta, uintptr_t cap, uintptr_t costs,
                   double exit_cost, uintptr_t seed, uintptr_t position, uintptr_t top_prob,
                   int64_t batch, int64_t buckets, int64_t num_costs, int64_t step,
                   uintptr_t length, uintptr_t bucket, uintptr_t run, uintptr_t looking,
                   uintptr_t credit, std::optional<uintptr_t> stream) {
  eesd_thompson_look_params p{};
  p.alpha = pointer<const float>(alpha);
  p.beta = pointer<const float>(beta);
  p.cap = pointer<const int32_t>(cap);
  p.costs = pointer<const float>(costs);
  p.exit_cost = exit_cost;
  p.seed = pointer<const int64_t>(seed);
  p.position = pointer<const int32_t>(position);
  p.top_prob = pointer<const float>(top_prob);
  p.batch = batch;
  p.buckets = buckets;
  p.num_costs = num_costs;
  p.step = step;
  p.length = pointer<int32_t>(length);
  p.bucket = pointer<int32_t>(bucket);
  p.run = pointer<float>(run);
  p.looking = pointer<int32_t>(looking);
  p.credit = pointer<float>(credit);
  call_on(stream, eesd_thompson_look_cpu, EESD_CUDA(eesd_thompson_look_cuda), p, batch > 256,
          "thompson_look");
}

void thompson_update(uintptr_t alpha, uintptr_t beta, uintptr_t prior_alpha, uintptr_t prior_beta,
                     uintptr_t drafted, uintptr_t accepted, uintptr_t bucket, int64_t batch,
                     int64_t buckets, int64_t max_draft, double discount, uintptr_t credit,
                     double token_credit, double credit_limit, std::optional<uintptr_t> stream) {
  eesd_thompson_update_params p{};
  p.alpha = pointer<float>(alpha);
  p.beta = pointer<float>(beta);
  p.prior_alpha = pointer<const float>(prior_alpha);
  p.prior_beta = pointer<const float>(prior_beta);
  p.drafted = pointer<const int32_t>(drafted);
  p.accepted = pointer<const int32_t>(accepted);
  p.bucket = pointer<const int32_t>(bucket);
  p.batch = batch;
  p.buckets = buckets;
  p.max_draft = max_draft;
  p.discount = static_cast<float>(discount);
  p.credit = pointer<float>(credit);
  p.token_credit = token_credit;
  p.credit_limit = credit_limit;
  call_on(stream, eesd_thompson_update_cpu, EESD_CUDA(eesd_thompson_update_cuda), p, batch > 256,
          "thompson_update");
}

void linear(uintptr_t x, uintptr_t weight, uintptr_t out, int64_t rows, int64_t in_features,
            int64_t out_features, bool bf16, uintptr_t residual, int64_t x_stride,
            int64_t out_stride, int64_t residual_stride) {
  eesd_linear_params p{};
  p.x = pointer<const float>(x);
  p.weight = pointer<const void>(weight);
  p.weight_dtype = bf16 ? EESD_BFLOAT16 : EESD_FLOAT32;
  p.residual = pointer<const float>(residual);
  p.out = pointer<float>(out);
  p.rows = rows;
  p.in_features = in_features;
  p.out_features = out_features;
  p.x_stride = x_stride;
  p.residual_stride = residual_stride;
  p.out_stride = out_stride;
  call(eesd_linear_cpu, p,
       in_features > 65536 || out_features > 65536 || rows > 64 ||
           in_features * out_features > 65536,
       "linear");
}

void rms_norm(uintptr_t x, uintptr_t weight, bool bf16, float eps, int64_t rows, int64_t size,
              uintptr_t out) {
  eesd_rms_norm_params p{};
  p.x = pointer<const float>(x);
  p.weight = pointer<const void>(weight);
  p.weight_dtype = bf16 ? EESD_BFLOAT16 : EESD_FLOAT32;
  p.eps = eps;
  p.rows = rows;
  p.size = size;
  p.out = pointer<float>(out);
  call(eesd_rms_norm_cpu, p, rows * size > 65536, "rms_norm");
}

void swiglu(uintptr_t gate_up, int64_t rows, int64_t size, uintptr_t out) {
  eesd_swiglu_params p{};
  p.gate_up = pointer<const float>(gate_up);
  p.rows = rows;
  p.size = size;
  p.out = pointer<float>(out);
  call(eesd_swiglu_cpu, p, rows * size > 65536, "swiglu");
}

void rope_cache_write(uintptr_t qkv, uintptr_t cos, uintptr_t sin, uintptr_t k_cache,
                      uintptr_t v_cache, int64_t batch_stride, uintptr_t lengths,
                      uintptr_t num_rows, uintptr_t depth, int64_t batch, int64_t rows,
                      int64_t heads, int64_t kv_heads, int64_t head_size, int64_t slots,
                      int64_t positions, uintptr_t q_out) {
  eesd_rope_cache_write_params p{};
  p.qkv = pointer<const float>(qkv);
  p.cos = pointer<const float>(cos);
  p.sin = pointer<const float>(sin);
  p.k_cache = pointer<float>(k_cache);
  p.v_cache = pointer<float>(v_cache);
  p.batch_stride = batch_stride;
  p.lengths = pointer<const int32_t>(lengths);
  p.num_rows = pointer<const int32_t>(num_rows);
  p.depth = pointer<const int32_t>(depth);
  p.batch = batch;
  p.rows = rows;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_size = head_size;
  p.slots = slots;
  p.positions = positions;
  p.q_out = pointer<float>(q_out);
  call(eesd_rope_cache_write_cpu, p, batch * rows > 16, "rope_cache_write");
}

void tree_attention(uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, int64_t batch_stride,
                    uintptr_t lengths, uintptr_t num_rows, uintptr_t ancestry, int64_t window,
                    float scale, int64_t batch, int64_t rows, int64_t heads, int64_t kv_heads,
                    int64_t head_size, int64_t slots, uintptr_t out) {
  eesd_tree_attention_params p{};
  p.q = pointer<const float>(q);
  p.k_cache = pointer<const float>(k_cache);
  p.v_cache = pointer<const float>(v_cache);
  p.batch_stride = batch_stride;
  p.lengths = pointer<const int32_t>(lengths);
  p.num_rows = pointer<const int32_t>(num_rows);
  p.ancestry = pointer<const int64_t>(ancestry);
  p.window = window;
  p.scale = scale;
  p.batch = batch;
  p.rows = rows;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_size = head_size;
  p.slots = slots;
  p.out = pointer<float>(out);
  call(eesd_tree_attention_cpu, p, true, "tree_attention");
}

void topk_logsumexp(uintptr_t logits, int64_t rows, int64_t vocab, int64_t k, uintptr_t values,
                    uintptr_t ids, uintptr_t logsumexp) {
  eesd_topk_logsumexp_params p{};
  p.logits = pointer<const float>(logits);
  p.rows = rows;
  p.vocab = vocab;
  p.k = k;
  p.values = pointer<float>(values);
  p.ids = pointer<int32_t>(ids);
  p.logsumexp = pointer<float>(logsumexp);
  call(eesd_topk_logsumexp_cpu, p, rows * vocab > 65536, "exit_topk");
}

void sample_draft(uintptr_t values, uintptr_t ids, uintptr_t temperature, uintptr_t law,
                  uintptr_t seed, uintptr_t position, uintptr_t base, uintptr_t parent,
                  int64_t rows, int64_t k, int64_t n, uintptr_t child_ids, uintptr_t probs) {
  eesd_sample_draft_params p{};
  p.values = pointer<const float>(values);
  p.ids = pointer<const int32_t>(ids);
  p.temperature = pointer<const float>(temperature);
  p.law = pointer<const int32_t>(law);
  p.seed = pointer<const int64_t>(seed);
  p.position = pointer<const int32_t>(position);
  p.base = pointer<const int32_t>(base);
  p.parent = pointer<const int32_t>(parent);
  p.rows = rows;
  p.k = k;
  p.n = n;
  p.child_ids = pointer<int32_t>(child_ids);
  p.probs = pointer<float>(probs);
  call(eesd_sample_draft_cpu, p, rows > 16, "sample_draft");
}

void verify_linear(uintptr_t target_logits, uintptr_t draft_ids, uintptr_t draft_length,
                   uintptr_t q_ids, uintptr_t q_probs, uintptr_t law, uintptr_t temperature,
                   uintptr_t top_k, uintptr_t top_p, uintptr_t min_p, uintptr_t seed,
                   uintptr_t position, uintptr_t base, int64_t batch, int64_t drafts, int64_t vocab,
                   int64_t k, uintptr_t num_accepted, uintptr_t token_ids, uintptr_t status) {
  eesd_verify_linear_params p{};
  p.target_logits = pointer<const float>(target_logits);
  p.draft_ids = pointer<const int32_t>(draft_ids);
  p.draft_length = pointer<const int32_t>(draft_length);
  p.q_ids = pointer<const int32_t>(q_ids);
  p.q_probs = pointer<const float>(q_probs);
  p.law = pointer<const int32_t>(law);
  p.temperature = pointer<const float>(temperature);
  p.top_k = pointer<const int32_t>(top_k);
  p.top_p = pointer<const float>(top_p);
  p.min_p = pointer<const float>(min_p);
  p.seed = pointer<const int64_t>(seed);
  p.position = pointer<const int32_t>(position);
  p.base = pointer<const int32_t>(base);
  p.batch = batch;
  p.drafts = drafts;
  p.vocab = vocab;
  p.k = k;
  p.num_accepted = pointer<int32_t>(num_accepted);
  p.token_ids = pointer<int32_t>(token_ids);
  p.status = pointer<int32_t>(status);
  call(eesd_verify_linear_cpu, p, true, "verify_linear");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The eesd C++ library over raw addresses; see csrc/include/eesd for the contracts.";
  m.def("philox_words", &philox_words, py::arg("seed"), py::arg("position"), py::arg("base"),
        py::arg("purpose"), py::arg("rows"), py::arg("n"), py::arg("out"), py::kw_only(),
        py::arg("ids") = 0, py::arg("parent") = 0, py::arg("stream") = py::none(),
        "Philox words uint32 [rows, n]: seed int64 [rows], position, base, parent int32 [rows], "
        "ids int32 [rows, n]; 0 for a null pointer.");
  m.def("sample_beta", &sample_beta, py::arg("alpha"), py::arg("beta"), py::arg("seed"),
        py::arg("position"), py::arg("n"), py::arg("buckets"), py::arg("out"), py::kw_only(),
        py::arg("status") = 0, py::arg("stream") = py::none(),
        "Beta samples float32 [n]: alpha, beta float32 [n], seed int64 and position int32 "
        "[n / buckets], status int32 [n] or 0.");
  m.def("thompson_draft_length", &thompson_draft_length, "See eesd/thompson.h; 0: no credit.");
  m.def("thompson_look", &thompson_look, "See eesd/thompson.h; 0: no credit.");
  m.def("thompson_update", &thompson_update, "See eesd/thompson.h; 0: no bucket, no credit.");
  m.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("rows"),
        py::arg("in_features"), py::arg("out_features"), py::kw_only(), py::arg("bf16"),
        py::arg("residual") = 0, py::arg("x_stride") = 0, py::arg("out_stride") = 0,
        py::arg("residual_stride") = 0,
        "out = x @ weight.T (+ residual): x, residual, out float32, weight bfloat16 or float32 "
        "[out_features, in_features]; strides in elements, 0 for contiguous rows.");
  m.def(
      "set_num_threads",
      [](int count) {
        if (eesd_set_num_threads(count) != EESD_OK) {
          throw py::value_error("set_num_threads: expected at least 1, got " +
                                std::to_string(count));
        }
      },
      py::arg("count"));
  m.def("rms_norm", &rms_norm, "float32 x, out [rows, size]; weight float32 or bfloat16 [size].");
  m.def("swiglu", &swiglu, "float32 gate_up [rows, 2 size], out [rows, size].");
  m.def("rope_cache_write", &rope_cache_write, "See eesd/decoder.h; 0 for a null depth.");
  m.def("tree_attention", &tree_attention, "See eesd/decoder.h; 0 for none.");
  m.def("topk_logsumexp", &topk_logsumexp, "See eesd/draft.h.");
  m.def("sample_draft", &sample_draft, "See eesd/draft.h; 0 for a null parent.");
  m.def("verify_linear", &verify_linear, "See eesd/verify.h.");
  m.def("get_num_threads", &eesd_get_num_threads);
  m.def("isa", &eesd_cpu_isa, "The CPU instruction set in use: avx512, avx2 or generic.");
  m.def("version", &eesd_version);
  m.attr("with_cuda") = kWithCuda;
}
