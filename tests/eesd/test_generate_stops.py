"""What ends a text: stop strings, criteria, several ends of text; also inside an accepted run."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import half_agreeing_folder, left_pad, tiny_prompts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from eesd import Model, generate, load
from eesd.loading import demo_folder
from eesd.stop_strings import StopStrings, token_bytes

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 9, 17]])
COSTS = {"prefix": 0.1, "exit": 0.1, "rest": tuple(1.0 + 0.1 * n for n in range(9))}


@pytest.fixture(scope="module")
def folder(make_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nearly every draft is accepted, so most ends fall inside a run."""
    return half_agreeing_folder(make_llama, tmp_path_factory.mktemp("half") / "llama", 0.15)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    """A token a character, float64."""
    return load(folder, assistant_early_exit=1, device="cpu", dtype="float64")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)


def run(model: Model, ids: Tensor = IDS, *args: Any, **changes: Any) -> Any:
    """Rounds of five drafts, with statistics."""
    options = {
        "max_new_tokens": 12, "assistant_costs": COSTS, "num_assistant_tokens": 5,
        "num_assistant_tokens_schedule": "constant", "return_dict_in_generate": True,
        "eos_token_id": (), **changes,
    }  # fmt: skip
    return generate(model, ids, *args, **options)


def fast(tokenizer: Tokenizer) -> Any:
    """The same as a tokenizer of transformers."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# --- matching, against transformers' criterion


def byte_fallback() -> Tokenizer:
    """Pieces with a marked space and bytes, as in Llama 2."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *"abcdefghijklmnopqrstuvwxyz.", "▁the", "▁th", "he", "e.", "▁a", "st", "op"]
    words += ["stop", "per", "opera", "é", "▁stop", "s."]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    return tokenizer


def word_pieces() -> Tokenizer:
    """Pieces that continue a word are marked."""
    words = ["[UNK]", *"abcdefghijklmnopqrst", *(f"##{c}" for c in "abcdefghijklmnopqrst")]
    words += ["stop", "##op", "##opera", "st", "the", "##s", "op"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def byte_level() -> Tokenizer:
    """The demo model's."""
    return Tokenizer.from_file(str(demo_folder() / "tokenizer.json"))


@pytest.mark.parametrize("make", [byte_fallback, word_pieces, byte_level])
@pytest.mark.parametrize("kind", ["tokenizers", "transformers"])
def test_a_match_is_one_of_transformers(make: Callable[[], Tokenizer], kind: str) -> None:
    """Random ids, and strings cut out of what they mean, so that matches begin and end anywhere."""
    tokenizer = make()
    theirs = fast(tokenizer)
    text_of = token_bytes(tokenizer)
    rng = random.Random(3)
    # Few ids, so that strings are met again, and those that few cases would meet.
    size = tokenizer.get_vocab_size()
    vocabulary = rng.sample(range(size), 20) + rng.sample(range(size - 25, size), 20)
    met = ended_in_the_middle = 0
    for _ in range(16):
        words = rng.choices(vocabulary, k=60)
        whole = b"".join(text_of(word) or b"" for word in words).decode(errors="ignore")
        strings = []
        for _ in range(3):
            start = rng.randrange(len(whole) - 8)
            strings.append(whole[start : start + rng.randint(1, 7)])
        criterion = transformers.StopStringCriteria(theirs, strings)
        ours = StopStrings(strings, tokenizer if kind == "tokenizers" else theirs)
        for n in range(1, len(words) + 1):
            want = bool(criterion(torch.tensor([words[:n]]), None))
            assert ours.end_in(words[:n]) == want, (strings, words[:n])
            met += want
            ended = b"".join(text_of(word) or b"" for word in words[:n])
            ended_in_the_middle += want and not any(ended.endswith(s.encode()) for s in strings)
    assert met > 20
    assert ended_in_the_middle > 3


@pytest.mark.parametrize(
    ("tokens", "met"),
    [
        (["st", "op"], True),
        (["stop"], True),
        (["st", "opera"], True),
        (["▁", "s", "t", "opera"], True),
        (["stop", "per"], False),
        (["st", "op", "a"], False),
        (["s", "t", "per"], False),
        (["op"], False),
    ],
    ids=str,
)
def test_examples_of_transformers_documentation(tokens: list[str], met: bool) -> None:
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert StopStrings(["stop"], tokenizer).end_in(ids) == met


def test_characters_of_several_tokens() -> None:
    """A string is met when its last byte comes."""
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "naïve 日".encode()]
    stops = StopStrings(["ï", "日"], tokenizer)
    assert [stops.end_in(ids[: n + 1]) for n in range(len(ids))] == [
        False, False, False, True, False, False, False, False, False, True,
    ]  # fmt: skip


def test_ids_without_a_token_join_nothing() -> None:
    tokenizer = byte_fallback()
    s, t = (tokenizer.token_to_id(c) for c in "st")
    stops = StopStrings(["st"], tokenizer)
    assert stops.end_in([10**6, s, t])
    assert not stops.end_in([s, 10**6, t])
    assert not stops.end_in([s, t, 10**6])


class Slow:
    """A tokenizer of transformers that is written in Python."""

    def tokenize(self, text: str) -> list[str]:
        return list(text)

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return chr(token) if token < 128 else None

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_a_tokenizer_written_in_python() -> None:
    stops = StopStrings(["is"], Slow())
    assert [stops.end_in([ord(c) for c in "this"[: n + 1]]) for n in range(4)] == [
        False, False, False, True,
    ]  # fmt: skip


# --- stop strings in a text


def test_stop_strings_end_where_transformers_ends(model: Model, theirs: Any, folder: Path) -> None:
    """40 prompts, strings of one to three characters taken from the texts: drafting and plainly."""
    prompts = tiny_prompts(40, seed=5)
    ids, mask = left_pad(prompts)
    whole = run(model, ids, mask).sequences[:, ids.shape[1] :]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    rng, inside, reasons = random.Random(0), set(), []
    for prompt, new in zip(prompts, whole, strict=True):
        text = "".join(token_text(model, token) for token in new.tolist())
        start = rng.randrange(3, 10)
        strings = [text[start : start + rng.randint(1, 3)], "never this"]
        want = theirs.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=12,
            do_sample=False, pad_token_id=0, eos_token_id=None, stop_strings=strings,
            tokenizer=tokenizer,
        )  # fmt: skip
        out = run(model, prompt[None], stop_strings=strings)
        assert torch.equal(out.sequences, want)
        plain = run(model, prompt[None], stop_strings=tuple(strings), num_assistant_tokens=0)
        assert torch.equal(plain.sequences, want)
        assert plain.finish_reasons == out.finish_reasons
        reasons += out.finish_reasons
        inside.add(sum(n + 1 for n in out.speculative.per_step_accepted[0]) - want.shape[1])
    assert set(reasons) <= {"stop_string", "length"}
    assert reasons.count("stop_string") > 30
    assert len(inside) > 3  # cut at several places of a run


def token_text(model: Model, token: int) -> str:
    assert model.tokenizer is not None
    return (token_bytes(model.tokenizer)(token) or b"").decode()


def test_stop_strings_in_a_batch(model: Model) -> None:
    """Each text ends by itself, at what it alone ends at; a prompt's padding is no text."""
    prompts = tiny_prompts(12, seed=6)
    ids, mask = left_pad(prompts)
    strings = ["a", "7", "th", "endoftext|>" + token_text(model, int(prompts[0][0]))]
    out = run(model, ids, mask, stop_strings=strings, pad_token_id=63, max_new_tokens=20)
    assert {"stop_string", "length"} == set(out.finish_reasons)
    for b, prompt in enumerate(prompts):
        alone = run(model, prompt[None], stop_strings=strings, max_new_tokens=20)
        new = alone.sequences[0, len(prompt) :].tolist()
        row = out.sequences[b, ids.shape[1] :].tolist()
        assert row == new + [63] * (len(row) - len(new))
        assert out.finish_reasons[b] == alone.finish_reasons[0]
        # What lies behind the cut was dropped, and the posterior saw it.
        steps, drafted = (s[b] for s in (
            out.speculative.per_step_accepted, out.speculative.per_step_drafted
        ))  # fmt: skip
        assert sum(n + 1 for n in steps[:-1]) < len(new) <= sum(n + 1 for n in steps)
        assert len(steps) == len(drafted)


def test_a_stop_string_that_begins_in_the_prompt(model: Model) -> None:
    new = run(model).sequences[0, 3:].tolist()
    string = token_text(model, 17) + token_text(model, new[0])
    out = run(model, stop_strings=string)
    assert out.finish_reasons == ["stop_string"]
    assert out.sequences[0, 3:].tolist() == new[:1]
    whole = run(model, stop_strings=token_text(model, 9) + token_text(model, 17))
    assert whole.finish_reasons == ["length"]  # it ends in the prompt: nothing is met


def test_stop_strings_with_another_tokenizer(model: Model, folder: Path) -> None:
    """One in which every id has another letter; of transformers or of tokenizers."""
    vocabulary = {chr(200 + i): i for i in range(64)}
    other = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(200)))
    new = run(model).sequences[0, 3:].tolist()
    for tokenizer in (other, fast(other)):
        out = run(model, stop_strings=chr(200 + new[4]), tokenizer=tokenizer)
        assert out.sequences[0, 3:].tolist() == new[: new.index(new[4]) + 1]


def test_stop_strings_without_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    bare = load(tmp_path, assistant_early_exit=1, device="cpu")
    with pytest.raises(ValueError, match=r"stop_strings: .* has no tokenizer; give one"):
        run(bare, stop_strings="a")
    whole = json.loads((folder / "tokenizer.json").read_text())
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    assert run(bare, stop_strings="a", tokenizer=tokenizer).finish_reasons[0] in (
        "stop_string", "length",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop_strings": ""}, ValueError, "stop_strings: expected no empty string"),
        ({"stop_strings": ["a", ""]}, ValueError, "stop_strings: expected no empty string"),
        ({"stop_strings": ["a", 3]}, TypeError, "stop_strings: expected strings, got 3"),
        ({"stop_strings": 3}, TypeError, "stop_strings: expected a string or several, got 3"),
        ({"stop_strings": b"a"}, TypeError, "stop_strings: expected a string or several"),
        ({"tokenizer": 3}, TypeError, r"tokenizer: expected a tokenizers\.Tokenizer or .*got int"),
        ({"tokenizer": "demo"}, TypeError, "tokenizer: expected .* got str"),
        ({"stopping_criteria": len}, TypeError, "stopping_criteria: expected a list of callables"),
        ({"stopping_criteria": [3]}, TypeError, "stopping_criteria: expected callables, got int"),
    ],
    ids=str,
)
def test_bad_stops(
    model: Model, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        run(model, **options)


# --- criteria


def test_a_criterion_ends_a_text_inside_a_run(model: Model) -> None:
    """At every length in turn, as a bool, a tensor or numpy's; it sees each prefix once."""
    whole = run(model, max_new_tokens=14).sequences[0].tolist()
    for length in range(4, 15):
        seen: list[list[int]] = []

        def long_enough(
            ids: Tensor, scores: Any, length: int = length, seen: list[list[int]] = seen
        ) -> Any:
            assert ids.dtype is torch.int64
            assert scores is None
            seen.append(ids[0].tolist())
            met = ids.shape[1] >= length
            return (met, torch.tensor([met]), np.bool_(met))[length % 3]

        out = run(model, stopping_criteria=[long_enough], max_new_tokens=14)
        assert out.sequences[0].tolist() == whole[:length]
        assert out.finish_reasons == ["stopping_criteria"]
        assert seen == [whole[:n] for n in range(4, length + 1)]
        stats = out.speculative
        accepted = sum(stats.per_step_accepted[0]) + stats.num_spec_steps
        assert accepted - (length - 3) in (0, 1)


def test_criteria_of_transformers(model: Model, theirs: Any) -> None:
    """Alone and in their list; what a criterion remembers is its own affair."""
    kinds = transformers.generation.stopping_criteria
    for prompt in tiny_prompts(40, seed=9):
        length = len(prompt) + 7
        make = lambda length=length: transformers.StoppingCriteriaList(  # noqa: E731
            [kinds.MaxLengthCriteria(length), kinds.EosTokenCriteria([9, 30, 41])]
        )
        want = theirs.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=12,
            do_sample=False, pad_token_id=0, eos_token_id=None, stopping_criteria=make(),
        )  # fmt: skip
        for drafts in (0, 5):
            out = run(model, prompt[None], stopping_criteria=make(), num_assistant_tokens=drafts)
            assert torch.equal(out.sequences, want)
            assert out.finish_reasons == ["stopping_criteria"]


def test_time_is_up(model: Model) -> None:
    criterion = transformers.MaxTimeCriteria(0.0, time.time() - 1)
    out = run(model, stopping_criteria=[criterion])
    assert out.sequences.shape == (1, 4)


def test_criteria_see_scores(model: Model) -> None:
    """With output_scores: those so far, the newest last."""
    lengths = []

    def look(ids: Tensor, scores: tuple[Tensor, ...]) -> bool:
        lengths.append((len(scores), ids.shape[1] - 3))
        assert scores[-1].shape == (1, 64)
        assert int(scores[-1].argmax()) == int(ids[0, -1])
        return False

    run(model, stopping_criteria=[look], output_scores=True)
    assert lengths == [(n, n) for n in range(1, 13)]


def test_criteria_in_a_batch(model: Model) -> None:
    """One sequence at a time, without its padding."""
    prompts = tiny_prompts(8, seed=11)
    ids, mask = left_pad(prompts)

    def long_enough(ids: Tensor, scores: Any) -> bool:
        assert ids.shape[0] == 1
        assert any(torch.equal(ids[0, : len(p)], p) for p in prompts)
        return ids.shape[1] >= 14

    out = run(model, ids, mask, stopping_criteria=[long_enough])
    for prompt, reason, steps in zip(
        prompts, out.finish_reasons, out.speculative.per_step_accepted, strict=True
    ):
        assert reason == ("stopping_criteria" if 14 - len(prompt) <= 12 else "length")
        assert sum(n + 1 for n in steps) >= min(12, 14 - len(prompt))


def test_which_reason_is_given(model: Model) -> None:
    """End of text, string, criterion, length: the first of these that holds at the last token."""
    new = run(model).sequences[0, 3:].tolist()
    first = new.index(new[5])
    text = token_text(model, new[5])
    here = [lambda ids, _: ids.shape[1] - 3 == first + 1]
    every = {"eos_token_id": new[5], "stop_strings": text, "stopping_criteria": here}
    every["max_new_tokens"] = first + 1
    for reason in ("eos", "stop_string", "stopping_criteria", "length"):
        out = run(model, **every)
        assert out.finish_reasons == [reason]
        assert out.sequences[0, 3:].tolist() == new[: first + 1]
        every.pop({"eos": "eos_token_id", "stop_string": "stop_strings"}.get(reason, reason), None)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "NoneType"),
        (1, "int"),
        (torch.tensor([1]), "torch.int64"),
        (torch.tensor([True, False]), r"torch.bool \[2\]"),
        ("yes", "str"),
    ],
    ids=str,
)
def test_a_criterion_that_answers_nonsense(folder: Path, value: Any, got: str) -> None:
    """Named; threads and the random state are as before."""
    float32 = load(folder, assistant_early_exit=1, device="cpu")
    torch.set_num_threads(2)
    state = torch.get_rng_state()

    def strange(ids: Tensor, scores: Any) -> Any:
        return value if ids.shape[1] > 6 else False

    with pytest.raises(TypeError, match=f"strange: expected a bool or a bool tensor .* got {got}"):
        run(float32, stopping_criteria=[strange])
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.equal(torch.get_rng_state(), state)


# --- what others see of a cut run


def test_streamer_and_posterior_of_a_cut_run(model: Model) -> None:
    """The streamer hears the cut run; the posterior knows the uncut one."""
    heard: list[int] = []

    class Listener:
        def put(self, value: Tensor) -> None:
            heard.extend(value.tolist())

        def end(self) -> None:
            heard.append(-1)

    rounds = run(model).speculative
    drafted, accepted = rounds.per_step_drafted[0][0], rounds.per_step_accepted[0][0]
    assert accepted >= 3
    out = run(model, stopping_criteria=[lambda ids, _: ids.shape[1] >= 5], streamer=Listener())
    assert heard == [*out.sequences[0].tolist(), -1]
    assert out.sequences.shape == (1, 5)
    stats = out.speculative
    assert stats.per_step_accepted == [[2]]
    assert stats.per_step_drafted == [[drafted]]
    # Half the head's flat prior, and all that were accepted.
    failed = accepted < drafted
    assert stats.posterior.marginal() == [pytest.approx((0.5 + accepted, 0.5 + failed))]
