"""Builds the demo model's training text: token files, a 4,096-entry byte-level BPE, a manifest.

Sources are a folder of openly licensed files (`--data`) and the running Python's own standard
library. A document is preceded and followed by `<|endoftext|>` (id 0: bos, eos and pad in one),
so a stream reads `0 doc 0 doc 0`. By its hash, 2% of each source's documents are held out; the
tokenizer is trained on the rest only. Same inputs, same bytes out: documents are ordered by hash.

Writes `tokens_train.bin` and `tokens_heldout.bin` (uint16, one contiguous segment a source),
`sources.json` (the segments), the tokenizer's files and `manifest.json` (files, licences, counts).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

EOT = "<|endoftext|>"
EOT_ID = 0
VOCAB_SIZE = 4096
CONTEXT = 1024
HELDOUT_PER_10000 = 200
# Pieces of about 1,500 tokens: longer than a training window, and a long Python file then also
# yields documents that begin at a top-level `def`, which is how code prompts look.
PIECE_CHARS = 6000
TURNS_PER_DOCUMENT = 12

# Test suites, generated files and tables: regular, but nothing to learn a language from.
SKIP_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "lib-dynload"}
    | {"pydoc_data", "site-packages", "test", "tests"}
)
SKIP_FILES = frozenset({"html/entities.py", "stringprep.py"})  # tables
SKIP_PREFIXES = ("config-", "_sysconfigdata")


@dataclass
class Source:
    """One kind of text: its documents and what the model card must say about it."""

    name: str
    licence: str
    origin: str
    files: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)


def _rows(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _gsm8k(path: Path) -> Iterator[str]:
    for row in _rows(path):
        yield f"{row['question'].strip()}\n{row['answer'].strip()}"


def _aqua(path: Path) -> Iterator[str]:
    for row in _rows(path):
        options = " ".join(row["options"])
        worked = f"{row['rationale'].strip()}\n#### {row['correct']}"
        yield f"{row['question'].strip()}\n{options}\n{worked}"


def _text_field(path: Path) -> Iterator[str]:
    for row in _rows(path):
        yield row["text"]


def _slots(utterance: str, labels: str) -> str:
    """`book to paris`, `O O city` -> `city=paris`; neighbours of one label are one value."""
    words, names = utterance.split(), labels.split()
    if len(words) != len(names):
        return labels
    spans: list[tuple[str, list[str]]] = []
    previous = "O"
    for word, name in zip(words, names, strict=True):
        if name != "O" and name == previous:
            spans[-1][1].append(word)
        elif name != "O":
            spans.append((name, [word]))
        previous = name
    return "; ".join(f"{name}={' '.join(value)}" for name, value in spans) or "none"


def _multidogo(path: Path) -> Iterator[str]:
    domain = ""
    turns: list[str] = []
    for row in _rows(path):
        if not row["utterance"].strip():
            continue
        opens = row["intent"] == "openinggreeting"
        if turns and (row["domain"] != domain or opens or len(turns) == TURNS_PER_DOCUMENT):
            yield f"domain: {domain}\n\n" + "\n\n".join(turns)
            turns = []
        domain = row["domain"]
        slots = _slots(row["utterance"], row["slots"])
        turns.append(f"user: {row['utterance']}\nintent: {row['intent']}\nslots: {slots}")
    if turns:
        yield f"domain: {domain}\n\n" + "\n\n".join(turns)


def _pack(parts: list[str], joiner: str) -> Iterator[str]:
    """Joins neighbouring parts into pieces of at most PIECE_CHARS (a longer part stands alone)."""
    piece = ""
    for part in parts:
        if piece and len(piece) + len(joiner) + len(part) > PIECE_CHARS:
            yield piece
            piece = part
        else:
            piece = f"{piece}{joiner}{part}" if piece else part
    if piece.strip():
        yield piece


def _unwrap(paragraph: str) -> str:
    """Joins the hard-wrapped lines of prose (prompts are not wrapped); leaves verse and lists."""
    lines = paragraph.split("\n")
    verse = any(line[:1] in (" ", "\t") or len(line) < 45 for line in lines[:-1])
    return paragraph if verse else " ".join(lines)


def _book(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    paragraphs = [p.strip("\n") for p in re.split(r"\n\s*\n", text) if p.strip()]
    if paragraphs and paragraphs[0].startswith("Produced by"):
        paragraphs = paragraphs[1:]
    yield from _pack([_unwrap(p) for p in paragraphs], "\n\n")


def _plays(path: Path) -> Iterator[str]:
    speeches = path.read_text(encoding="utf-8").strip().split("\n\n")
    yield from _pack(speeches, "\n\n")


def split_python(text: str) -> list[str]:
    """Cuts a file before top-level statements that follow a blank line, into packed pieces."""
    parts = re.split(
        r"\n\n+(?=(?:def |class |async def |@|if |for |try:|[A-Za-z_#]))", text.strip()
    )
    pieces: list[str] = []
    for piece in _pack(parts, "\n\n\n"):
        if len(piece) > 2 * PIECE_CHARS:  # one huge class: cut between its methods
            pieces.extend(
                _pack(re.split(r"\n\n+(?=    (?:def |@|class |async def ))", piece), "\n\n")
            )
        else:
            pieces.append(piece)
    return pieces


def stdlib_files(root: Path) -> list[str]:
    """The standard library's source files worth reading, relative to `root`, sorted."""
    kept = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        name = relative.as_posix()
        skipped = SKIP_FOLDERS.intersection(relative.parts) or name in SKIP_FILES
        if not skipped and not relative.parts[0].startswith(SKIP_PREFIXES):
            kept.append(name)
    return sorted(kept)


# One row a source: name, licence, origin, glob in the data folder, reader.
DATA_SOURCES: tuple[tuple[str, str, str, str, Callable[[Path], Iterator[str]]], ...] = (
    ("gsm8k", "MIT", "openai/grade-school-math", "gsm8k_train.jsonl", _gsm8k),
    ("aqua", "Apache-2.0", "google-deepmind/AQuA", "aqua_*.jsonl", _aqua),
    ("tldr", "CC-BY-4.0", "tldr-pages/tldr", "tldr_pages_en.jsonl", _text_field),
    (
        "taskmaster",
        "CC-BY-4.0",
        "google-research-datasets/Taskmaster (TM-4-2024)",
        "taskmaster4_dialogs.jsonl",
        _text_field,
    ),
    (
        "multidogo",
        "CDLA-Permissive-1.0",
        "awslabs/multi-domain-goal-oriented-dialogues-dataset",
        "multidogo_turns.jsonl",
        _multidogo,
    ),
    ("books", "public domain (US)", "four books", "book_*.txt", _book),
    ("shakespeare", "public domain", "plays of Shakespeare", "tinyshakespeare.txt", _plays),
)


def load_sources(data: Path, stdlib: Path | None) -> list[Source]:
    """Reads every source present; a data folder that is absent or empty is an error.

    Args:
        data: folder with the files named in DATA_SOURCES; single absent ones are skipped.
        stdlib: the standard library's folder, or None to leave it out.
    """
    if not data.is_dir():
        raise FileNotFoundError(f"training data folder not found: {data} (see --data)")
    sources = []
    for name, licence, origin, pattern, read in DATA_SOURCES:
        paths = sorted(data.glob(pattern))
        if not paths:
            print(f"{name}: no {pattern}, left out", file=sys.stderr)
            continue
        source = Source(name, licence, origin, [p.name for p in paths])
        source.documents = [text for path in paths for text in read(path)]
        sources.append(source)
    if not sources:
        raise FileNotFoundError(f"{data} holds none of the training files (see DATA_SOURCES)")
    if stdlib is not None:
        origin = f"CPython {platform.python_version()} standard library"
        python = Source("python", "PSF-2.0", origin, stdlib_files(stdlib))
        for name in python.files:
            text = (stdlib / name).read_bytes().decode("utf-8", errors="ignore")
            python.documents.extend(split_python(text.replace("\r\n", "\n")))
        sources.append(python)
    return sources


def split_documents(documents: list[str]) -> tuple[list[str], list[str]]:
    """Divides documents by content hash into (train, held out), without duplicates.

    The hash also fixes the order, so neither depends on how the sources were listed.
    """
    by_hash = {}
    for text in documents:
        text = text.strip("\n")
        if text.strip():
            by_hash[hashlib.sha256(text.encode()).digest()] = text
    train: list[str] = []
    heldout: list[str] = []
    for digest in sorted(by_hash, key=lambda d: d[8:]):
        part = int.from_bytes(digest[:8], "big") % 10000 < HELDOUT_PER_10000
        (heldout if part else train).append(by_hash[digest])
    if not heldout and len(train) > 1:  # a small source still needs something to be judged by
        heldout.append(train.pop(0))
    return train, heldout


def train_tokenizer(texts: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE with single digits, `<|endoftext|>` as id 0 and prepended as bos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOT} $A", pair=f"{EOT} $A $B", special_tokens=[(EOT, EOT_ID)]
    )
    if tokenizer.token_to_id(EOT) != EOT_ID:
        raise RuntimeError(f"{EOT} must be id {EOT_ID}, got {tokenizer.token_to_id(EOT)}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Writes the files from which transformers' AutoTokenizer makes a fast tokenizer."""
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"bos_token": EOT, "eos_token": EOT, "pad_token": EOT}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    _write_json(out / "tokenizer_config.json", config)
    _write_json(out / "special_tokens_map.json", special)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """Token stream `0 doc 0 doc 0` of a source, uint16 [tokens]; empty without documents."""
    if not documents:
        return np.zeros(0, np.uint16)
    pieces = [np.zeros(1, np.uint16)]
    for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
        pieces.append(np.asarray([*encoding.ids, EOT_ID], np.uint16))
    return np.concatenate(pieces)


def build(data: Path, out: Path, stdlib: Path | None, vocab_size: int = VOCAB_SIZE) -> dict:
    """Builds the corpus folder `out` and returns its manifest."""
    sources = load_sources(data, stdlib)
    split = {source.name: split_documents(source.documents) for source in sources}
    tokenizer = train_tokenizer([text for train, _ in split.values() for text in train], vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, out)

    segments: dict[str, dict[str, list[int]]] = {"train": {}, "heldout": {}}
    streams: dict[str, list[np.ndarray]] = {"train": [], "heldout": []}
    entries: list[dict] = []
    for source in sources:
        entry: dict = {
            "name": source.name,
            "licence": source.licence,
            "origin": source.origin,
            "bytes": sum(len(t.encode()) for part in split[source.name] for t in part),
        }
        for part, documents in zip(("train", "heldout"), split[source.name], strict=True):
            stream = encode_documents(tokenizer, documents)
            start = sum(map(len, streams[part]))
            streams[part].append(stream)
            segments[part][source.name] = [start, start + len(stream)]
            entry[f"documents_{part}"] = len(documents)
            entry[f"tokens_{part}"] = len(stream)
        entries.append({**entry, "files": source.files})
    for part, pieces in streams.items():
        np.concatenate(pieces).tofile(out / f"tokens_{part}.bin")
    _write_json(out / "sources.json", {"bos": EOT_ID, "eos": EOT_ID, "dtype": "uint16", **segments})
    manifest = {
        "vocab_size": tokenizer.get_vocab_size(),
        "tokens_train": sum(e["tokens_train"] for e in entries),
        "tokens_heldout": sum(e["tokens_heldout"] for e in entries),
        "heldout": "2% of each source's documents by SHA-256, never trained on",
        "sources": entries,
    }
    _write_json(out / "manifest.json", manifest)
    return manifest


def main(argv: list[str] | None = None) -> int:
    """Command line: `python -m eesd.demo.corpus --data DIR --out DIR`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the training files")
    parser.add_argument("--out", type=Path, required=True, help="corpus folder to write")
    parser.add_argument("--no-stdlib", action="store_true", help="leave Python's own source out")
    args = parser.parse_args(argv)
    stdlib = None if args.no_stdlib else Path(sysconfig.get_paths()["stdlib"])
    try:
        manifest = build(args.data, args.out, stdlib)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{'source':12} {'licence':20} {'docs':>7} {'train':>10} {'held out':>9} {'bytes/tok':>9}"
    )
    for e in manifest["sources"]:
        total = e["tokens_train"] + e["tokens_heldout"]
        print(
            f"{e['name']:12} {e['licence']:20} {e['documents_train']:7,} {e['tokens_train']:10,} "
            f"{e['tokens_heldout']:9,} {e['bytes'] / max(total, 1):9.2f}"
        )
    print(f"train {manifest['tokens_train']:,} tokens, held out {manifest['tokens_heldout']:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
