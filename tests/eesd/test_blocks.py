"""The native decoder against itself: in blocks, beside other rows, in chunks, without a cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eesd
import eesd.round
from eesd import load
from eesd.cache import Block, KVCache
from eesd.config import ModelConfig
from eesd.layer import INFERENCE, TRAINING, LayerOps
from eesd.rope import rope_table
from eesd.round import Engine
from eesd_kernels import tree_attention

pytest.importorskip("transformers")

from families import ALTERNATING, ids_of, native_logits, write

GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 700}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", GROUPED),
    "qwen2": ("Qwen2", {**GROUPED, "sliding_window": 300}),
    "qwen3": ("Qwen3", {**GROUPED, "attention_bias": True, "layer_types": ALTERNATING}),
}


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with grouped-query heads and room for three prefill chunks."""
    return write(tmp_path_factory.mktemp(request.param), *CASES[request.param])


@pytest.mark.parametrize("rows", [1, 3, 8, 13])
def test_decoding_in_blocks_is_decoding_at_once(folder: Path, rows: int) -> None:
    """Row by row, and in blocks of any size: the same bits."""
    model, ids = load(folder, dtype="float32"), ids_of(3, 39)
    assert torch.equal(native_logits(model, ids, rows), native_logits(model, ids))


def test_a_row_does_not_know_its_neighbours(folder: Path) -> None:
    model, ids = load(folder, dtype="float32"), ids_of(5, 31)
    together = native_logits(model, ids)
    for b in range(5):
        assert torch.equal(native_logits(model, ids[b : b + 1]), together[b : b + 1])
    assert torch.equal(native_logits(model, ids.flip(0)), together.flip(0))


@pytest.mark.parametrize("chunk", [7, 256, 601])
@torch.inference_mode()
def test_prefill_chunks(folder: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache after a prefill in chunks is that of one block, in batches of unequal prompts."""
    model = load(folder, dtype="float32")
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


def test_prefill_chunk_constant_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a prompt of 601 tokens at 256 a chunk takes three runs."""
    model, seen = load(folder), []
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


@pytest.mark.parametrize("ops", [INFERENCE, TRAINING], ids=["inference", "training"])
@torch.inference_mode()
def test_layers_without_a_cache(folder: Path, ops: LayerOps) -> None:
    """What training runs, over sequences twice as long as the window."""
    model, ids = load(folder, dtype="float32"), ids_of(2, 45)
    backbone = model.backbone
    hidden = backbone.embed(ids)
    for layer in backbone.layers:
        hidden = backbone.causal_layer(layer, hidden, ops)
    torch.testing.assert_close(
        backbone.logits(hidden), native_logits(model, ids), rtol=1e-4, atol=1e-4
    )


# --- attention through a window


@pytest.mark.parametrize("window", [1, 2, 5, 11, 12, 40])
@pytest.mark.parametrize("sequence", [None, 2], ids=["all", "one"])
def test_attention_through_a_window(window: int, sequence: int | None) -> None:
    """In float32 by overlapping views, in any batch of lengths, against the op in float64."""
    config = ModelConfig.from_hf(
        {
            "model_type": "mistral", "vocab_size": 9, "hidden_size": 24, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 2,
            "max_position_embeddings": 50,
        }
    )  # fmt: skip
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(window)
    wide, narrow = (
        KVCache(config, 5, 41, rope_table(config, device, dtype), dtype, exit_layers=0)
        for dtype in (torch.float64, torch.float32)
    )
    wide.data.copy_(torch.randn(wide.data.shape, generator=generator))
    narrow.data.copy_(wide.data)
    lengths, num_rows = [0, 10, 11, 34, 20], [7, 7, 3, 7, 0]
    some = slice(None) if sequence is None else slice(sequence, sequence + 1)
    where = torch.tensor([lengths[some], num_rows[some]], dtype=torch.int32)
    block = Block(where[0], where[1], sequence)
    qkv = torch.randn(where.shape[1], 7, 40, generator=generator)
    got = narrow.attend(0, qkv, block, window)
    torch.testing.assert_close(
        got.double(), wide.attend(0, qkv.double(), block, window), rtol=1e-5, atol=1e-5
    )
    # Rows see their own window alone, and nothing above it.
    q = torch.randn(1, 1, 6, 4, generator=generator)
    k, v = (x[3:4, : 34 + 1] for x in narrow.data[0])
    last = torch.tensor([34], dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    cut = max(0, 35 - window)
    shown = torch.tensor([34 - cut], dtype=torch.int32), last[1]
    torch.testing.assert_close(
        tree_attention(q, k, v, *last, window=window),
        tree_attention(q, k[:, cut:].clone(), v[:, cut:].clone(), *shown),
    )


@torch.inference_mode()
def test_dead_rows_and_other_sequences_do_not_matter(folder: Path) -> None:
    """A ragged batch, each row's bits as alone."""
    model, ids = load(folder, dtype="float32"), ids_of(3, 60)
    backbone, lengths, rows = model.backbone, [0, 25, 50], [4, 0, 2]
    cache = backbone.new_cache(3, 60, exit_layers=0)
    start = Block(torch.zeros(3, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32))
    layers = backbone.config.num_layers
    backbone.run_layers(backbone.embed(ids[:, :50]), 0, layers, cache, start)
    part = torch.stack([x[n : n + 4] for x, n in zip(ids, lengths, strict=True)])
    block = Block(start.num_rows, torch.tensor(rows, dtype=torch.int32))
    ragged = backbone.run_layers(backbone.embed(part), 0, layers, cache, block)
    for b, (length, count) in enumerate(zip(lengths, rows, strict=True)):
        alone = native_logits(model, ids[b : b + 1, : length + max(count, 1)])
        got = backbone.logits(ragged[b : b + 1, :count])
        assert torch.equal(got, alone[:, length : length + count])
