"""Llama, Mistral, Qwen2 and Qwen3 against transformers on the same folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eesd
from eesd import load

pytest.importorskip("transformers")

import transformers
from families import (
    ALTERNATING,
    OF_FAMILY,
    WINDOW,
    ids_of,
    native_logits,
    reference,
    transformers_logits,
    write,
)

# Logits here are of size 1 to 10. transformers normalises and softmaxes in float32 even in a
# float64 model, so that is the accuracy of both comparisons.
TOLERANCE = 1e-4
LENGTH = 64  # all positions: three windows, four times what the scaled tables were made for
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
OF_ALL: dict[str, dict[str, Any]] = {
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
SOME = {
    "Llama-biases": ("Llama", {"attention_bias": True}),
    "Mistral-no-window": ("Mistral", {"sliding_window": None}),
    "Qwen2-no-window": ("Qwen2", {"use_sliding_window": False}),
    "Qwen2-null-window": ("Qwen2", {"sliding_window": None}),
    "Qwen2-all-windows": ("Qwen2", {"max_window_layers": 0}),
    "Qwen2-layer-types": ("Qwen2", {"layer_types": ALTERNATING}),
    "Qwen3-no-window": ("Qwen3", {"use_sliding_window": False}),
    "Qwen3-layer-types": ("Qwen3", {"layer_types": ALTERNATING}),
    "Qwen3-biases": ("Qwen3", {"attention_bias": True}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{family}-{name}": (family, changes)
        for family in OF_FAMILY
        for name, changes in OF_ALL.items()
        if family == "Llama" or name not in ("wide-eps", "rope-theta")
    },
    **SOME,
}
FAMILIES = list(OF_FAMILY)


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def assert_close(got: Tensor, want: Tensor) -> None:
    assert got.dtype is want.dtype
    assert want.abs().max() > 1  # logits of zero would agree with anything
    torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)


# --- logits


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, "float32") for case in CASES]
    + [(case, "float64") for case in CASES if "untied" in case or case in SOME],
)
def test_logits_are_those_of_transformers(tmp_path: Path, case: str, dtype: str) -> None:
    """At once, and through the cache in blocks that straddle the window's edge."""
    folder = write(tmp_path, *CASES[case])
    ids = ids_of(2, LENGTH)
    want = transformers_logits(folder, ids, getattr(torch, dtype))
    model = load(folder, device="cpu", dtype=dtype)
    assert_close(native_logits(model, ids), want)
    assert_close(native_logits(model, ids, 7), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_token_by_token(tmp_path: Path, family: str) -> None:
    """Each step against transformers' own cache."""
    folder = write(tmp_path, family)
    ids, theirs, past, want = ids_of(2, 45), reference(folder), None, []
    with torch.inference_mode():
        for step in range(ids.shape[1]):
            out = theirs(ids[:, step : step + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            want.append(out.logits)
    assert_close(native_logits(load(folder, device="cpu"), ids, 1), torch.cat(want, 1))


@pytest.mark.parametrize("window", [1, 2, WINDOW, LENGTH - 1, LENGTH])
@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_the_window_is_neither_wider_nor_narrower(tmp_path: Path, family: str, window: int) -> None:
    folder = write(tmp_path, family, {"sliding_window": window})
    ids = ids_of(1, LENGTH)
    want = transformers_logits(folder, ids)
    assert_close(native_logits(load(folder, device="cpu"), ids), want)
    for other in {max(window - 1, 1), window + 1} - {window, LENGTH + 1}:
        got = native_logits(load(edit_config(folder, sliding_window=other), device="cpu"), ids)
        first = min(window, other)  # the first row that sees one more or one less
        torch.testing.assert_close(got[:, :first], want[:, :first], rtol=1e-4, atol=1e-4)
        assert (got[:, first] - want[:, first]).abs().max() > 0.01


@pytest.mark.parametrize(
    "case",
    [f"Llama-{x}" for x in ("wide-eps", "rope-theta", "rope-llama3", "rope-linear")] + list(SOME),
)
def test_the_setting_matters(tmp_path: Path, case: str) -> None:
    """The twin of the first: the family without the setting gives other logits."""
    family, changes = CASES[case]
    ids = ids_of(1, LENGTH)
    with_it = native_logits(load(write(tmp_path / "a", family, changes)), ids)
    without = native_logits(load(write(tmp_path / "b", family)), ids)
    assert (with_it - without).abs().max() > 0.1


def test_rope_scaling_of_transformers_4(tmp_path: Path) -> None:
    """The keys `rope_theta` and `rope_scaling`, with `type` for `rope_type`."""
    ids = ids_of(1, LENGTH)
    want = native_logits(load(write(tmp_path, "Llama", OF_ALL["rope-linear"])), ids)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config.update(rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 4.0})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(native_logits(load(tmp_path), ids), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_shards(tmp_path: Path, family: str) -> None:
    ids = ids_of(2, 30)
    whole = load(write(tmp_path / "whole", family))
    folder = write(tmp_path / "shards", family, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    shards = load(folder)
    assert torch.equal(native_logits(shards, ids), native_logits(whole, ids))
    assert_close(native_logits(shards, ids), transformers_logits(folder, ids))
    assert shards.fingerprint == whole.fingerprint


@pytest.mark.parametrize("case", ["Llama-tied", "Mistral-grouped-query", "Qwen3-biases"])
def test_bfloat16_checkpoint_computes_in_float32(tmp_path: Path, case: str) -> None:
    folder = write(tmp_path, *CASES[case], dtype=torch.bfloat16)
    ids = ids_of(2, 30)
    model = load(folder, device="cpu")
    narrow = {x.dtype for layer in model.backbone.layers for x in layer.tensors().values()}
    assert narrow == {torch.bfloat16}  # half the bytes
    assert_close(native_logits(model, ids), transformers_logits(folder, ids))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_activations(tmp_path: Path, family: str, dtype: str) -> None:
    """As near to float32 as four layers of the format's rounding allow."""
    folder = write(tmp_path, family)
    ids = ids_of(2, 30)
    got = native_logits(load(folder, dtype=dtype), ids)
    want = native_logits(load(folder, dtype="float32"), ids)
    assert got.dtype is getattr(torch, dtype)
    error = (got.float() - want).norm() / want.norm()
    assert 0 < error < 10 * torch.finfo(got.dtype).eps


# --- greedy text


@pytest.mark.filterwarnings("ignore:.*draft tokens were accepted")
@pytest.mark.parametrize(
    ("shrink", "dtype"),
    [(1.0, "float32"), (0.1, "float32"), (0.1, "float64")],
    ids=["drafts-fail", "drafts-hold", "drafts-hold-f64"],
)
@pytest.mark.parametrize("case", [*FAMILIES, "Qwen2-layer-types", "Qwen3-biases"])
def test_greedy_text_is_that_of_transformers(
    tmp_path: Path, case: str, shrink: float, dtype: str
) -> None:
    """Plainly and with drafts, from a prompt that is longer than the window.

    The two best logits of each step are 0.0027 apart or more with this prompt.
    """
    folder = write(tmp_path, *CASES.get(case, (case, {})), shrink=shrink)
    ids = ids_of(1, 30, seed=15)
    want = reference(folder, getattr(torch, dtype)).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False
    )
    model = load(folder, device="cpu", dtype=dtype, assistant_early_exit=1)
    plain = eesd.generate(model, ids, max_new_tokens=30, num_assistant_tokens=0)
    drafted = eesd.generate(
        model, ids, max_new_tokens=30, num_assistant_tokens=4, return_dict_in_generate=True,
        num_assistant_tokens_schedule="constant",
    )  # fmt: skip
    assert torch.equal(plain, want)
    assert torch.equal(drafted.sequences, want)
    rate = drafted.speculative.draft_acceptance_rate
    assert 0 < rate < 1 if shrink < 1 else rate < 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_unequal_prompts(tmp_path: Path, family: str) -> None:
    """Left-padded: each text is the one that its prompt has alone in transformers."""
    folder = write(tmp_path, family, shrink=0.1)
    theirs, model = reference(folder), load(folder, device="cpu", assistant_early_exit=1)
    prompts = [ids_of(1, length, seed=length) for length in (34, 3, 19)]
    ids = torch.stack([torch.nn.functional.pad(p[0], (34 - p.shape[1], 0)) for p in prompts])
    mask = torch.stack([(torch.arange(34) >= 34 - p.shape[1]).long() for p in prompts])
    got = eesd.generate(model, ids, mask, max_new_tokens=12)
    for row, prompt in zip(got, prompts, strict=True):
        want = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
        )
        assert row[34:].tolist() == want[0, prompt.shape[1] :].tolist()


def test_the_end_of_text_of_generation_config(tmp_path: Path) -> None:
    """`generation_config.json` may name more ends than `config.json`; both stop at them."""
    folder = write(tmp_path, "Qwen2", {"eos_token_id": 5})
    ids = ids_of(1, 30)
    free = eesd.generate(load(folder), ids, max_new_tokens=9, num_assistant_tokens=0)[0, 30:]
    end = int(free[4])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, end]}))
    model = load(folder)
    assert model.config.eos_token_ids == (5, end)
    got = eesd.generate(model, ids, max_new_tokens=9, num_assistant_tokens=0)
    mask = torch.ones_like(ids)
    want = reference(folder).generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    assert torch.equal(got, want)
    assert got.shape[1] == 30 + free.tolist().index(end) + 1


def test_transformers_loads_the_demo_model() -> None:
    """Weights, tokenizer and greedy text of the embedded folder are the same there."""
    demo = eesd.load("demo", device="cpu")
    theirs = reference(demo.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.folder)
    text = "Tom has 4 boxes of 6 pens. How many pens does he have?"
    ids = demo.encode(text)
    assert tokenizer(text)["input_ids"] == ids[0].tolist()
    want = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )
    assert torch.equal(eesd.generate(demo, ids, max_new_tokens=24), want)
