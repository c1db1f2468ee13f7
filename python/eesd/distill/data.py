"""Training and held-out token streams from `.txt`, `.jsonl` and `.bin` files.

- `.txt`: UTF-8, one document a file.
- `.jsonl`: one object a line, one document an object: its `text`; else `question` and `answer`,
  on lines of their own; else `prompt` and `completion`, joined as they are. The second of a pair
  may be absent. Objects with none of these are skipped, and counted.
- `.bin`: uint16 token ids of this tokenizer. Documents begin at each bos id (eos, where there is no
  bos, ends them), or are the rows of a `<name>.json` beside it that has a `row_length`.

Text is tokenised without special tokens; a document gets the bos in front and the eos, if that is
another one, at its end.

Every fiftieth document of a file is held out (a file's end may be of one kind only, so its last
documents would judge badly). A file of fewer documents has its last 2% of tokens held out.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from eesd.loading import Model

HELD_OUT_EVERY = 50
MIN_HELD_OUT = 32  # tokens; fewer judge nothing
# Half of a batch's sequences begin at a document, as prompts do.
DOCUMENT_START_SHARE = 0.5
_PIECE_CHARS = 1 << 16  # long texts are tokenised in pieces cut at line ends
_PAIRS = (("text", None), ("question", "answer"), ("prompt", "completion"))

Tokens = NDArray[np.int32]
Starts = NDArray[np.int64]


class Data(NamedTuple):
    """train: `[n]` int32 on the device. starts: where its documents begin. held_out: `[m]` int64.

    digest: of both streams. names: of the files. skipped: `.jsonl` objects without text.
    """

    train: Tensor
    starts: Starts
    held_out: Tensor
    digest: str
    names: list[str]
    skipped: int

    def batch(self, seed: int, step: int, size: int, length: int) -> Tensor:
        """The windows of a step, `[size, length]` int32: the same in every run of one seed."""
        rng = np.random.default_rng((seed, step))
        last = len(self.train) - length
        offsets = rng.integers(0, last + 1, size)
        snap = rng.random(size) < DOCUMENT_START_SHARE
        before = self.starts[np.searchsorted(self.starts, offsets, side="right") - 1]
        begin = torch.from_numpy(np.where(snap, before, offsets)).to(self.train.device)
        return self.train[begin[:, None] + torch.arange(length, device=self.train.device)]

    def held_out_windows(self, count: int, length: int) -> Tensor:
        """At most `count` windows `[n, length]`, disjoint and evenly spread."""
        length = min(length, len(self.held_out))
        whole = self.held_out[: len(self.held_out) // length * length].view(-1, length)
        picked = np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(np.int64)
        return whole[torch.from_numpy(picked).to(whole.device)]


def read_data(paths: list[Path], model: Model, seq_len: int) -> Data:
    """Read, tokenise and split the files.

    Raises:
        ValueError: a file that is missing, of another kind, damaged or without text; token ids
            outside the vocabulary; too little text for one sequence of `seq_len` tokens.
    """
    if not paths:
        raise ValueError("data: expected at least one file, got none")
    train: list[Tokens] = []
    held_out: list[Tokens] = []
    starts: list[Starts] = []
    at = skipped = 0
    for path in paths:
        tokens, begins, ignored = _read(path, model)
        skipped += ignored
        if not len(tokens):
            raise ValueError(f"{path}: no usable text" + _skipped_note(ignored))
        if int(tokens.max()) >= model.config.vocab_size:
            raise ValueError(
                f"{path}: token id {int(tokens.max())} is outside the model's vocabulary of "
                f"{model.config.vocab_size}: tokens of another tokenizer?"
            )
        kept, kept_begins, apart = _split(tokens, begins)
        train.append(kept)
        starts.append(kept_begins + at)
        held_out.append(apart)
        at += len(kept)
    stream, apart = np.concatenate(train), np.concatenate(held_out)
    if len(stream) < seq_len or len(apart) < MIN_HELD_OUT:
        raise ValueError(
            f"data: too little text: {len(stream)} tokens to train on and {len(apart)} held out, "
            f"expected at least {seq_len} (one sequence; see seq_len) and {MIN_HELD_OUT}"
        )
    begins = np.union1d(np.concatenate(starts), [0])
    last = len(stream) - seq_len
    digest = hashlib.sha256(stream.tobytes() + b"|" + apart.tobytes()).hexdigest()
    device = model.backbone.device
    return Data(
        train=torch.from_numpy(stream).to(device),
        starts=begins[begins <= last].astype(np.int64),
        held_out=torch.from_numpy(apart.astype(np.int64)).to(device),
        digest=digest,
        names=[path.name for path in paths],
        skipped=skipped,
    )


def _skipped_note(skipped: int) -> str:
    fields = ", ".join(name for pair in _PAIRS for name in pair if name)
    return f" ({skipped} objects have none of the fields {fields})" if skipped else ""


def _read(path: Path, model: Model) -> tuple[Tokens, Starts, int]:
    if not path.is_file():
        raise ValueError(f"data: {path}: no such file")
    try:
        if path.suffix == ".bin":
            return *_read_bin(path, model), 0
        if path.suffix == ".txt":
            texts, skipped = [path.read_text(encoding="utf-8-sig")], 0
        elif path.suffix == ".jsonl":
            texts, skipped = _read_jsonl(path)
        else:
            raise ValueError(f"data: {path}: expected .txt, .jsonl or .bin, got {path.suffix!r}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if model.tokenizer is None:
        raise ValueError(f"{model.folder}: has no tokenizer.json, which {path.name} needs")
    texts = [text for text in texts if text.strip()]
    bos = model.config.bos_token_id
    eos = model.config.eos_token_ids[0] if model.config.eos_token_ids else None
    before = [] if bos is None else [bos]
    after = [] if eos is None or eos == bos else [eos]
    documents = [[*before, *ids, *after] for ids in _encode(model.tokenizer, texts)]
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    parts = [np.asarray(ids, np.int32) for ids in documents]
    return np.concatenate(parts or [np.zeros(0, np.int32)]), starts, skipped


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[int]]:
    for first in range(0, len(texts), 256):  # a batch runs on all cores
        pieces = [list(_pieces(text)) for text in texts[first : first + 256]]
        flat = [piece for part in pieces for piece in part]
        encoded = iter(tokenizer.encode_batch(flat, add_special_tokens=False))
        for part in pieces:
            yield [token for _ in part for token in next(encoded).ids]


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = text.rfind("\n", start + 1, start + _PIECE_CHARS)
        end = end if end > 0 else start + _PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _read_jsonl(path: Path) -> tuple[list[str], int]:
    texts: list[str] = []
    skipped = 0
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number}: not valid JSON: {error}") from None
            text = _document(row) if isinstance(row, dict) else None
            skipped += text is None
            texts += [] if text is None else [text]
    return texts, skipped


def _document(row: dict[str, object]) -> str | None:
    for first, second in _PAIRS:
        head, tail = row.get(first), row.get(second) if second else None
        if isinstance(head, str) and head.strip():
            if not isinstance(tail, str):
                return head
            return f"{head.strip()}\n{tail.strip()}" if first == "question" else head + tail
    return None


def _read_bin(path: Path, model: Model) -> tuple[Tokens, Starts]:
    if path.stat().st_size % 2:
        raise ValueError(f"{path}: not uint16 tokens: an odd number of bytes")
    tokens = np.fromfile(path, np.uint16).astype(np.int32)
    beside = path.with_suffix(".json")
    try:
        record = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{beside}: not valid JSON: {error}") from None
    length = record.get("row_length") if isinstance(record, dict) else None
    if isinstance(length, int) and length > 0:
        return tokens, np.arange(0, len(tokens), length)
    bos, eos = model.config.bos_token_id, model.config.eos_token_ids
    if bos is not None:
        starts = np.flatnonzero(tokens == bos)
    else:
        starts = np.flatnonzero(np.isin(tokens[:-1], eos)) + 1
    return tokens, np.union1d(starts, [0]) if len(tokens) else starts


def _split(tokens: Tokens, starts: Starts) -> tuple[Tokens, Starts, Tokens]:
    """(training tokens, where their documents begin, held-out tokens)."""
    if len(starts) < HELD_OUT_EVERY:
        cut = len(tokens) - max(1, len(tokens) // HELD_OUT_EVERY)
        return tokens[:cut], starts[starts < cut], tokens[cut:]
    lengths = np.diff(np.append(starts, len(tokens)))
    apart = np.arange(len(starts)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    mask = np.repeat(apart, lengths)
    begins = np.cumsum(np.append(0, lengths[~apart]))[:-1]
    return tokens[~mask], begins, tokens[mask]
