"""Logits processors: each draft position has its true history, and the text its law."""

import functools
import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from text_law import LEAST, PROMPT, VOCAB, exact_law, p_value
from tiny_models import half_agreeing_folder, left_pad, narrow_model, tiny_prompts
from torch import Tensor

from eesd import Model, generate, load
from eesd.processor_guard import contents
from eesd.processors import Processors

transformers = pytest.importorskip("transformers")
warpers = transformers.generation.logits_process

IDS = torch.tensor([[5, 9, 17]])
COSTS = {"prefix": 0.1, "exit": 0.1, "rest": tuple(1.0 + 0.1 * n for n in range(9))}


@pytest.fixture(scope="module")
def folder(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_agreeing_folder(make_llama, tmp_path_factory.mktemp("half") / "llama", 0.5)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """Vocabulary 64, float64; about half the drafts are accepted."""
    return load(folder, assistant_early_exit=1, device="cpu", dtype="float64")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)


def run(model: Model, ids: Tensor = IDS, *args: Any, **changes: Any) -> Any:
    """A call that measures nothing and drafts as much as it may."""
    options = {
        "max_new_tokens": 12, "assistant_costs": COSTS, "num_assistant_tokens": 4,
        "num_assistant_tokens_schedule": "constant", **changes,
    }  # fmt: skip
    return generate(model, ids, *args, **options)


def favour(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A bias on an id that depends on every token before and on their number."""
    places = torch.arange(1, input_ids.shape[1] + 1)
    bias = torch.zeros_like(scores)
    bias[0, int((input_ids[0] * places).sum()) % scores.shape[1]] = 2.0
    return scores + bias


# --- greedy, against plain decoding and transformers


GREEDY: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "reward of repetition": {"repetition_penalty": 0.7},
    "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "min_new_tokens": {"min_new_tokens": 7, "eos_token_id": [0, 11, 23, 40, 52]},
    "custom": {"logits_processor": [favour]},
    "all": {
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 6,
        "eos_token_id": [3, 30, 45, 60], "logits_processor": [favour],
    },
}  # fmt: skip


def test_several_ends_are_those_of_transformers(model: Model, theirs: Any) -> None:
    """40 prompts, drafting in a left-padded batch; most texts end early, at more than one id."""
    ends, prompts = [0, 11, 23, 40, 52], tiny_prompts(40, seed=3)
    ids, mask = left_pad(prompts, pad=9)
    out = run(model, ids, mask, pad_token_id=0, eos_token_id=ends)
    seen = set()
    for b, prompt in enumerate(prompts):
        want = theirs.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=12,
            do_sample=False, eos_token_id=ends, pad_token_id=0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        row = out[b, ids.shape[1] :].tolist()
        assert row == want + [0] * (len(row) - len(want))
        if len(want) < 12:
            seen.add(want[-1])
    assert len(seen) > 1
    assert seen <= set(ends)


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_texts_are_those_of_transformers(model: Model, theirs: Any, case: str) -> None:
    """40 prompts in a left-padded batch, drafting and plainly; ten alone."""
    options = {"pad_token_id": 0, "eos_token_id": (), **GREEDY[case]}
    prompts = tiny_prompts(40, seed=3)
    ids, mask = left_pad(prompts, pad=9)
    out = run(model, ids, mask, return_dict_in_generate=True, **options)
    plain = run(model, ids, mask, num_assistant_tokens=0, **options)
    bare = run(model, ids, mask, pad_token_id=0, eos_token_id=options["eos_token_id"])
    assert torch.equal(out.sequences, plain)
    assert 40 < out.speculative.num_accepted_draft_tokens < out.speculative.num_draft_tokens
    changed = 0
    for b, prompt in enumerate(prompts):
        want = theirs.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=12,
            do_sample=False, **{**options, "eos_token_id": list(options["eos_token_id"]) or None},
        )  # fmt: skip
        new = want[0, len(prompt) :].tolist()
        row, other = (text[b, ids.shape[1] :].tolist() for text in (out.sequences, bare))
        assert row == new + [0] * (len(row) - len(new))
        changed += other[: len(new)] != new
        if b % 4 == 0:
            assert torch.equal(run(model, prompt[None], **options), want)
    assert changed > 5


EVALUATION = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval"
DEMO: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 3},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": list(range(0, 4096, 7))},
    "custom": {"logits_processor": [favour]},
    "stop_strings": {"stop_strings": ["the", "\n\n", " 1", "="]},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DEMO)
def test_greedy_texts_of_the_demo_model(case: str) -> None:
    """40 evaluation prompts in batches of 8: speculative text is plain decoding's."""
    import json

    path = EVALUATION / "gsm8k_test.jsonl"
    if not path.exists():
        pytest.skip(f"no evaluation prompts here: {path}")
    demo = load("demo", device="cpu")
    lines = path.read_text(encoding="utf-8").splitlines()[:40]
    prompts = [demo.encode(json.loads(line)["prompt"])[0, -64:] for line in lines]
    accepted = 0
    for first in range(0, 40, 8):
        ids, mask = left_pad(prompts[first : first + 8])
        options = {"max_new_tokens": 20, **DEMO[case]}
        want = run(demo, ids, mask, **{**options, "num_assistant_tokens": 0})
        out = run(demo, ids, mask, return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, want), first
        accepted += out.speculative.num_accepted_draft_tokens
    assert accepted > 40


def test_rewards_that_overflow_are_an_error(folder: Path) -> None:
    """Not another token."""
    float32 = load(folder, assistant_early_exit=1, device="cpu")
    with pytest.raises(RuntimeError, match="sequence 0: error: NaN or infinite logits, or no tok"):
        run(float32, repetition_penalty=1e-39)


def test_no_token_left(model: Model) -> None:
    """All ids but the end of text have come once; the round that meets it is lost."""
    for drafts in (0, 3):
        out = run(
            model, IDS[:, :2], no_repeat_ngram_size=1, max_new_tokens=62, eos_token_id=0,
            min_new_tokens=62, num_assistant_tokens=drafts, return_dict_in_generate=True,
        )  # fmt: skip
        new = out.sequences.shape[1] - 2
        assert 61 - drafts <= new <= 61
        message = (
            f"error: NaN or infinite logits, or no token left by the processors, at new token {new}"
        )
        assert out.finish_reasons == [message]
        assert len(set(out.sequences[0].tolist())) == new + 2


@pytest.mark.parametrize("drafts", [0, 4])
def test_nothing_is_processed_behind_an_end(model: Model, drafts: int) -> None:
    """A grammar allows nothing there, and need not be asked; nor is a token left to come once."""
    ends = list(range(2, 64, 5))

    def grammar(input_ids: Tensor, scores: Tensor) -> Tensor:
        assert int(input_ids[0, -1]) not in ends
        return scores

    ids, mask = left_pad(tiny_prompts(12, seed=4))
    ids[torch.isin(ids, torch.tensor(ends))] = 9
    options = {"eos_token_id": ends, "num_assistant_tokens": drafts, "pad_token_id": 0}
    out = run(model, ids, mask, logits_processor=[grammar], return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, run(model, ids, mask, **options))
    assert out.finish_reasons.count("eos") > 6
    # A prompt that ends with an end of text is processed.
    with pytest.raises(AssertionError):
        run(model, torch.tensor([[9, ends[0]]]), logits_processor=[grammar], **options)


# --- the true history


def test_history_of_every_draft_position(model: Model) -> None:
    """A processor sees each prefix of the text, without padding, and drafts that follow it."""
    prompts = tiny_prompts(5, seed=8)
    ids, mask = left_pad(prompts, pad=9)
    heard: queue.SimpleQueue[list[int]] = queue.SimpleQueue()  # which holds no state one can see

    def listen(input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.dtype is torch.int64
        assert scores.dtype is torch.float32
        assert scores.shape == (1, 64)
        heard.put(input_ids[0].tolist())
        return scores

    out = run(
        model, ids, mask, logits_processor=[listen], return_dict_in_generate=True, eos_token_id=()
    )
    assert 0 < out.speculative.num_accepted_draft_tokens < out.speculative.num_draft_tokens
    seen = [heard.get() for _ in range(heard.qsize())]
    for b, prompt in enumerate(prompts):
        text = out.sequences[b, ids.shape[1] - len(prompt) :].tolist()
        for n in range(len(prompt), len(text)):
            assert text[:n] in seen
    for prefix in seen:  # and no other beginnings than the prompts'
        assert any(prefix[: len(p)] == p.tolist() for p in prompts)
    stats = out.speculative
    assert len(seen) == stats.num_draft_tokens + stats.num_spec_steps + 1  # the first call twice


def test_each_row_against_transformers_processors() -> None:
    """Rows of random histories, drafts included, and the candidates of drafts."""
    generator = torch.Generator().manual_seed(0)
    vocab, capacity = 9, 24
    prompts = tiny_prompts(6, longest=8, vocab=vocab)
    for penalty, ngram, least in [(1.3, 0, 0), (1.0, 1, 0), (1.0, 2, 0), (1.0, 3, 6), (0.6, 4, 3)]:
        ours = Processors(
            prompts, capacity, [2, 5, 77], repetition_penalty=penalty,
            no_repeat_ngram_size=ngram, min_new_tokens=least,
        )  # fmt: skip
        texts = [prompt.tolist() for prompt in prompts]
        for place in range(capacity - 8):
            others = torch.tensor([1, 3, 4, 6, 7, 8])  # behind an end nothing is processed
            token = others[torch.randint(6, (6,), generator=generator)]
            at = torch.tensor([len(text) for text in texts], dtype=torch.int32)
            ours.write(at, token)
            if place % 3 == 2:  # rejected: the next one takes its place
                continue
            for text, new in zip(texts, token.tolist(), strict=True):
                text.append(new)
            if place < 5:
                continue
            base = at - 3  # three rows before the last, as if those were drafts
            logits = torch.randn(6, 4, vocab, generator=generator)
            got = ours.rows(logits, base, torch.full_like(base, 4))
            values, ids = logits[:, 3].sort(descending=True)
            values, ids = ours.candidates(values[:, :4], ids[:, :4].to(torch.int32), at + 1)
            for b, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
                theirs = transformers.LogitsProcessorList()
                if penalty != 1.0:
                    theirs.append(warpers.RepetitionPenaltyLogitsProcessor(penalty))
                if ngram:
                    theirs.append(warpers.NoRepeatNGramLogitsProcessor(ngram))
                if least:
                    make = warpers.MinNewTokensLengthLogitsProcessor
                    theirs.append(make(len(prompt), least, [2, 5, 77]))
                for j in range(4):
                    seen = torch.tensor([text[: int(base[b]) + 1 + j]])
                    want = theirs(seen, logits[b, j][None].clone())
                    assert torch.equal(got[b, j], want[0]), (penalty, ngram, least, b, j)
                kept = logits[b, 3].sort(descending=True).indices[:4]
                assert sorted(ids[b].tolist()) == sorted(kept.tolist())
                assert torch.equal(values[b], got[b, 3][ids[b].long()])
                pairs = list(zip((-values[b]).tolist(), ids[b].tolist(), strict=True))
                assert pairs == sorted(pairs)


def test_drafts_know_the_cheap_processors(
    make_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them are accepted than of drafts as the exit head gives them."""
    folder = half_agreeing_folder(make_llama, tmp_path, 0.2)
    model = load(folder, assistant_early_exit=1, device="cpu", dtype="float64")
    ids, mask = left_pad(tiny_prompts(20, seed=12))

    def acceptance(**options: Any) -> tuple[float, Tensor]:
        out = run(
            model, ids, mask, max_new_tokens=30, eos_token_id=(), return_dict_in_generate=True,
            **options,
        )  # fmt: skip
        return out.speculative.mean_acceptance_length, out.sequences

    for options in ({"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 1}):
        with monkeypatch.context() as patch:
            processed, text = acceptance(**options)
            patch.setattr(Processors, "candidates", lambda _, values, ids, seen: (values, ids))
            bare, same = acceptance(**options)
        assert torch.equal(text, same)  # and the text is the same
        assert processed > bare + 0.1


# --- the law of sampled text


DRAWS = 2_000


@pytest.fixture(scope="module")
def narrow(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Vocabulary 7, and drafts that are right about half the time."""
    return narrow_model(make_llama, tmp_path_factory.mktemp("narrow") / "llama", VOCAB)


def no_second(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A penalty of 3 and no bigram twice, by transformers."""
    scores = warpers.RepetitionPenaltyLogitsProcessor(3.0)(input_ids, scores)
    return warpers.NoRepeatNGramLogitsProcessor(2)(input_ids, scores)


RULES: dict[str, tuple[dict[str, Any], Any]] = {
    "custom": ({"logits_processor": [favour]}, favour),
    "built in": ({"repetition_penalty": 3.0, "no_repeat_ngram_size": 2}, no_second),
}


def sampled(model: Model, **options: Any) -> Tensor:
    """Texts `[DRAWS, 3]`, one a seed."""
    out = generate(
        model, torch.full((DRAWS, 1), PROMPT), seed=list(range(DRAWS)), do_sample=True,
        max_new_tokens=3, eos_token_id=(), num_assistant_tokens=2, temperature=0.8,
        num_assistant_tokens_schedule="constant", return_dict_in_generate=True, **options,
    )  # fmt: skip
    stats = out.speculative
    assert 0 < stats.num_accepted_draft_tokens < stats.num_draft_tokens
    return out.sequences[:, 1:]


@pytest.mark.parametrize(
    ("sampling", "rule"),
    [
        ("rejection", "custom"), ("rejection", "built in"), ("block", "custom"),
        ("block", "built in"), ("coupled", "custom"),
    ],
)  # fmt: skip
def test_joint_law_of_processed_texts(narrow: Model, rule: str, sampling: str) -> None:
    options, edit = RULES[rule]
    texts = sampled(narrow, assistant_sampling=sampling, **options)
    assert p_value(texts, exact_law(narrow, 3, edit=edit, temperature=0.8)) > LEAST
    with pytest.raises(AssertionError):  # and without the processor the law is another
        assert p_value(texts, exact_law(narrow, 3, temperature=0.8)) > LEAST


@pytest.mark.parametrize("rule", RULES)
def test_a_wrong_history_would_show(
    narrow: Model, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """The twin: where several rows are verified, each sees one token less than it should."""
    real = Processors.rows

    def rows(self: Processors, logits: Tensor, base: Tensor, count: Tensor) -> Tensor:
        first = real(self, logits[:, :1], base, count.clamp(max=1))
        if logits.shape[1] == 1:
            return first
        late = real(self, logits[:, 1:], base, count.clamp(max=logits.shape[1] - 1))
        return torch.cat((first, late), 1)

    monkeypatch.setattr(Processors, "rows", rows)
    options, edit = RULES[rule]
    texts = sampled(narrow, **options)
    with pytest.raises(AssertionError):
        assert p_value(texts, exact_law(narrow, 3, edit=edit, temperature=0.8)) > LEAST


# --- scores


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.4, "top_k": 9},
    {"temperature": 0.9, "top_p": 0.8},
    {"min_p": 0.15},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3,
     "no_repeat_ngram_size": 2, "min_new_tokens": 5},
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("drafts", [0, 4])
def test_scores_of_sampled_text(
    model: Model, theirs: Any, monkeypatch: pytest.MonkeyPatch, filters: dict[str, Any], drafts: int
) -> None:
    """Our text is forced on transformers, whose scores and logits at each token must be ours."""
    for prompt in tiny_prompts(4, seed=6):
        ids = prompt[None]
        options = {
            "do_sample": True, "eos_token_id": [0, 20], "pad_token_id": 0, "output_scores": True,
            "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 16,
            "top_k": 0, **filters,
        }  # fmt: skip
        ours = run(model, ids, seed=4, num_assistant_tokens=drafts, **options)
        drawn = iter(ours.sequences[0, len(prompt) :].tolist())
        with monkeypatch.context() as patch:
            patch.setattr(
                torch, "multinomial", lambda *_, drawn=drawn, **__: torch.tensor([[next(drawn)]])
            )
            want = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(want.sequences, ours.sequences)
        same_rows(ours.scores, want.scores)
        same_rows(ours.logits, want.logits)


def same_rows(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype is torch.float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_scores_of_greedy_text(model: Model, theirs: Any) -> None:
    """Temperature and filters have no part in them."""
    for prompt in tiny_prompts(6, seed=7):
        ids = prompt[None]
        options = {
            "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "pad_token_id": 0,
            "output_scores": True, "return_dict_in_generate": True, "max_new_tokens": 12,
        }  # fmt: skip
        ours = run(model, ids, temperature=0.5, top_k=3, **options)
        want = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
        assert torch.equal(ours.sequences, want.sequences)
        assert ours.logits is None
        same_rows(ours.scores, want.scores)


def test_scores_of_a_batch(model: Model) -> None:
    """Each sequence's are those it has alone; past its end they are -inf."""
    prompts = tiny_prompts(6, seed=9)
    ids, mask = left_pad(prompts)
    options = {
        "output_scores": True, "output_logits": True, "return_dict_in_generate": True,
        "eos_token_id": list(range(1, 64, 6)), "pad_token_id": 0, "repetition_penalty": 1.1,
    }  # fmt: skip
    out = run(model, ids, mask, **options)
    steps = out.sequences.shape[1] - ids.shape[1]
    assert len(out.scores) == len(out.logits) == steps
    ends = set()
    for b, prompt in enumerate(prompts):
        alone = run(model, prompt[None], **options)
        ends.add(len(alone.scores))
        for name in ("scores", "logits"):
            got = torch.stack([rows[b] for rows in getattr(out, name)])
            want = torch.cat(getattr(alone, name))
            torch.testing.assert_close(got[: len(want)], want, rtol=1e-6, atol=1e-6)
            assert bool((got[len(want) :] == -torch.inf).all())
    assert len(ends) > 1


def test_no_scores_without_a_dict(model: Model) -> None:
    assert torch.equal(run(model, output_scores=True), run(model))
    assert run(model, return_dict_in_generate=True).scores is None


# --- custom processors that are refused


class Counter:
    """Counts its calls, and acts on it late."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores if self.calls < 30 else scores * 2


class Slotted:
    """The same without a dict."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.last = input_ids.shape[1]
        return scores


class Buffer(torch.nn.Module):
    """State in a tensor, changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1))

    def forward(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.total += input_ids.shape[1]
        return scores


def closure() -> Any:
    texts: list[int] = []

    def remember(input_ids: Tensor, scores: Tensor) -> Tensor:
        texts.append(input_ids.shape[1])
        return scores

    return remember


def method() -> Any:
    return Counter().__call__


def partial() -> Any:
    return functools.partial(lambda counter, ids, scores: counter(ids, scores), Counter())


def noise() -> Any:
    return lambda _, scores: scores + torch.randn(scores.shape)


def own_generator() -> Any:
    generator = torch.Generator().manual_seed(1)
    return lambda _, scores: scores + torch.randn(scores.shape, generator=generator)


def hidden_iterator() -> Any:
    counter = iter(range(10**9))
    return lambda _, scores: scores + next(counter)


def synth_id() -> Any:
    return warpers.SynthIDTextWatermarkLogitsProcessor(
        ngram_len=3, keys=[654, 400, 836], sampling_table_size=2**8, sampling_table_seed=0,
        context_history_size=64, device=torch.device("cpu"),
    )  # fmt: skip


STATEFUL = [
    Counter, Slotted, Buffer, closure, method, partial, noise, own_generator, hidden_iterator,
    synth_id,
]  # fmt: skip


@pytest.mark.parametrize("make", STATEFUL, ids=lambda make: make.__name__)
@pytest.mark.parametrize("drafts", [0, 4])
def test_state_across_calls_is_refused(model: Model, make: Callable[[], Any], drafts: int) -> None:
    processor = make()
    with pytest.raises(ValueError, match=r"^logits_processor: .*: keeps state across") as info:
        run(model, logits_processor=[favour, processor], num_assistant_tokens=drafts)
    if make is Counter:
        assert r"Counter: keeps state across calls (.calls changed in a call)" in str(info.value)


def test_guidance_by_a_second_cache_is_refused(folder: Path) -> None:
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    guidance = warpers.UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, theirs)
    model = load(folder, assistant_early_exit=1, device="cpu")
    with pytest.raises(ValueError, match="keeps state across calls"):
        run(model, logits_processor=[guidance])


STATELESS: dict[str, Callable[[], Any]] = {
    "bias, set up in the first call": lambda: warpers.SequenceBiasLogitsProcessor(
        {(5,): 2.0, (7, 9): -4.0, (11, 12, 13): 3.0}
    ),
    "bad words": lambda: warpers.NoBadWordsLogitsProcessor([[5], [7, 9]], eos_token_id=0),
    "prefix": lambda: warpers.PrefixConstrainedLogitsProcessor(
        lambda _, ids: list(range(int(ids[-1]) % 3, 64, 2)), 1
    ),
    "watermark, seeded by the prefix": lambda: warpers.WatermarkLogitsProcessor(64, "cpu"),
    "forced end": lambda: warpers.ForcedEOSTokenLogitsProcessor(12, [0]),
    "suppressed": lambda: warpers.SuppressTokensLogitsProcessor(list(range(1, 40, 2))),
    "penalty": lambda: warpers.RepetitionPenaltyLogitsProcessor(1.4),
    "typical": lambda: warpers.TypicalLogitsWarper(0.5),
}


@pytest.mark.parametrize("case", STATELESS)
def test_processors_of_transformers_that_keep_none(model: Model, theirs: Any, case: str) -> None:
    """Alone in a list or in transformers' own, greedy text is transformers'."""
    for prompt in tiny_prompts(6, seed=2):
        ids = prompt[None]
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
            pad_token_id=0, logits_processor=transformers.LogitsProcessorList([STATELESS[case]()]),
        )  # fmt: skip
        given = transformers.LogitsProcessorList([STATELESS[case]()])
        assert torch.equal(run(model, ids, logits_processor=given), want)
        assert torch.equal(run(model, ids, logits_processor=[STATELESS[case]()]), want)


def test_what_a_processor_holds() -> None:
    """Paths name what changed; what is left out is left out."""
    counter = Counter()
    before = contents(counter)
    counter.calls += 1
    assert {name for name in before if before[name] != contents(counter)[name]} == {".calls"}
    loop: list[Any] = [float("nan"), {"a": {1, 2}}, torch.Generator()]
    loop.append(loop)
    assert contents(loop) == contents(loop)
    assert len(contents(list(range(10**5)))) <= 2001


# --- custom processors that answer nonsense


def answer(value: Callable[[Tensor], Any]) -> list[Any]:
    return [lambda ids, scores: value(scores)]


def raising(input_ids: Tensor, scores: Tensor) -> Tensor:
    raise KeyError("mine")


def later(input_ids: Tensor, scores: Tensor) -> Any:
    return scores if input_ids.shape[1] < 6 else None


@pytest.mark.parametrize(
    ("processors", "error", "message"),
    [
        (answer(lambda s: None), TypeError, "expected float32 scores on cpu, got NoneType"),
        (answer(lambda s: s.tolist()), TypeError, "got list"),
        (answer(lambda s: s.double()), TypeError, "got torch.float64 on cpu"),
        (answer(lambda s: s.to("meta")), TypeError, "got torch.float32 on meta"),
        (answer(lambda s: s[0]), ValueError, r"expected scores of shape \[1, 64\], got \[64\]"),
        (answer(lambda s: s[:, :-1]), ValueError, r"shape \[1, 64\], got \[1, 63\]"),
        (answer(lambda s: s * torch.nan), ValueError, r"<lambda>: returned NaN or \+inf"),
        (answer(lambda s: s + torch.inf), ValueError, r"<lambda>: returned NaN or \+inf"),
        ([later], TypeError, "logits_processor: later: expected float32 scores"),
        ([raising], KeyError, "mine"),
        (favour, TypeError, "logits_processor: expected a list of callables, got function"),
        ([favour, 3], TypeError, "logits_processor: expected callables, got int"),
        ("favour", TypeError, "logits_processor: expected a list of callables, got str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_answers_that_are_no_scores(
    folder: Path, processors: Any, error: type[Exception], message: str
) -> None:
    """Named, with nothing left behind: threads, random state, a streamer without its end."""
    float32 = load(folder, assistant_early_exit=1, device="cpu")
    torch.set_num_threads(2)
    state, events = torch.get_rng_state(), []

    class Streamer:
        def put(self, value: Tensor) -> None:
            events.append(value.tolist())

        def end(self) -> None:
            events.append("end")

    with pytest.raises(error, match=message):
        run(float32, logits_processor=processors, streamer=Streamer())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert events == [] or (events[0], events[-1], events.count("end")) == ([5, 9, 17], "end", 1)
    assert torch.equal(run(float32), run(float32, logits_processor=[lambda _, scores: scores]))


def test_what_a_processor_does_to_its_arguments_is_its_own(model: Model) -> None:
    def spoil(input_ids: Tensor, scores: Tensor) -> Tensor:
        out = favour(input_ids, scores)
        input_ids.zero_()
        scores.fill_(torch.nan)
        return out

    def in_place(input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:] = favour(input_ids, scores)
        return scores

    want = run(model, logits_processor=[favour, favour])
    assert torch.equal(run(model, logits_processor=[spoil, in_place]), want)


def test_a_model_that_gives_nan_is_named_not_its_processor(folder: Path) -> None:
    broken = load(folder, assistant_early_exit=1, device="cpu", dtype="float64")
    broken.backbone.embedding[9] = torch.nan
    with pytest.raises(RuntimeError, match="sequence 0: error: NaN or infinite logits"):
        run(broken, logits_processor=[favour])
