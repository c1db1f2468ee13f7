"""What the engine benches share: arguments, models, the least bytes of a round, clocks, counts."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eesd
import eesd.captures
from bench.harness import read_bandwidth
from eesd.exit_head import ExitHead
from eesd.layer import LayerWeights

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
}
"""The shape `tiny`, to see a bench run through on a CPU."""
SYNCS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")


def engine_arguments(description: str, shape: str) -> argparse.ArgumentParser:
    """What the engine benches take besides their own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", default=shape, help="of `eesd.synthetic`, or tiny")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"),
        help="begin no case after these; those of other runs stay in the file",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder instead of bench/results")
    return parser


def prepare(args: argparse.Namespace) -> None:
    """On a CPU rounds run over static buffers as well: a dry run of the same code."""
    if args.device == "cpu":
        eesd.captures.CAPTURES_ON_CPU = True
        if args.out is None:
            raise SystemExit("--device cpu is a dry run: give --out")


def synthetic(args: argparse.Namespace, agreement: float, exit_layer: int) -> eesd.Model:
    """The shape of the arguments, in bfloat16 on a GPU."""
    return eesd.synthetic(
        TINY if args.shape == "tiny" else args.shape, agreement=agreement, exit_layer=exit_layer,
        device=args.device, dtype=None if args.device == "cuda" else "float32",
    )  # fmt: skip


def random_prompts(model: eesd.Model, lengths: list[int], seed: int) -> list[Tensor]:
    """Prompts `[P]` of random ids, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, model.config.vocab_size, (n,), generator=generator).to(
            model.backbone.device
        )
        for n in lengths
    ]


def bandwidth(device: str) -> float:
    """Bytes a microsecond that a read reaches, measured now; a rough one on a CPU."""
    if device == "cuda":
        return read_bandwidth()
    numbers = torch.ones(2**24)
    numbers.sum()
    start = time.perf_counter()
    numbers.sum()
    return numbers.numel() * 4 / (time.perf_counter() - start) * 1e-6


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _layer_bytes(layer: LayerWeights | None) -> int:
    return _bytes(*layer.tensors().values()) if layer is not None else 0


@dataclass(frozen=True)
class Floor:
    """Bytes of one round of B sequences: each weight once a pass, each live K and V once."""

    prefix: int  # layers 0..N-1
    exit: int  # the exit layer, its norm and head
    rest: int  # layers N..L-1, norm and head
    key_value: int  # K and V of one token in one layer
    exit_layer: int
    num_layers: int

    @classmethod
    def of(cls, model: eesd.Model, head: ExitHead | None) -> "Floor":
        backbone, config = model.backbone, model.config
        first = head.config.exit_layer if head else config.num_layers
        sizes = [_layer_bytes(layer) for layer in backbone.layers]
        element = torch.empty((), dtype=backbone.dtype).element_size()
        return cls(
            prefix=sum(sizes[:first]),
            exit=_layer_bytes(head.layer) + _bytes(head.norm, head.lm_head) if head else 0,
            rest=sum(sizes[first:]) + _bytes(backbone.norm, backbone.lm_head),
            key_value=2 * config.num_kv_heads * config.head_size * element,
            exit_layer=first,
            num_layers=config.num_layers,
        )

    def round(self, length: int, cached: int) -> int:
        """A round of draft length `length` after `cached` tokens in all sequences together.

        Each draft token runs layers 0..N-1, the exit layer and its head; the last one layers
        0..N-1 again; layers N..L-1 and the head run once over all rows.
        """
        keys = cached * self.key_value
        return (
            (length + 1) * (self.prefix + self.exit_layer * keys)
            + length * (self.exit + keys)
            + self.rest
            + (self.num_layers - self.exit_layer) * keys
        )


@dataclass
class Clock:
    """A streamer that notes when each round's tokens came; the prompt, which comes first, not."""

    at: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        self.at.append(time.perf_counter())
        self.tokens.append(value.numel())

    def end(self) -> None:
        """The first entry is the prompt's."""
        self.at, self.tokens = self.at[1:], self.tokens[1:]

    def tokens_per_s(self) -> float:
        """From the first round's end to the last one's: no prefill, no capture."""
        return sum(self.tokens[1:]) / (self.at[-1] - self.at[0])


def syncs_per_round(call: Callable[[int], eesd.GenerateOutput], few: int, many: int) -> float:
    """Times that the host waits for the device in a round, as the profiler sees its calls.

    `call` decodes so many tokens; what a longer call has more is its rounds', so that prompt and
    start-up do not count. On a CPU, what the engine counts.
    """
    seen, rounds = [], []
    for tokens in (few, many):
        waits, engine = _profiled(lambda tokens=tokens: call(tokens))
        assert engine is not None
        seen.append(engine.synchronisations if waits is None else waits)
        rounds.append(engine.rounds)
    return (seen[1] - seen[0]) / max(1, rounds[1] - rounds[0])


def _profiled(call: Callable[[], eesd.GenerateOutput]) -> tuple[int | None, Any]:
    if not torch.cuda.is_available():
        return None, call().speculative.engine
    from torch.profiler import ProfilerActivity, profile

    call()  # captured, and warm
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        engine = call().speculative.engine
    names = [event.name for event in seen.events()]
    if "cudaGraphLaunch" not in names:  # the profiler may see no calls here
        return None, engine
    return sum(name in SYNCS for name in names), engine


class Budget:
    """The seconds of a run, and how long what is left would take."""

    def __init__(self, seconds: float, cases: int) -> None:
        self._start, self._seconds, self._cases, self._done = time.perf_counter(), seconds, cases, 0

    def spent(self) -> bool:
        """Whether no further case is to be begun."""
        return time.perf_counter() - self._start > self._seconds

    def case_done(self) -> None:
        self._done += 1
        took = time.perf_counter() - self._start
        left = took / self._done * (self._cases - self._done)
        print(f"{self._done} of {self._cases} cases in {took:.0f} s, about {left:.0f} s left")
