"""What the engine benches share: the least bytes that decoding must read, and a clock of rounds."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eesd import Model
from eesd.exit_head import ExitHead
from eesd.layer import LayerWeights


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
    def of(cls, model: Model, head: ExitHead | None) -> "Floor":
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
        self.tokens.append(len(value))

    def end(self) -> None:
        """The first entry is the prompt's."""
        self.at, self.tokens = self.at[1:], self.tokens[1:]

    def tokens_per_s(self) -> float:
        """From the first round's end to the last one's: no prefill, no capture."""
        return sum(self.tokens[1:]) / (self.at[-1] - self.at[0])
