"""The `eesd` command, used as a user uses it, with the demo model."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import eesd
from eesd import controller
from eesd.cli import COMMANDS, main
from eesd.cli import compare as compare_module
from eesd.cli.generate import EXAMPLES, SCHEDULES
from eesd.cli.streaming import Detokenizer, TextStreamer
from eesd.loading import demo_folder

PROMPT = "Tom has 4 boxes of 6 pens. How many pens does he have?\n"
FEW = ["--max-new-tokens", "6"]
PATIENCE = 60.0  # seconds a child may take to end, on a busy machine


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for a prompt from whoever runs the tests."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))


@pytest.fixture(scope="module")
def expected() -> str:
    """Plain greedy decoding's text."""
    model = eesd.load("demo", device="cpu")
    ids = model.encode(PROMPT)
    out = eesd.generate(model, ids, max_new_tokens=6, num_assistant_tokens=0)
    assert isinstance(out, torch.Tensor)
    return model.decode(out[0, ids.shape[1] :])


def generate(*options: str) -> int:
    return main(["generate", "--device", "cpu", *options])


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes, *, terminal: bool = False) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(content))
    monkeypatch.setattr(stdin, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdin", stdin)


@pytest.mark.parametrize("arguments", [[], *[[name] for name in COMMANDS]], ids=str)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: eesd")
    assert all(name in text for name in (arguments or COMMANDS))


def test_schedules_are_those_of_the_controller() -> None:
    """Help states them without loading torch."""
    assert set(SCHEDULES) == set(controller.SCHEDULES)


def test_version(capsys: pytest.CaptureFixture) -> None:
    from eesd_kernels import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"eesd {__version__}\n"


def test_prompt_as_argument(expected: str, capsys: pytest.CaptureFixture) -> None:
    assert generate(PROMPT, *FEW) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_prompt_from_file(expected: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT, encoding="utf-8")
    assert generate("--file", str(path), *FEW) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("dash", [[], ["-"]], ids=["pipe", "dash"])
def test_prompt_from_standard_input(
    dash: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    piped(monkeypatch, PROMPT.encode())
    assert generate(*dash, *FEW) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_no_prompt_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    piped(monkeypatch, b"", terminal=True)
    assert generate(*FEW) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert f"built-in example prompt: {EXAMPLES['math'].strip()}" in captured.err
    assert generate("--model", str(tmp_path)) == 2
    assert "prompt: none given" in capsys.readouterr().err


def report_of(capsys: pytest.CaptureFixture, *options: str) -> dict[str, Any]:
    assert generate(*options, "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    report: dict[str, Any] = json.loads(out)
    return report


def test_json(expected: str, capsys: pytest.CaptureFixture) -> None:
    report = report_of(capsys, PROMPT, *FEW)
    assert report["text"] == expected
    assert report["new_tokens"] == len(report["token_ids"]) == 6
    assert report["tokens_per_s"] > 0
    for name in ("ids_equal", "speedup", "plain_tokens_per_s", "repeats", "first_difference"):
        assert report[name] is None, name
    assert report["mean_acceptance_length"] >= 1
    assert sum(report["acceptance_histogram"]) == report["num_spec_steps"]
    assert (report["mode"], report["exit_layer"]) == ("greedy", 1)


def test_json_of_a_comparison(expected: str, capsys: pytest.CaptureFixture) -> None:
    report = report_of(capsys, PROMPT, *FEW, "--compare", "--repeats", "1")
    assert report["ids_equal"] is True
    assert report["text"] == expected
    assert report["speedup"] == pytest.approx(report["tokens_per_s"] / report["plain_tokens_per_s"])


@pytest.mark.parametrize("example", EXAMPLES)
def test_greedy_ids_equal_plain_ones(example: str, capsys: pytest.CaptureFixture) -> None:
    options = ["--example", example, "--max-new-tokens", "48", "--compare", "--repeats", "1"]
    assert report_of(capsys, *options)["ids_equal"] is True


def test_coupled_sampling_equals_plain_sampling(capsys: pytest.CaptureFixture) -> None:
    options = ["--temperature", "0.9", "--top-p", "0.95", "--seed", "7", "--max-new-tokens", "32"]
    coupled = report_of(
        capsys, PROMPT, *options, "--assistant-sampling", "coupled", "--compare", "--repeats", "1"
    )
    assert coupled["ids_equal"] is True
    assert (coupled["mode"], coupled["seed"]) == ("sampled", 7)
    plain = report_of(capsys, PROMPT, *options, "--num-assistant-tokens", "0")
    assert plain["token_ids"] == coupled["token_ids"]


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--stop", "o", "--stop", "e"], {"stop_strings": ["o", "e"]}),
        (["--repetition-penalty", "1.5"], {"repetition_penalty": 1.5}),
        (["--no-repeat-ngram-size", "1"], {"no_repeat_ngram_size": 1}),
        (["--min-new-tokens", "30", "--repetition-penalty", "4"],
         {"min_new_tokens": 30, "repetition_penalty": 4.0}),
        (["--confidence-threshold", "0.5"], {"assistant_confidence_threshold": 0.5}),
        (["--sample", "--assistant-sampling", "block", "--schedule", "constant"],
         {"do_sample": True, "assistant_sampling": "block",
          "num_assistant_tokens_schedule": "constant"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_options_reach_generate(
    options: list[str], arguments: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    report = report_of(capsys, PROMPT, "--max-new-tokens", "32", *options)
    model = eesd.load("demo", device="cpu")
    ids = model.encode(PROMPT)
    want = eesd.generate(model, ids, max_new_tokens=32, seed=0, **arguments)
    assert report["token_ids"] == want[0, ids.shape[1] :].tolist()  # type: ignore[index]


def test_temperature_0_is_greedy(expected: str, capsys: pytest.CaptureFixture) -> None:
    report = report_of(capsys, PROMPT, *FEW, "--temperature", "0")
    assert (report["mode"], report["text"]) == ("greedy", expected)


def test_comparison_table(expected: str, capsys: pytest.CaptureFixture) -> None:
    assert generate(PROMPT, *FEW, "--compare", "--repeats", "1") == 0
    text, _, table = capsys.readouterr().out.partition("\n\n")
    assert text == expected
    rows = dict(line.split(maxsplit=1) for line in table.splitlines())
    assert rows["ids"] == "equal"
    assert rows["speculative"].endswith("tokens/s")
    assert rows["measured"].startswith("median of 1 runs each, in turn")
    assert {"plain", "speed-up", "acceptance", "drafts", "accepted"} <= set(rows)


def test_sampled_texts_may_differ(capsys: pytest.CaptureFixture) -> None:
    options = ["--sample", "--seed", "3", "--max-new-tokens", "32", "--compare", "--repeats", "1"]
    assert generate(PROMPT, *options) == 0
    assert "rejection sampling keeps the distribution" in capsys.readouterr().out


def test_a_difference_is_located(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A plain decoder that errs in its fourth token is found out; the status stays 0."""
    timed = compare_module.run_timed

    def wrong(model: Any, ids: Any, config: Any, seed: int, streamer: Any = None) -> Any:
        output, speed = timed(model, ids, config, seed, streamer)
        if config.num_assistant_tokens == 0 and config.max_new_tokens == 6:
            output.sequences[0, ids.shape[1] + 3] = 100
        return output, speed

    monkeypatch.setattr(compare_module, "run_timed", wrong)
    report = report_of(capsys, PROMPT, *FEW, "--compare", "--repeats", "1")
    assert report["ids_equal"] is False
    assert report["first_difference"] == 3
    assert report["logit_gap"] < 0
    assert generate(PROMPT, *FEW, "--compare", "--repeats", "1") == 0
    assert "differ from new token 3 on (plain logits -" in capsys.readouterr().out


def test_a_useless_exit_head_is_warned_of(capsys: pytest.CaptureFixture) -> None:
    options = ["--early-exit", "1", "--schedule", "constant", "--max-new-tokens", "24"]
    assert main(["generate", "--device", "cpu", EXAMPLES["math"], *options]) == 0
    assert "eesd: warning: 1 of 148 draft tokens were accepted" in capsys.readouterr().err


ERRORS: dict[str, tuple[list[str], str]] = {
    "model": (["--model", "no-such-folder", PROMPT], "no-such-folder: no such model folder"),
    "exit head": (["--exit-head", "no-such-folder", PROMPT], "no-such-folder"),
    "device": (["--device", "toaster", PROMPT], "device: expected cpu or cuda[:n]"),
    "dtype": (["--dtype", "int3", PROMPT], "dtype: expected one of"),
    "threads": (["--threads", "0", PROMPT], "--threads: expected 1 or more"),
    "temperature": (["--temperature", "-1", PROMPT], "temperature: expected above 0"),
    "NaN": (["--temperature", "nan", PROMPT], "temperature: expected above 0"),
    "top-p": (["--top-p", "1.5", PROMPT], "top_p: expected above 0, at most 1"),
    "empty": ([""], "prompt: it is empty"),
    "blank": (["\n"], "prompt: it is empty"),
    "nothing piped": ([], "prompt: it is empty"),
    "no file": (["--file", "no-such-file"], "no-such-file"),
    "two prompts": (["--file", "no-such-file", PROMPT], "give one"),
    "too long": (["word " * 1100], "is more than the model's 1024 positions"),
    "no room": (["--max-new-tokens", "1020", PROMPT], "is more than the model's 1024 positions"),
    "no tokens": (["--max-new-tokens", "0", PROMPT], "max_new_tokens: expected 1 or more"),
    "repeats": (["--compare", "--repeats", "0", PROMPT], "--repeats: expected 1 or more"),
    "compare": (["--compare", "--num-assistant-tokens", "0", PROMPT], "plain decoding already"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert generate(*options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("eesd: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_prompt_that_is_not_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "prompt.bin"
    path.write_bytes(b"\xff\xfe\x00")
    assert generate("--file", str(path)) == 2
    assert "not UTF-8 text" in capsys.readouterr().err


def test_traceback_on_request(capsys: pytest.CaptureFixture) -> None:
    assert generate("--model", "no-such-folder", PROMPT, "--traceback") == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def start(*options: str) -> subprocess.Popen[bytes]:
    """A long generation as a process of its own, Ctrl-C enabled whoever started us."""
    command = [sys.executable, "-m", "eesd.cli", "generate", "--device", "cpu", "--threads", "1"]
    forever = ["--sample", "--temperature", "1.5", "--max-new-tokens", "900"]
    return subprocess.Popen(
        [*command, *forever, *options, PROMPT],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def test_interrupt() -> None:
    with start() as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        assert child.wait(PATIENCE) == 130
        child.stdout.read()
        assert child.stderr.read().decode() == "eesd: interrupted\n"


def test_broken_pipe_is_quiet() -> None:
    with start() as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(1)
        child.stdout.close()
        assert child.wait(PATIENCE) == 128 + signal.SIGPIPE
        assert child.stderr.read() == b""


def test_info(capsys: pytest.CaptureFixture) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["isa"] in ("generic", "avx2", "avx512")
    assert report["ops"]["verify_linear"].keys() == {"cpu", "cuda"}
    head = report["model"]["exit_head"]
    recipe = json.loads((demo_folder() / "exit_head" / "config.json").read_text())["recipe"]
    assert head["fits"] is True
    assert head["agreement"] == recipe["agreement"]
    assert report["model"]["layers"] == 24

    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in ("versions", "devices", "verify_linear", "model demo", "exit head", "prior Beta("):
        assert part in text


def test_info_of_a_model_without_a_head(tiny_llama: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["info", "--model", str(tiny_llama)]) == 0
    assert "none (train one with eesd distill)" in capsys.readouterr().out
    assert main(["info", "--model", "no-such-folder"]) == 2
    assert capsys.readouterr().err == "eesd: error: no-such-folder: no such model folder\n"


def test_info_of_a_head_that_does_not_fit(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    head = shutil.copytree(demo_folder() / "exit_head", tmp_path / "head")
    assert main(["info", "--model", str(tiny_llama), "--exit-head", str(head)]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_info_of_an_empty_head_folder(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    (folder / "exit_head").mkdir()
    assert main(["info", "--model", str(folder)]) == 0
    assert "none (train one with eesd distill)" in capsys.readouterr().out


def test_info_of_a_head_that_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    head = shutil.copytree(demo_folder() / "exit_head", tmp_path / "head")
    weights = head / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["info", "--exit-head", str(head)]) == 2
    assert "head/model.safetensors: not a readable safetensors" in capsys.readouterr().err


def byte_level() -> SimpleNamespace:
    """One token a byte, spaces within tokens."""
    tokenizer = eesd.load("demo", device="cpu").tokenizer
    assert tokenizer is not None
    return SimpleNamespace(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )


def metaspace() -> SimpleNamespace:
    """As SentencePiece models: a decoder that strips a leading space, and falls back on bytes."""
    letters = "▁abcdefghijklmnopqrstuvwxyz"
    names = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    tokenizer = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    return SimpleNamespace(encode=lambda text: tokenizer.encode(text).ids, decode=tokenizer.decode)


TEXTS = {
    "spaces": "two words  and   more, a line\n    indented\n\n\tthe end ",
    "letters": "naïve café, 東京 και 🙂🙃 done",
    "long": "some words that go on " * 40 + "é🙂" * 40,
}


@pytest.mark.parametrize("run", [1, 3])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("kind", [byte_level, metaspace])
def test_streamed_text_is_the_text(
    kind: Callable[[], SimpleNamespace], text: str, run: int
) -> None:
    """However the ids arrive, the pieces add up and none holds half a character."""
    tokenizer = kind()
    prompt, ids = tokenizer.encode("a prompt"), tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer.decode, prompt)
    pieces = [detokenizer.push(ids[i : i + run]) for i in range(0, len(ids), run)]
    assert not any("\ufffd" in piece for piece in pieces)
    whole = tokenizer.decode([*prompt, *ids])
    assert "".join(pieces) + detokenizer.finish() == whole[len(tokenizer.decode(prompt)) :]


def test_a_character_comes_whole() -> None:
    tokenizer = metaspace()
    smile = tokenizer.encode("🙂")[-4:]
    detokenizer = Detokenizer(tokenizer.decode, tokenizer.encode("a"))
    assert [detokenizer.push([token]) for token in smile] == ["", "", "", "🙂"]


def test_bytes_that_are_no_character_come_at_the_end() -> None:
    out = io.StringIO()
    tokenizer = byte_level()
    streamer = TextStreamer(tokenizer.decode, out)
    streamer.put(torch.tensor(tokenizer.encode("ok")))
    streamer.put(torch.tensor(tokenizer.encode("é")[:1]))
    before = out.getvalue()
    streamer.end()
    assert (before, out.getvalue()) == ("", "\ufffd\n")
