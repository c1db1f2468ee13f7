"""The native decoder against transformers on the same folder, and against itself in blocks."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eesd.round
from eesd import Model, load
from eesd.cache import Block
from eesd.config import ModelConfig
from eesd.round import Engine

transformers = pytest.importorskip("transformers")

# Logits here are of size 1 to 10. transformers normalises and softmaxes in float32 even in a
# float64 model, so that is the accuracy of both comparisons.
TOLERANCE = 1e-4

BASE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
    "initializer_range": 0.25, "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "grouped-query": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "multi-query": {"num_key_value_heads": 1},
    "head-dim-given": {"head_dim": 10},
    "wide-eps": {"rms_norm_eps": 0.3},
    "rope-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "rope-llama3": {"rope_parameters": LLAMA3},
    "rope-linear": {"rope_parameters": LINEAR},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """At these sizes threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(folder: Path, changes: dict[str, Any], **save: Any) -> Path:
    """A folder as transformers writes it, with random weights and uneven norms."""
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**BASE, **changes}))
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    if dtype := save.pop("dtype", None):
        model = model.to(dtype)
    model.save_pretrained(folder, **save)
    return folder


def ids_of(batch: int, length: int, vocab: int = BASE["vocab_size"], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, length), generator=generator)


@torch.inference_mode()
def native_logits(model: Model, ids: Tensor, rows: int | None = None) -> Tensor:
    """Logits `[B, P, V]`, in blocks of so many rows (None: one block)."""
    backbone, (batch, length) = model.backbone, ids.shape
    cache, out = backbone.new_cache(batch, length, exit_layers=0), []
    for start in range(0, length, rows or length):
        part = ids[:, start : start + (rows or length)]
        full = torch.ones(batch, dtype=torch.int32)
        block = Block(start * full, part.shape[1] * full)
        hidden = backbone.run_layers(
            backbone.embed(part), 0, backbone.config.num_layers, cache, block
        )
        out.append(backbone.logits(hidden))
    return torch.cat(out, 1)


@torch.inference_mode()
def transformers_logits(folder: Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    return model(ids).logits


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.dtype is want.dtype
    assert want.abs().max() > 1  # logits of zero would agree with anything
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


# --- against transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """Over all 64 positions, four times what the scaled tables were made for."""
    folder = write(tmp_path, CASES[case])
    ids = ids_of(2, 64)
    got = native_logits(load(folder, dtype=dtype), ids)
    assert_close(got, transformers_logits(folder, ids, dtype))


@pytest.mark.parametrize("case", ["wide-eps", "rope-theta", "rope-llama3", "rope-linear"])
def test_the_setting_matters(tmp_path: Path, case: str) -> None:
    """The twin of the above: the same weights without the setting give other logits."""
    ids = ids_of(1, 64)
    with_it = native_logits(load(write(tmp_path / "a", CASES[case])), ids)
    without = native_logits(load(write(tmp_path / "b", {})), ids)
    assert (with_it - without).abs().max() > 0.1


def test_rope_scaling_of_transformers_4(tmp_path: Path) -> None:
    """The keys `rope_theta` and `rope_scaling`, with `type` for `rope_type`."""
    ids = ids_of(1, 64)
    want = native_logits(load(write(tmp_path, CASES["rope-linear"])), ids)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config.update(rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 4.0})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(native_logits(load(tmp_path), ids), want)


def test_shards(tmp_path: Path) -> None:
    ids = ids_of(2, 20)
    whole = load(write(tmp_path / "whole", {}))
    folder = write(tmp_path / "shards", {}, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    shards = load(folder)
    assert torch.equal(native_logits(shards, ids), native_logits(whole, ids))
    assert_close(native_logits(shards, ids), transformers_logits(folder, ids, torch.float32))
    assert shards.fingerprint == whole.fingerprint


@pytest.mark.parametrize("case", ["untied", "tied", "grouped-query"])
def test_bfloat16_checkpoint_computes_in_float32(tmp_path: Path, case: str) -> None:
    folder = write(tmp_path, CASES[case], dtype=torch.bfloat16)
    ids = ids_of(2, 30)
    model = load(folder, device="cpu")
    assert model.backbone.layers[0].qkv.dtype is torch.bfloat16  # half the bytes
    assert_close(native_logits(model, ids), transformers_logits(folder, ids, torch.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_activations(tmp_path: Path, dtype: str) -> None:
    """As near to float32 as three layers of the format's rounding allow."""
    folder = write(tmp_path, {})
    ids = ids_of(2, 30)
    got = native_logits(load(folder, dtype=dtype), ids)
    want = native_logits(load(folder, dtype="float32"), ids)
    assert got.dtype is getattr(torch, dtype)
    error = (got.float() - want).norm() / want.norm()
    assert 0 < error < 10 * torch.finfo(got.dtype).eps


# --- against itself


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with grouped-query heads and room for three prefill chunks."""
    changes = {**CASES["grouped-query"], "max_position_embeddings": 700}
    return write(tmp_path_factory.mktemp("grouped"), changes)


@pytest.mark.parametrize("rows", [1, 3, 8, 13])
def test_decoding_in_blocks_is_decoding_at_once(grouped: Path, rows: int) -> None:
    """Row by row, and in blocks of any size: the same bits."""
    model, ids = load(grouped, dtype="float32"), ids_of(3, 39)
    assert torch.equal(native_logits(model, ids, rows), native_logits(model, ids))


def test_a_row_does_not_know_its_neighbours(grouped: Path) -> None:
    model, ids = load(grouped, dtype="float32"), ids_of(5, 21)
    together = native_logits(model, ids)
    for b in range(5):
        assert torch.equal(native_logits(model, ids[b : b + 1]), together[b : b + 1])
    assert torch.equal(native_logits(model, ids.flip(0)), together.flip(0))


@pytest.mark.parametrize("chunk", [1, 7, 256, 601])
@torch.inference_mode()
def test_prefill_chunks(grouped: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache after a prefill in chunks is that of one block, in batches of unequal prompts."""
    model = load(grouped, dtype="float32")
    prompts = [ids_of(1, n, seed=n)[0] for n in (41, 601, 1, 2)]
    backbone = model.backbone
    monkeypatch.setattr(eesd.round, "PREFILL_CHUNK", chunk)
    engine = Engine(backbone, None, backbone.new_cache(4, 610, exit_layers=0))
    state = engine.prefill(prompts)
    assert state.length.tolist() == [40, 600, 0, 1]
    assert state.pending.tolist() == [int(p[-1]) for p in prompts]
    for b, prompt in enumerate(prompts):
        cache = backbone.new_cache(1, 610, exit_layers=0)
        if len(prompt) > 1:
            block = Block(torch.zeros(1, dtype=torch.int32), torch.tensor([len(prompt) - 1]).int())
            embedded = backbone.embed(prompt[None, :-1])
            backbone.run_layers(embedded, 0, backbone.config.num_layers, cache, block)
        assert torch.equal(engine.cache.data[:, :, b], cache.data[:, :, 0])


def test_prefill_chunk_constant_is_used(grouped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a prompt of 601 tokens at 256 a chunk takes three runs."""
    model, seen = load(grouped), []
    real = type(model.backbone).run_layers

    def spy(self: Any, hidden: Tensor, first: int, last: int, *args: Any) -> Tensor:
        if first < last:
            seen.append(hidden.shape[1])
        return real(self, hidden, first, last, *args)

    monkeypatch.setattr(type(model.backbone), "run_layers", spy)
    engine = Engine(model.backbone, None, model.backbone.new_cache(1, 610, exit_layers=0))
    with torch.inference_mode():
        engine.prefill([ids_of(1, 601)[0]])
    assert seen == [256, 256, 88]


# --- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .*is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "RoPE of type 'yarn'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE of type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE of type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"architectures": ["MistralForCausalLM"]}, "architecture 'MistralForCausalLM'"),
        ({"architectures": None, "model_type": "gpt2"}, "architecture 'gpt2'"),
        ({"hidden_size": 0}, "hidden_size: expected a positive integer, got 0"),
        ({"hidden_size": "32"}, "hidden_size: expected a positive integer, got '32'"),
        ({"num_hidden_layers": True}, "num_hidden_layers: expected a positive integer, got True"),
        ({"vocab_size": None}, "vocab_size: expected a positive integer, got None"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of .* = 3"),
        ({"hidden_size": 36}, "head size 9 is not supported"),
        ({"hidden_size": 50}, r"head size 12\.5 is not supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_unsupported_config_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **BASE}
    assert ModelConfig.from_hf(config).head_size == 12
    with pytest.raises(ValueError, match=f"somewhere: {message}"):
        ModelConfig.from_hf({**config, **changes}, "somewhere")


def test_transformers_loads_the_demo_model() -> None:
    """Weights, tokenizer and greedy text of the embedded folder are the same there."""
    demo = eesd.load("demo", device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(demo.folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.folder)
    text = "Tom has 4 boxes of 6 pens. How many pens does he have?"
    ids = demo.encode(text)
    assert tokenizer(text)["input_ids"] == ids[0].tolist()
    want = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    assert torch.equal(eesd.generate(demo, ids, max_new_tokens=24), want)
