"""The demo model's corpus, training and self-generated text, on a tiny made-up data folder."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

corpus = importlib.import_module("eesd.demo.corpus")
train = importlib.import_module("eesd.demo.train")
selfgen = importlib.import_module("eesd.demo.selfgen")

SIZES = {"layers": 2, "hidden": 32, "heads": 1, "ffn": 48, "context": 32, "batch": 2}
TINY = [*(f"--{name}={value}" for name, value in SIZES.items()), "--device=cpu"]


def _jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    sums = [
        {"question": f"Ann has {i} figs and buys {i}. How many?", "answer": f"<<{i}+{i}={2 * i}>>"}
        for i in range(300)
    ]
    _jsonl(folder / "gsm8k_train.jsonl", sums)
    turns = [
        ("airline", "hello", "O", "openinggreeting"),
        ("airline", "to new york", "O city city", "contentonly"),
        ("airline", "", "O", "contentonly"),
        ("media", "bye", "O", "thankyou"),
    ]
    keys = ("domain", "utterance", "slots", "intent")
    _jsonl(folder / "multidogo_turns.jsonl", [dict(zip(keys, t, strict=True)) for t in turns])
    (folder / "book_tiny.txt").write_text(
        "\n\n".join(f"Chapter {i}. It was a café, naïve and " + "long " * 40 for i in range(60)),
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    corpus.build(data, out, stdlib=None, vocab_size=400)
    return out


def test_same_data_gives_the_same_bytes(data: Path, built: Path, tmp_path: Path) -> None:
    corpus.build(data, tmp_path, stdlib=None, vocab_size=400)
    for path in built.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_absent_data_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert corpus.main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "training data folder not found" in capsys.readouterr().err


def test_heldout_split_is_disjoint_and_order_free() -> None:
    documents = [f"document {i}" for i in range(2000)]
    trained, heldout = corpus.split_documents(documents + documents[:50])
    assert not set(trained) & set(heldout)
    assert sorted(trained + heldout) == sorted(documents)
    assert 15 <= len(heldout) <= 70
    assert corpus.split_documents(documents[::-1]) == (trained, heldout)
    assert len(corpus.split_documents(["a", "b", "c"])[1]) == 1


def test_multidogo_documents(data: Path) -> None:
    documents = list(corpus._multidogo(data / "multidogo_turns.jsonl"))
    assert documents[0] == (
        "domain: airline\n\nuser: hello\nintent: openinggreeting\nslots: none\n\n"
        "user: to new york\nintent: contentonly\nslots: city=new york"
    )
    assert len(documents) == 2


def test_python_pieces_lose_no_line() -> None:
    body = "\n".join(f"    x{i} = {i}" for i in range(200))
    text = "\n\n\n".join(f"def f{i}():\n{body}" for i in range(9))
    pieces = corpus.split_python(text)
    assert len(pieces) > 2
    assert all(piece.startswith("def ") for piece in pieces)
    assert "\n\n\n".join(pieces) == text


def test_stdlib_files_leave_tests_and_tables_out(tmp_path: Path) -> None:
    keep, drop = (
        ["ast.py", "json/encoder.py"],
        ["test/a.py", "lib2to3/tests/b.py", "encodings/c.py"],
    )
    for name in [*keep, *drop, "html/entities.py", "_sysconfigdata_x.py", "config-3/d.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    assert corpus.stdlib_files(tmp_path) == keep


def test_streams_and_segments(built: Path) -> None:
    sources = json.loads((built / "sources.json").read_text())
    for part in ("train", "heldout"):
        stream = np.fromfile(built / f"tokens_{part}.bin", np.uint16)
        end = 0
        for start, stop in sources[part].values():
            assert start == end
            end = stop
            if stop > start:
                assert stream[start] == 0
                assert stream[stop - 1] == 0
        assert end == len(stream)
        assert not np.any((stream[1:] == 0) & (stream[:-1] == 0) & ~_edges(stream, sources[part]))


def _edges(stream: np.ndarray, segments: dict[str, list[int]]) -> np.ndarray:
    """Where a segment begins: its bos stands beside the last one's eos."""
    edge = np.zeros(len(stream), bool)
    edge[[start for start, stop in segments.values() if stop > start]] = True
    return edge[1:]


def test_tokenizer_round_trip(built: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(built)
    assert tokenizer.is_fast
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    for text in ("Ann has 1,234 figs.\n\n    x = 'é' + \"漢字🙂\"\t", " leading", "a  b ,c .", ""):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 0
        assert tokenizer.decode(ids[1:]) == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    digits = tokenizer("2024", add_special_tokens=False)["input_ids"]
    assert len(digits) == 4


def test_functional_forward_equals_transformers() -> None:
    model = train.make_model(50, 3, 32, 2, 48, 16, seed=1)
    tokens = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(0))
    backbone = train.Backbone(model, 16, torch.float32)
    logits = model(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(backbone.losses(tokens), expected, rtol=1e-5, atol=1e-5)


def _run(built: Path, out: Path, *extra: str) -> int:
    every = ["--log-every", "1", "--eval-every", "2", "--checkpoint-every", "2", "--no-compile"]
    return train.main(["--corpus", str(built), "--out", str(out), *TINY, *every, *extra])


def test_training_writes_a_folder_that_transformers_loads(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert _run(built, out, "--steps", "3") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("café 12")["input_ids"][1:]) == "café 12"
    report = json.loads((out / "training.json").read_text())
    assert report["steps"] == 3
    assert report["tokens_seen"] == 3 * 2 * 32
    assert set(report["heldout_loss"]) == {"gsm8k", "multidogo", "books", "all"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_interrupted_run_resumes_to_the_same_weights(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run(built, tmp_path / "whole", "--steps", "5") == 0
    step = train.Trainer.train_step

    def killed(self) -> None:
        if self.step_index == 3:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            _run(built, tmp_path / "cut", "--steps", "5")
    assert not (tmp_path / "cut").exists()
    assert _run(built, tmp_path / "cut", "--steps", "5", "--resume") == 0
    whole, cut = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict()
        for n in ("whole", "cut")
    )
    for name, weight in whole.items():
        assert torch.equal(weight, cut[name]), name


def test_seconds_end_a_run(built: Path, tmp_path: Path) -> None:
    assert _run(built, tmp_path / "model", "--steps", "1000000", "--seconds", "7") == 0
    report = json.loads((tmp_path / "model" / "training.json").read_text())
    assert 0 < report["steps"] < 1000000


def test_selfgen_rows(built: Path, tmp_path: Path) -> None:
    assert _run(built, tmp_path / "model", "--steps", "1") == 0
    out = tmp_path / "tokens_self.bin"
    where = ["--model", str(tmp_path / "model"), "--corpus", str(built), "--out", str(out)]
    size = ["--tokens", "300", "--batch", "6", "--row-length", "24", "--device", "cpu"]
    assert selfgen.main([*where, *size]) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    rows = np.fromfile(out, np.uint16).reshape(-1, 24)
    assert len(rows) == record["rows"] == 18
    assert rows.max() < 400
    first = record["batches"][0]
    prompts = selfgen.Prompts(built).draw(np.random.default_rng(0), 6, first["prompt_length"])
    assert np.array_equal(rows[:6, : first["prompt_length"]], prompts)


def test_greedy_rows_are_greedy(built: Path) -> None:
    model = train.make_model(400, 2, 32, 1, 48, 32, seed=2).eval()
    prompts = torch.arange(1, 9).view(2, 4)
    rows = selfgen.continue_rows(
        model,
        prompts,
        length=20,
        greedy_rows=1,
        eos=-1,
        generator=torch.Generator().manual_seed(0),
        deadline=float("inf"),
    )
    assert rows is not None
    with torch.inference_mode():
        best = model(rows[:, :-1]).logits.argmax(-1)
    assert torch.equal(rows[0, 4:], best[0, 3:])
    assert not torch.equal(rows[1, 4:], best[1, 3:])
