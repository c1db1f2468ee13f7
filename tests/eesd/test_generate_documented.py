"""A walk over every argument of `generate` and every field of `GenerationConfig`: what each does.

An argument without a case here fails, as does one that its docstring does not name.
"""

import dataclasses
import inspect
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import half_agreeing_folder
from torch import Tensor

from eesd import GenerateOutput, GenerationConfig, Model, Posterior, generate, load
from eesd.controller import CostTable
from eesd.exit_head import ExitHead

IDS = torch.tensor([[32, 59, 28]])
COSTS = {"prefix": 0.1, "exit": 0.1, "rest": tuple(1.0 + 0.1 * n for n in range(9))}

CASES: dict[str, Callable[[Model], None]] = {}


def case(check: Callable[[Model], None]) -> Callable[[Model], None]:
    """A function of an argument's name is its case."""
    CASES[check.__name__] = check
    return check


@pytest.fixture(scope="module")
def tiny(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Vocabulary 64, end of text 0, float64; about half the drafts are accepted."""
    folder = half_agreeing_folder(make_llama, tmp_path_factory.mktemp("half") / "llama", 0.4)
    return load(folder, assistant_early_exit=1, device="cpu", dtype="float64")


def run(model: Model, ids: Tensor = IDS, *args: Any, **changes: Any) -> GenerateOutput:
    """A call that measures nothing, with its statistics."""
    options = {
        "max_new_tokens": 14, "assistant_costs": COSTS, "eos_token_id": (), "seed": 1,
        "return_dict_in_generate": True, **changes,
    }  # fmt: skip
    out = generate(model, ids, *args, **options)
    assert isinstance(out, GenerateOutput)
    return out


@case
def assistant_max_slowdown(tiny: Model) -> None:
    """With nothing to lose nothing is drafted; with little to lose, little at once."""
    sure = {"assistant_prior": (1e3, 1e-3)}
    first = [
        drafted(tiny, assistant_max_slowdown=most, **sure)[0][0] for most in (0.0, 0.005, None)
    ]
    assert first == [0, 2, 8]


def new(model: Model, ids: Tensor = IDS, *args: Any, **changes: Any) -> list[int]:
    """The first sequence's new tokens."""
    return run(model, ids, *args, **changes).sequences[0, ids.shape[1] :].tolist()


ARGUMENTS = [
    name
    for name, parameter in inspect.signature(generate).parameters.items()
    if parameter.kind is not inspect.Parameter.VAR_KEYWORD
]
FIELDS = [field.name for field in dataclasses.fields(GenerationConfig)]


def test_every_argument_has_a_case() -> None:
    assert set(CASES) == {*ARGUMENTS, *FIELDS}
    assert not set(ARGUMENTS) & set(FIELDS)


def test_every_argument_is_documented() -> None:
    for names, text in ((ARGUMENTS, generate.__doc__), (FIELDS, GenerationConfig.__doc__)):
        assert text is not None
        words = set(re.findall(r"[a-z_]+", text))
        assert set(names) <= words, set(names) - words


@pytest.mark.parametrize("name", [*ARGUMENTS, *FIELDS])
def test_argument(tiny: Model, name: str) -> None:
    CASES[name](tiny)


# --- arguments


@case
def model(tiny: Model) -> None:
    assert len(new(tiny)) == 14
    other = dataclasses.replace(tiny, exit_head=None)
    assert new(other, num_assistant_tokens=0) == new(tiny)


@case
def input_ids(tiny: Model) -> None:
    assert torch.equal(run(tiny).sequences[:, :3], IDS)
    assert new(tiny, IDS.flip(1)) != new(tiny)
    assert new(tiny, IDS.int()) == new(tiny)


@case
def attention_mask(tiny: Model) -> None:
    padded = torch.tensor([[7, 7, 32, 59, 28]])
    assert new(tiny, padded, torch.tensor([[0, 0, 1, 1, 1]])) == new(tiny)
    assert new(tiny, padded) != new(tiny)


@case
def generation_config(tiny: Model) -> None:
    config = GenerationConfig(max_new_tokens=3)
    options = {"generation_config": config, "eos_token_id": (), "assistant_costs": COSTS}
    assert generate(tiny, IDS, **options).shape == (1, 6)
    assert generate(tiny, IDS, **options, max_new_tokens=5).shape == (1, 8)


@case
def exit_head(tiny: Model) -> None:
    """One exit later: other drafts, the same text."""
    head = ExitHead.bare(tiny.backbone, 3, tiny.fingerprint)
    mine, other = (run(tiny, exit_head=given, num_assistant_tokens_schedule="constant")
                   for given in (None, head))  # fmt: skip
    assert torch.equal(mine.sequences, other.sequences)
    assert mine.speculative.per_step_accepted != other.speculative.per_step_accepted


@case
def streamer(tiny: Model) -> None:
    heard: list[Any] = []

    class Listener:
        def put(self, value: Tensor) -> None:
            heard.append(value.tolist())

        def end(self) -> None:
            heard.append("end")

    text = run(tiny, streamer=Listener()).sequences[0].tolist()
    assert heard[0] == [32, 59, 28]
    assert [token for part in heard[:-1] for token in part] == text
    assert heard[-1] == "end"


@case
def stopping_criteria(tiny: Model) -> None:
    out = run(tiny, stopping_criteria=[lambda ids, scores: ids.shape[1] == 8])
    assert out.sequences.shape == (1, 8)
    assert out.finish_reasons == ["stopping_criteria"]


@case
def logits_processor(tiny: Model) -> None:
    """Odd ids only behind even ones, even ids only behind odd ones."""

    def parity(ids: Tensor, scores: Tensor) -> Tensor:
        same = torch.arange(64) % 2 == ids[0, -1] % 2
        return scores.masked_fill(same, -torch.inf)

    text = [28, *new(tiny, logits_processor=[parity])]
    assert all((a + b) % 2 for a, b in itertools.pairwise(text))
    assert text[1:] == new(tiny, logits_processor=[parity], num_assistant_tokens=0)


@case
def tokenizer(tiny: Model) -> None:
    from tokenizers import Tokenizer, models

    letters = Tokenizer(models.WordLevel({chr(200 + i): i for i in range(64)}, chr(200)))
    text = new(tiny)
    stop = chr(200 + text[5])
    assert new(tiny, stop_strings=stop, tokenizer=letters) == text[: text.index(text[5]) + 1]
    assert new(tiny, stop_strings=stop) == text  # with the model's own it is another letter


@case
def seed(tiny: Model) -> None:
    texts = [new(tiny, do_sample=True, seed=n) for n in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    both = run(tiny, IDS.repeat(2, 1), do_sample=True, seed=[1, 2],
               num_assistant_tokens=0).sequences  # fmt: skip
    for row, n in zip(both[:, 3:].tolist(), (1, 2), strict=True):
        assert row == new(tiny, do_sample=True, seed=n, num_assistant_tokens=0)


@case
def return_dict_in_generate(tiny: Model) -> None:
    ids = generate(tiny, IDS, max_new_tokens=14, assistant_costs=COSTS, eos_token_id=())
    assert isinstance(ids, Tensor)
    assert torch.equal(ids, run(tiny).sequences)


# --- lengths and ends


@case
def max_new_tokens(tiny: Model) -> None:
    text = new(tiny)
    for longest in range(1, 14):
        assert new(tiny, max_new_tokens=longest) == text[:longest]


@case
def min_new_tokens(tiny: Model) -> None:
    ends = sorted(set(range(64)) - set(new(tiny)[6:9]))
    assert len(new(tiny, eos_token_id=ends)) < 7
    text = new(tiny, eos_token_id=ends, min_new_tokens=7)
    assert len(text) >= 8
    assert not set(text[:7]) & set(ends)


@case
def eos_token_id(tiny: Model) -> None:
    text = new(tiny)
    for ends in (text[4], (text[9], text[4]), [text[4]]):
        out = run(tiny, eos_token_id=ends)
        assert out.finish_reasons == ["eos"]
        assert out.sequences[0, 3:].tolist() == text[: text.index(text[4]) + 1]


@case
def pad_token_id(tiny: Model) -> None:
    end = new(tiny)[0]
    two = torch.tensor([[32, 59, 28], [8, 8, 21]])
    assert new(tiny, two, eos_token_id=end, pad_token_id=61)[1:3] == [61, 61]


@case
def stop_strings(tiny: Model) -> None:
    text = new(tiny)
    assert tiny.tokenizer is not None
    string = "".join(tiny.tokenizer.id_to_token(token) for token in text[3:5])
    for given in (string, [string], ("no such text", string)):
        out = run(tiny, stop_strings=given)
        assert out.finish_reasons == ["stop_string"]
        assert out.sequences[0, 3:].tolist() == text[:5]


# --- the law


@case
def do_sample(tiny: Model) -> None:
    assert new(tiny, seed=2) == new(tiny, seed=3)
    assert new(tiny, do_sample=True, seed=2) != new(tiny, do_sample=True, seed=3)


@case
def temperature(tiny: Model) -> None:
    assert new(tiny, do_sample=True, temperature=1e-4) == new(tiny)
    assert new(tiny, do_sample=True, temperature=9.0) != new(tiny, do_sample=True)


@case
def top_k(tiny: Model) -> None:
    assert new(tiny, do_sample=True, top_k=1, temperature=5.0) == new(tiny)
    out = run(tiny, do_sample=True, top_k=3, output_scores=True)
    assert {int(s.isfinite().sum()) for s in out.scores or ()} == {3}


@case
def top_p(tiny: Model) -> None:
    assert new(tiny, do_sample=True, top_p=1e-6, temperature=5.0) == new(tiny)
    wide, narrow = (
        run(tiny, do_sample=True, top_p=p, output_scores=True).scores or () for p in (0.95, 0.5)
    )
    assert int(narrow[0].isfinite().sum()) < int(wide[0].isfinite().sum()) < 64


@case
def min_p(tiny: Model) -> None:
    assert new(tiny, do_sample=True, min_p=1.0, temperature=5.0) == new(tiny)
    (first, *_) = run(tiny, do_sample=True, min_p=0.2, output_scores=True).scores or ()
    p = first.softmax(-1)
    assert 1 < int((p > 0).sum()) < 64
    assert float(p[p > 0].min()) >= 0.2 * float(p.max())


@case
def repetition_penalty(tiny: Model) -> None:
    text = new(tiny, repetition_penalty=50.0)
    assert len({*text, 32, 59, 28}) == 17
    assert new(tiny, repetition_penalty=1.0) == new(tiny) != text


@case
def no_repeat_ngram_size(tiny: Model) -> None:
    text = [32, 59, 28, *new(tiny, max_new_tokens=50, no_repeat_ngram_size=2)]
    pairs = list(itertools.pairwise(text))
    assert len(set(pairs)) == len(pairs)
    free = [32, 59, 28, *new(tiny, max_new_tokens=50)]
    assert len(set(itertools.pairwise(free))) < len(free) - 1


@case
def num_return_sequences(tiny: Model) -> None:
    """A prompt's texts stand together, and are those of the same batch of its own."""
    two = torch.tensor([[32, 59, 28], [8, 8, 21]])
    out = run(tiny, two, do_sample=True, num_return_sequences=3)
    assert torch.equal(out.sequences[:, :3], two.repeat_interleave(3, 0))
    assert len({tuple(row) for row in out.sequences.tolist()}) == 6
    again = run(tiny, two.repeat_interleave(3, 0), do_sample=True)
    assert torch.equal(out.sequences, again.sequences)
    assert len(out.finish_reasons) == len(out.speculative.per_step_drafted) == 6
    seeds = run(tiny, two, do_sample=True, num_return_sequences=2, seed=[4, 4, 5, 6]).sequences
    assert torch.equal(seeds[0], seeds[1])
    with pytest.raises(ValueError, match=r"num_return_sequences: greedy decoding .* got 2"):
        run(tiny, num_return_sequences=2)
    with pytest.raises(ValueError, match="seed: expected 4 seeds, one a sequence, got 2"):
        run(tiny, two, do_sample=True, num_return_sequences=2, seed=[4, 5])


@case
def output_scores(tiny: Model) -> None:
    out = run(tiny, output_scores=True)
    assert out.scores is not None
    assert [int(s.argmax()) for s in out.scores] == out.sequences[0, 3:].tolist()
    assert run(tiny).scores is None


@case
def output_logits(tiny: Model) -> None:
    out = run(tiny, output_logits=True, output_scores=True, repetition_penalty=1.3)
    assert out.logits is not None
    assert out.scores is not None
    for n, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        seen = out.sequences[0, : 3 + n]
        assert set((logits != scores).nonzero()[:, 1].tolist()) == set(seen.tolist())
    assert run(tiny).logits is None


# --- drafting


def drafted(model: Model, **changes: Any) -> list[list[int]]:
    """Draft lengths of each round, with text that does not depend on them."""
    out = run(model, **changes)
    assert out.sequences[0, 3:].tolist() == new(model)
    return out.speculative.per_step_drafted


@case
def num_assistant_tokens(tiny: Model) -> None:
    for longest in (0, 1, 5):
        steps = drafted(
            tiny, num_assistant_tokens=longest, num_assistant_tokens_schedule="constant"
        )
        assert max(steps[0]) == longest


@case
def num_assistant_tokens_schedule(tiny: Model) -> None:
    seen = {}
    for schedule in ("thompson", "cost", "calibrated", "bernoulli", "constant"):
        options = {"num_assistant_tokens_schedule": schedule, "max_new_tokens": 40}
        seen[schedule] = run(tiny, **options).speculative.per_step_drafted
        assert max(seen[schedule][0]) > 0
    assert seen["thompson"] == seen["cost"]
    others = [str(steps) for name, steps in seen.items() if name != "thompson"]
    assert len(set(others)) == 4


@case
def draft(tiny: Model) -> None:
    assert new(tiny, draft="linear") == new(tiny)
    with pytest.raises(ValueError, match="draft: expected one of linear, got 'tree'"):
        run(tiny, draft="tree")


@case
def assistant_confidence_threshold(tiny: Model) -> None:
    """At 0 off, at 1 nothing is drafted; between, the surer drafts, under every schedule."""
    for schedule in ("thompson", "calibrated", "bernoulli", "constant"):
        options = {"num_assistant_tokens_schedule": schedule, "max_new_tokens": 40}
        rates, lengths = [], []
        for threshold in (0.0, 0.6, 1.0):
            stats = run(tiny, assistant_confidence_threshold=threshold, **options).speculative
            rates.append(stats.draft_acceptance_rate)
            lengths.append(stats.num_draft_tokens)
            assert new(tiny, assistant_confidence_threshold=threshold) == new(tiny)
        assert lengths[0] > lengths[2] == 0
        if schedule == "constant":
            assert lengths[0] > lengths[1] > 0
            assert rates[1] > rates[0]


@case
def assistant_sampling(tiny: Model) -> None:
    options = {"do_sample": True, "num_assistant_tokens_schedule": "constant"}
    texts = {how: new(tiny, assistant_sampling=how, **options)
             for how in ("rejection", "coupled", "block")}  # fmt: skip
    assert texts["coupled"] == new(tiny, do_sample=True, num_assistant_tokens=0)
    assert texts["rejection"] != texts["coupled"] != texts["block"]


@case
def assistant_costs(tiny: Model) -> None:
    """Where drafts cost much, none are made."""
    dear = {**COSTS, "exit": 100.0}
    assert drafted(tiny, assistant_costs=dear) == [[0] * 14]
    assert sum(drafted(tiny, assistant_costs=COSTS)[0]) > 0
    assert run(tiny, assistant_costs=dear).speculative.costs == CostTable(**dear)


@case
def assistant_posterior(tiny: Model) -> None:
    """Of drafts that are never accepted, and of some that always are."""
    never, always = (
        Posterior(torch.tensor([a]), torch.tensor([b])) for a, b in ((1e-3, 1e3), (1e3, 1e-3))
    )
    options = {"assistant_discount": 1.0}
    assert drafted(tiny, assistant_posterior=never, **options) == [[0] * 14]
    assert max(drafted(tiny, assistant_posterior=always, **options)[0]) == 8


@case
def assistant_prior(tiny: Model) -> None:
    assert drafted(tiny, assistant_prior=(1e-3, 1e3)) == [[0] * 14]
    assert max(drafted(tiny, assistant_prior=[1e3, 1e-3])[0]) == 8
    plain = run(tiny, assistant_prior=(3, 4), num_assistant_tokens=0)
    assert plain.speculative.posterior.marginal() == [(3.0, 4.0)]


@case
def assistant_discount(tiny: Model) -> None:
    """0 remembers the last round alone, 1 every one."""
    options = {"assistant_prior": (1.0, 2.0), "num_assistant_tokens_schedule": "constant"}
    for discount in (0.0, 1.0):
        stats = run(tiny, assistant_discount=discount, **options).speculative
        rounds = list(zip(stats.per_step_drafted[0], stats.per_step_accepted[0], strict=True))
        counted = rounds if discount else rounds[-1:]
        want = 1.0 + sum(m for _, m in counted), 2.0 + sum(m < n for n, m in counted)
        assert stats.posterior.marginal() == [pytest.approx(want)]


@case
def assistant_share_posterior(tiny: Model) -> None:
    three = torch.tensor([[32, 59, 28], [8, 8, 21], [30, 31, 32]])
    own, shared = (
        run(tiny, three, assistant_share_posterior=share).speculative.posterior
        for share in (False, True)
    )
    assert len(set(own.marginal())) > 1
    assert len(set(shared.marginal())) == 1
