"""Greedy speculative text is plain decoding's, token for token, whatever is drafted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import eesd
from eesd import GenerateOutput, Model, generate, load
from eesd.cache import Block, KVCache
from eesd.config import ExitHeadConfig
from eesd.controller import SCHEDULES
from eesd.exit_head import ExitHead
from eesd.models import Llama
from eesd.round import Engine

EVALUATION = Path(eesd.__file__).parents[2] / ".." / "shared" / "data" / "eval"
COSTS = {"prefix": 0.1, "exit": 0.3, "rest": tuple(4.0 + 0.1 * n for n in range(9))}
OWN_PROMPTS = (
    "Anna has 12 pencils and gives away 5 of them. How many pencils are left?\n",
    "def mean(values):\n    ",
    "The capital of France is",
    "A train leaves at 9 and arrives at 11. How long",
    "import os\nimport sys\n\n\ndef main():\n",
    "Q: What is 7 * 8?\nA:",
    "x",
    "Write a short story about the sea, a red boat and an old man who",
)

PROMPT_SETS = [
    "own",
    pytest.param("gsm8k_test", marks=pytest.mark.slow),
    pytest.param("humaneval", marks=pytest.mark.slow),
]


# --- helpers


@torch.inference_mode()
def next_logits(model: Model, ids: Tensor) -> Tensor:
    """Logits `[V]` behind ids `[P]`."""
    backbone = model.backbone
    cache = backbone.new_cache(1, len(ids), exit_layers=0)
    block = Block(torch.zeros(1, dtype=torch.int32), torch.tensor([len(ids)], dtype=torch.int32))
    hidden = backbone.embed(ids[None])
    hidden = backbone.run_layers(hidden, 0, backbone.config.num_layers, cache, block)
    return backbone.logits(hidden[:, -1:])[0, 0]


def assert_same(model: Model, got: Tensor, want: Tensor, what: object) -> None:
    """Equal ids; a difference shows how close the two best logits were there."""
    if torch.equal(got, want):
        return
    shapes = f"{what}: shapes {list(got.shape)}, {list(want.shape)}"
    for row, (a, b) in enumerate(zip(got, want, strict=True)):
        width = min(len(a), len(b))
        at = next((i for i in range(width) if a[i] != b[i]), None)
        if at is not None:
            best = next_logits(model, b[:at][b[:at] >= 0]).topk(2)
            gap = float(best.values[0] - best.values[1])
            pytest.fail(
                f"{shapes}: row {row} differs at {at}: {int(a[at])} against {int(b[at])}; "
                f"the two best logits, of {best.indices.tolist()}, are {gap:.3g} apart"
            )
    pytest.fail(shapes)


def plain(model: Model, ids: Tensor, mask: Tensor | None = None, **changes: Any) -> Tensor:
    """Plain autoregressive decoding."""
    return generate(model, ids, mask, num_assistant_tokens=0, **changes)


def speculate(model: Model, ids: Tensor, mask: Tensor | None = None, **changes: Any) -> Any:
    """Speculative decoding with its statistics."""
    return generate(model, ids, mask, return_dict_in_generate=True, **changes)


def left_pad(prompts: list[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts `[P_b]` as a batch and its mask."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, width - len(prompt) :] = prompt
        mask[b, width - len(prompt) :] = 1
    return ids, mask


def with_head(model: Model, exit_layer: int) -> ExitHead:
    """A head with a layer of its own: the backbone's last."""
    backbone, shape = model.backbone, model.config
    config = ExitHeadConfig(
        exit_layer=exit_layer,
        backbone_architecture=shape.architecture,
        backbone_fingerprint=model.fingerprint,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        num_layers=shape.num_layers,
    )
    return ExitHead(backbone, config, backbone.layers[-1], backbone.norm, backbone.lm_head)


def scale_rest(model: Model, factor: float) -> Model:
    """Shrink what layers N.. add: at 0 the bare exit is always right, near 0 mostly."""
    backbone, head = model.backbone, model.exit_head
    assert head is not None
    first = head.config.exit_layer
    backbone.layers = backbone.layers[:first] + tuple(
        layer._replace(output=layer.output * factor, down=layer.down * factor)
        for layer in backbone.layers[first:]
    )
    return model


def tiny_prompts(count: int, longest: int = 12, seed: int = 0, vocab: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, vocab, (n,), generator=generator) for n in lengths]


@pytest.fixture(scope="module")
def demo() -> Model:
    """The trained demo model, float32 on the CPU."""
    return load("demo", device="cpu")


@pytest.fixture
def agreeing(tiny_llama: Path) -> Model:
    """Every draft is accepted, so rounds are as long as they may be."""
    return scale_rest(load(tiny_llama, assistant_early_exit=1, dtype="float64"), 0.0)


@pytest.fixture
def half_agreeing(tiny_llama: Path) -> Model:
    """Some drafts are accepted, some are not."""
    return scale_rest(load(tiny_llama, assistant_early_exit=1, dtype="float64"), 0.3)


# --- the demo model


def evaluation_prompts(model: Model, name: str, count: int) -> list[Tensor]:
    path = EVALUATION / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no evaluation prompts here: {path}")
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["prompt"] for line, _ in zip(lines, range(count), strict=False)]
    assert len(texts) == count
    room = model.config.max_position - 64
    return [model.encode(text)[0, -room:] for text in texts]


@pytest.fixture(scope="module")
def plain_texts(demo: Model) -> Callable[[str], tuple[list[Tensor], list[Tensor]]]:
    """Prompts of a data set and their plain texts, decoded once, one at a time."""
    known: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def of(name: str) -> tuple[list[Tensor], list[Tensor]]:
        if name not in known:
            if name == "own":
                prompts = [demo.encode(text)[0] for text in OWN_PROMPTS]
            else:
                prompts = evaluation_prompts(demo, name, 20)
            texts = [plain(demo, p[None], max_new_tokens=64)[0] for p in prompts]
            known[name] = prompts, texts
        return known[name]

    return of


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_demo_texts_one_at_a_time(demo: Model, plain_texts: Any, name: str) -> None:
    prompts, texts = plain_texts(name)
    steps = accepted = 0
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        out = speculate(demo, prompt[None], max_new_tokens=64, assistant_costs=COSTS, seed=i)
        assert_same(demo, out.sequences, text[None], (name, i))
        steps += out.speculative.num_spec_steps
        accepted += out.speculative.num_accepted_draft_tokens
    # It was speculation that was tested; with costs and seeds given, the lengths never change.
    assert accepted > 0.4 * steps


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_demo_texts_in_batches_of_eight(demo: Model, plain_texts: Any, name: str) -> None:
    """Left-padded; and plain decoding of the batch is plain decoding of each alone."""
    prompts, texts = plain_texts(name)
    eos = demo.config.eos_token_ids[0]
    for start in range(0, len(prompts), 8):
        some, alone = prompts[start : start + 8], texts[start : start + 8]
        ids, mask = left_pad(some)
        longest = max(len(t) - len(p) for p, t in zip(some, alone, strict=True))
        want = torch.full((len(some), ids.shape[1] + longest), eos)
        for b, (prompt, text) in enumerate(zip(some, alone, strict=True)):
            new = text[len(prompt) :]
            want[b, : ids.shape[1]] = ids[b]
            want[b, ids.shape[1] : ids.shape[1] + len(new)] = new
        assert_same(demo, plain(demo, ids, mask, max_new_tokens=64), want, (name, start, "plain"))
        got = generate(demo, ids, mask, max_new_tokens=64)
        assert_same(demo, got, want, (name, start))


@pytest.mark.parametrize("drafts", [1, 3, 8])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_and_length(
    demo: Model, plain_texts: Any, schedule: str, drafts: int
) -> None:
    prompts, texts = plain_texts("own")
    for i, (prompt, text) in enumerate(zip(prompts[:4], texts[:4], strict=True)):
        out = speculate(
            demo, prompt[None], max_new_tokens=64, num_assistant_tokens=drafts,
            num_assistant_tokens_schedule=schedule, seed=i,
            assistant_costs=COSTS,
        )  # fmt: skip
        assert_same(demo, out.sequences, text[None], (schedule, drafts, i))
        drafted, accepted = (
            steps[0]
            for steps in (out.speculative.per_step_drafted, out.speculative.per_step_accepted)
        )
        caps = [min(drafts, 63 - sum(accepted[:n]) - n) for n in range(len(drafted))]
        assert all(length <= cap for length, cap in zip(drafted, caps, strict=True))
        assert max(drafted) > 0
        if schedule == "constant":  # an end of text, drafted and perhaps rejected, stops earlier
            assert sum(length < cap for length, cap in zip(drafted, caps, strict=True)) <= 2


# --- a tiny model in float64


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tiny_texts_are_those_of_transformers(tiny_llama: Path, schedule: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)
    model = load(tiny_llama, assistant_early_exit=2, dtype="float64")
    for ids in tiny_prompts(8):
        want = theirs.generate(
            ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=40,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        options = {"max_new_tokens": 40, "num_assistant_tokens_schedule": schedule}
        assert_same(model, generate(model, ids[None], **options), want, "speculative")
        assert_same(model, plain(model, ids[None], **options), want, "plain")


@pytest.mark.parametrize("exit_layer", [1, 2, 3])
@pytest.mark.parametrize("own_layer", [False, True], ids=["bare", "head"])
def test_any_exit_layer(tiny_llama: Path, exit_layer: int, own_layer: bool) -> None:
    model = load(tiny_llama, assistant_early_exit=exit_layer, dtype="float64")
    head = with_head(model, exit_layer) if own_layer else None
    ids, mask = left_pad(tiny_prompts(6, seed=4))
    want = plain(model, ids, mask, max_new_tokens=30)
    got = generate(model, ids, mask, max_new_tokens=30, exit_head=head)
    assert_same(model, got, want, exit_layer)


def test_batch_equals_each_alone(half_agreeing: Model) -> None:
    """Also in another order, and with other padding ids under the mask."""
    model, prompts = half_agreeing, tiny_prompts(9, seed=1)
    ids, mask = left_pad(prompts)
    got = generate(model, ids, mask, max_new_tokens=20, eos_token_id=())
    for b, prompt in enumerate(prompts):
        alone = plain(model, prompt[None], max_new_tokens=20, eos_token_id=())
        assert_same(model, got[b : b + 1, -len(alone[0]) :], alone, b)
    back = generate(model, ids.flip(0), mask.flip(0), max_new_tokens=20, eos_token_id=())
    assert torch.equal(back.flip(0), got)
    other, _ = left_pad(prompts, pad=-100)
    again = generate(model, other, mask, max_new_tokens=20, eos_token_id=())
    assert torch.equal(again[:, ids.shape[1] :], got[:, ids.shape[1] :])
    assert torch.equal(again[:, : ids.shape[1]], other)


# --- ends


def test_max_new_tokens_inside_an_accepted_run(agreeing: Model) -> None:
    """With five drafts accepted in each round, every limit from 1 to 14 is met exactly."""
    ids = torch.tensor([[5, 9, 17]])
    whole = plain(agreeing, ids, max_new_tokens=20, eos_token_id=())
    for limit in range(1, 15):
        out = speculate(
            agreeing, ids, max_new_tokens=limit, num_assistant_tokens=5,
            num_assistant_tokens_schedule="constant", eos_token_id=(),
        )  # fmt: skip
        assert_same(agreeing, out.sequences, whole[:, : 3 + limit], limit)
        assert out.finish_reasons == ["length"]
        full, last = divmod(limit, 6)
        want = [5] * full + ([last - 1] if last else [])
        assert out.speculative.per_step_accepted == [want]


def test_end_of_text_anywhere_in_an_accepted_run(agreeing: Model) -> None:
    """Each new token of a text in turn becomes the end: first, inside, last, bonus of a run."""
    places = set()
    for ids in tiny_prompts(6, seed=2):
        whole = plain(agreeing, ids[None], max_new_tokens=18, eos_token_id=())[0]
        new = whole[len(ids) :].tolist()
        for at, token in enumerate(new):
            if token in new[:at]:
                continue
            out = speculate(
                agreeing, ids[None], max_new_tokens=18, num_assistant_tokens=5,
                num_assistant_tokens_schedule="constant", eos_token_id=token,
            )  # fmt: skip
            assert_same(agreeing, out.sequences, whole[None, : len(ids) + at + 1], (at, token))
            assert out.finish_reasons == ["eos"]
            stats = out.speculative
            cut = sum(n + 1 for n in stats.per_step_accepted[0]) - (at + 1)
            assert cut == (0 if at % 6 == 5 else 1)  # the bonus behind a drafted end is dropped
            assert stats.per_step_drafted[0][-1] == min(at % 6 + 1, 5)  # nothing drafted behind it
            places.add(at % 6)
    assert places == set(range(6))


def test_end_of_text_while_drafts_are_rejected(half_agreeing: Model) -> None:
    """The same where some runs end in a correction."""
    model, rejected = half_agreeing, 0
    for ids in tiny_prompts(8, seed=3):
        whole = plain(model, ids[None], max_new_tokens=12, eos_token_id=())[0]
        new = whole[len(ids) :].tolist()
        for at, token in enumerate(new):
            want = whole[None, : len(ids) + new.index(token) + 1]
            out = speculate(model, ids[None], max_new_tokens=12, eos_token_id=token)
            assert_same(model, out.sequences, want, (at, token))
            alone = plain(model, ids[None], max_new_tokens=12, eos_token_id=token)
            assert_same(model, alone, want, (at, token, "plain"))
            stats = out.speculative
            rejected += stats.num_draft_tokens - stats.num_accepted_draft_tokens
    assert rejected > 0


def test_several_ends_of_text(agreeing: Model) -> None:
    """The earliest of them counts, in any order; ids beyond the vocabulary do no harm."""
    ids = torch.tensor([[5, 9, 17]])
    whole = plain(agreeing, ids, max_new_tokens=14, eos_token_id=())
    new = whole[0, 3:].tolist()
    ends = [new[9], new[4], 10**6]
    first = min(new.index(new[9]), new.index(new[4]))
    for given in (ends, tuple(reversed(ends))):
        out = speculate(agreeing, ids, max_new_tokens=14, eos_token_id=given)
        assert_same(agreeing, out.sequences, whole[:, : 3 + first + 1], given)
    never = generate(agreeing, ids, max_new_tokens=14, eos_token_id=[10**6])
    assert_same(agreeing, never, whole, "never")


def test_the_models_own_end_of_text(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """From its config, one or many; `()` turns it off."""
    base = load(make_llama(tmp_path / "a"), assistant_early_exit=1, dtype="float64")
    ids = torch.tensor([[5, 9, 17]])
    whole = plain(base, ids, max_new_tokens=12, eos_token_id=())
    token = int(whole[0, 3 + 6])
    first = whole[0, 3:].tolist().index(token)
    for eos in (token, [63, token]):
        folder = make_llama(tmp_path / f"{eos}", eos_token_id=eos)
        model = load(folder, assistant_early_exit=1, dtype="float64")
        got = generate(model, ids, max_new_tokens=12)
        assert_same(model, got, whole[:, : 3 + first + 1], eos)
        assert_same(model, generate(model, ids, max_new_tokens=12, eos_token_id=()), whole, eos)


def test_padding_behind_the_end(half_agreeing: Model) -> None:
    model, prompts = half_agreeing, tiny_prompts(8, seed=5)
    ids, mask = left_pad(prompts)
    whole = plain(model, ids, mask, max_new_tokens=16, eos_token_id=())
    new = whole[:, ids.shape[1] :]
    end = int(new[0, 5])  # the first row ends at 6 tokens or before, others later or never
    lengths = [row.index(end) + 1 if end in row else 16 for row in new.tolist()]
    assert len(set(lengths)) > 1
    for pad, filled in ((61, 61), (None, end)):
        out = speculate(model, ids, mask, max_new_tokens=16, eos_token_id=end, pad_token_id=pad)
        want = new[:, : max(lengths)].clone()
        for b, length in enumerate(lengths):
            want[b, length:] = filled
        assert torch.equal(out.sequences[:, ids.shape[1] :], want)
        assert out.finish_reasons == ["eos" if end in row else "length" for row in new.tolist()]


def test_padding_without_any_id_for_it(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """No pad, no end of text: nothing ends early, so only the shape shows that it is defined."""
    folder = make_llama(tmp_path, eos_token_id=None, bos_token_id=None)
    model = load(folder, assistant_early_exit=1)
    assert generate(model, torch.tensor([[3], [4]]), max_new_tokens=4).shape == (2, 5)


def test_the_models_own_padding(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = load(make_llama(tmp_path, pad_token_id=60), assistant_early_exit=1, dtype="float64")
    ids = torch.tensor([[5, 9, 17], [8, 8, 21]])
    whole = plain(model, ids, max_new_tokens=8, eos_token_id=())
    end = int(whole[0, 3])
    got = generate(model, ids, max_new_tokens=8, eos_token_id=end)
    assert got[0, 3:].tolist() == [end] + [60] * (got.shape[1] - 4)
    assert got.shape[1] > 4


# --- prompts


def test_prompt_of_one_token(half_agreeing: Model) -> None:
    for token in range(1, 9):
        ids = torch.tensor([[token]])
        want = plain(half_agreeing, ids, max_new_tokens=20)
        assert want.shape[1] > 1
        assert_same(half_agreeing, generate(half_agreeing, ids, max_new_tokens=20), want, token)


@pytest.mark.parametrize("new", [1, 2, 5, 9])
def test_text_up_to_the_last_position(half_agreeing: Model, agreeing: Model, new: int) -> None:
    """The prompt and its text fill all 64 positions; one token more is refused."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(1, 64, (1, 64 - new), generator=generator)
    for model in (half_agreeing, agreeing):
        options = {"max_new_tokens": new, "eos_token_id": ()}
        want = plain(model, ids, **options)
        assert want.shape == (1, 64)
        assert_same(model, generate(model, ids, **options), want, new)
        with pytest.raises(ValueError, match="more than the model's 64 positions"):
            generate(model, ids, max_new_tokens=new + 1)


def test_costs_are_measured_where_positions_are_few(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """More drafts allowed than the model has positions for."""
    folder = make_llama(tmp_path, max_position_embeddings=12)
    model = load(folder, assistant_early_exit=1, dtype="float32")
    ids = torch.tensor([[5, 9]])
    options = {"max_new_tokens": 10, "eos_token_id": ()}
    got = generate(model, ids, num_assistant_tokens=40, **options)
    assert_same(model, got, plain(model, ids, **options), "few positions")


def test_int32_ids(half_agreeing: Model) -> None:
    ids, mask = left_pad(tiny_prompts(4, seed=6))
    want = generate(half_agreeing, ids, mask, max_new_tokens=12)
    got = generate(half_agreeing, ids.int(), mask.bool(), max_new_tokens=12)
    assert got.dtype is torch.int64
    assert torch.equal(got, want)


# --- what is computed, and how often


class Spy:
    """Live rows that `run_layers` saw, by first and last layer, and every cache made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: dict[tuple[int, int], int] = {}
        self.caches: list[KVCache] = []
        run, new = Llama.run_layers, Llama.new_cache

        def run_layers(
            model: Llama, hidden: Tensor, first: int, last: int, cache: KVCache, block: Block
        ) -> Tensor:
            live = int(block.num_rows.sum())
            self.rows[first, last] = self.rows.get((first, last), 0) + live
            return run(model, hidden, first, last, cache, block)

        def new_cache(model: Llama, *args: Any, **kwargs: Any) -> KVCache:
            self.caches.append(new(model, *args, **kwargs))
            return self.caches[-1]

        monkeypatch.setattr(Llama, "run_layers", run_layers)
        monkeypatch.setattr(Llama, "new_cache", new_cache)


def test_plain_decoding_does_no_exit_work(
    half_agreeing: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = half_agreeing
    head = with_head(model, 1)
    called = []
    for name in ("run", "write", "candidates"):
        monkeypatch.setattr(ExitHead, name, lambda *_, name=name: called.append(name))
    spy = Spy(monkeypatch)
    plain(model, torch.tensor([[5, 9, 17]]), max_new_tokens=9, eos_token_id=(), exit_head=head)
    assert called == []
    assert [cache.data.shape[0] for cache in spy.caches] == [model.config.num_layers]
    whole = {layers: n for layers, n in spy.rows.items() if layers[0] < layers[1]}
    assert whole == {(0, 4): 3 - 1 + 9}  # the last token is emitted and not run
    with pytest.raises(TypeError):  # the twin: speculation does call them
        generate(model, torch.tensor([[5, 9, 17]]), max_new_tokens=9, exit_head=head)
    assert called


@pytest.mark.parametrize("drafts", [1, 3, 8])
def test_no_layer_runs_twice_for_a_token(
    half_agreeing: Model, monkeypatch: pytest.MonkeyPatch, drafts: int
) -> None:
    """Prompt and each round's l + 1 rows, once below the exit and once above it."""
    prompts = tiny_prompts(5, seed=8)
    ids, mask = left_pad(prompts)
    head, spy = with_head(half_agreeing, 1), Spy(monkeypatch)
    out = speculate(
        half_agreeing, ids, mask, max_new_tokens=15, eos_token_id=(), exit_head=head,
        num_assistant_tokens=drafts, num_assistant_tokens_schedule="constant",
    )  # fmt: skip
    stats = out.speculative
    rows = sum(len(p) - 1 for p in prompts) + stats.num_draft_tokens + stats.num_spec_steps
    assert spy.rows == {(0, 1): rows, (1, 4): rows}
    assert stats.num_accepted_draft_tokens < stats.num_draft_tokens


@pytest.mark.parametrize("schedule", ["constant", "thompson"])
def test_cache_is_that_of_a_prefill_of_the_text(
    half_agreeing: Model, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    """All layers and the exit layer's own, at every cached position, after rejections too."""
    model = half_agreeing
    head = with_head(model, 1)
    prompts = tiny_prompts(4, seed=9)
    ids, mask = left_pad(prompts)
    spy = Spy(monkeypatch)
    out: GenerateOutput = speculate(
        model, ids, mask, max_new_tokens=20, eos_token_id=(), exit_head=head,
        num_assistant_tokens=4, num_assistant_tokens_schedule=schedule,
        assistant_costs={**COSTS, "exit": 0.01, "prefix": 0.01},
    )  # fmt: skip
    stats = out.speculative
    assert 0 < stats.num_accepted_draft_tokens < stats.num_draft_tokens
    (after,) = spy.caches
    for b, prompt in enumerate(prompts):
        text = out.sequences[b, ids.shape[1] - len(prompt) :]
        engine = Engine(model.backbone, head, model.backbone.new_cache(1, 64, exit_layers=1))
        with torch.inference_mode():
            engine.prefill([text])
        cached = len(text) - 1
        got, want = after.data[:, :, b, :cached], engine.cache.data[:, :, 0, :cached]
        assert got.shape[0] == model.config.num_layers + 1
        assert bool((want.flatten(3).abs().amax(-1) > 0).all())  # nothing is left unwritten
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_broken_head_changes_no_text(half_agreeing: Model) -> None:
    """NaN in the exit head alone: nothing is accepted, and the text is plain decoding's."""
    model = half_agreeing
    ids = torch.tensor([[5, 9, 17]])
    head = with_head(model, 1)
    head.norm = torch.full_like(head.norm, torch.nan)
    want = plain(model, ids, max_new_tokens=12, eos_token_id=())
    out = speculate(
        model, ids, max_new_tokens=12, eos_token_id=(), exit_head=head,
        num_assistant_tokens_schedule="constant",
    )  # fmt: skip
    assert_same(model, out.sequences, want, "broken head")
    assert out.speculative.num_accepted_draft_tokens == 0
