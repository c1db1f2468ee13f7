"""The trainable exit head and the two forward passes of a step, in plain PyTorch.

Arithmetic is in the backbone's dtype, bfloat16 on a GPU, as it is when drafting; the trainable
weights are float32 masters, cast at each product.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from eesd.distill.losses import ChunkLoss, chunk_loss, head_loss
from eesd.layer import TRAINING, LayerWeights
from eesd.models.llama import Llama

CausalLayer = Callable[[LayerWeights, Tensor], Tensor]


class Student:
    """An exit layer and norm, from the backbone's last layer and final norm on."""

    def __init__(self, backbone: Llama, exit_layer: int, *, own_lm_head: bool) -> None:
        def master(weight: Tensor) -> Tensor:
            wide = torch.promote_types(backbone.dtype, torch.float32)
            return weight.detach().to(wide, copy=True).requires_grad_()

        self.backbone = backbone
        self.exit_layer = exit_layer
        self.layer = backbone.layers[-1].map(master)
        self.norm = master(backbone.norm)
        self.own_lm_head = own_lm_head
        self.lm_head = master(backbone.lm_head) if own_lm_head else backbone.lm_head
        self.causal_layer: CausalLayer = self._eager_layer
        self.of_chunk: ChunkLoss = chunk_loss

    def parameters(self) -> dict[str, Tensor]:
        """The trainable tensors by name."""
        named = {f"layer.{name}": weight for name, weight in self.layer.tensors().items()}
        named["norm"] = self.norm
        return {**named, "lm_head": self.lm_head} if self.own_lm_head else named

    def compile(self) -> None:
        """Compile the layer (one graph serves all layers of a kind) and the loss of a chunk."""
        self.causal_layer = torch.compile(self._eager_layer, dynamic=False)
        self.of_chunk = torch.compile(chunk_loss, dynamic=False)

    def eager(self) -> "Student":
        """The same weights, uncompiled."""
        other = copy.copy(self)
        other.causal_layer, other.of_chunk = self._eager_layer, chunk_loss
        return other

    @torch.no_grad()
    def teach(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids `[B, T]` to (`h_N`, the final hidden state after its norm), both `[B, T, H]`."""
        backbone = self.backbone
        hidden = at_exit = backbone.embed(ids)
        for i, weights in enumerate(backbone.layers):
            if i == self.exit_layer:
                at_exit = hidden
            hidden = self.causal_layer(weights, hidden)
        return at_exit, TRAINING.rms_norm(hidden, backbone.norm, backbone.config.rms_eps)

    def exit(self, at_exit: Tensor) -> Tensor:
        """`h_N` to the hidden state that the exit's LM head reads, `[B, T, H]`."""
        hidden = self.causal_layer(self.layer, at_exit)
        return TRAINING.rms_norm(hidden, self.norm, self.backbone.config.rms_eps)

    def loss(self, ids: Tensor, kind: str, temperature: float) -> Tensor:
        """Mean loss of whole sequences `[B, T]`."""
        at_exit, teacher = self.teach(ids)
        return head_loss(
            self.exit(at_exit).flatten(0, 1),
            self.lm_head,
            teacher.flatten(0, 1),
            self.backbone.lm_head,
            kind=kind,
            temperature=temperature,
            of_chunk=self.of_chunk,
        )

    def round_to(self, dtype: torch.dtype) -> None:
        """Round the weights to the dtype they are saved in, so that it is those that are judged."""
        with torch.no_grad():
            for weight in self.parameters().values():
                weight.copy_(weight.to(dtype))

    def _eager_layer(self, weights: LayerWeights, hidden: Tensor) -> Tensor:
        return self.backbone.causal_layer(weights, hidden, TRAINING)
