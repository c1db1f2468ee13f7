"""The exit head: one decoder layer, a norm and an LM head on the hidden state after N layers."""

import json
import os
import tempfile
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from eesd.cache import Block, KVCache
from eesd.config import ExitHeadConfig
from eesd.layer import LayerWeights, decoder_layer, project_qkv
from eesd.models.llama import Llama
from eesd.weights import WeightFolder
from eesd_kernels.exit_topk import exit_topk_op


class ExitHead:
    """Turns `h_N` into a sparse draft distribution.

    `layer` has the parts of the backbone's last one, its window too, and its K and V live in the
    cache's last layer. None for a bare early exit: the backbone's own norm and head on `h_N`.
    """

    def __init__(
        self,
        backbone: Llama,
        config: ExitHeadConfig,
        layer: LayerWeights | None,
        norm: Tensor,
        lm_head: Tensor,
    ) -> None:
        self.config = config
        self.layer = layer
        self.norm = norm
        self.lm_head = lm_head
        self._eps = backbone.config.rms_eps
        self._index = backbone.config.num_layers

    @classmethod
    def bare(cls, backbone: Llama, exit_layer: int, fingerprint: str) -> "ExitHead":
        """No trained parts: norm and LM head of the backbone on `h_N`."""
        shape = backbone.config
        config = ExitHeadConfig(
            exit_layer=exit_layer,
            backbone_architecture=shape.architecture,
            backbone_fingerprint=fingerprint,
            hidden_size=shape.hidden_size,
            vocab_size=shape.vocab_size,
            num_layers=shape.num_layers,
        )
        return cls(backbone, config, None, backbone.norm, backbone.lm_head)

    @classmethod
    def load(cls, folder: Path, backbone: Llama, fingerprint: str) -> "ExitHead":
        """Read a head and refuse one that was trained on another backbone."""
        config = ExitHeadConfig.from_folder(folder)
        shape = backbone.config
        for name, have, want in (
            ("hidden_size", config.hidden_size, shape.hidden_size),
            ("vocab_size", config.vocab_size, shape.vocab_size),
            ("num_layers", config.num_layers, shape.num_layers),
            ("architecture", config.backbone_architecture, shape.architecture),
        ):
            if have != want:
                raise ValueError(
                    f"{folder}: this exit head was made for a backbone with {name} {have}, "
                    f"the model has {want}"
                )
        if config.backbone_fingerprint != fingerprint:
            raise ValueError(
                f"{folder}: this exit head was trained on a backbone with other weights "
                f"({config.backbone_fingerprint[:27]}..., the model is {fingerprint[:27]}...)"
            )
        weights = WeightFolder(folder)
        dtype = backbone.embedding.dtype

        def get(name: str, *size: int) -> Tensor:
            return weights.tensor(name, size, backbone.device, dtype)

        return cls(
            backbone,
            config,
            LayerWeights.load(
                weights, "exit_layer.", shape, shape.windows[-1], backbone.device, dtype
            ),
            get("norm.weight", shape.hidden_size),
            get("lm_head.weight", shape.vocab_size, shape.hidden_size)
            if config.own_lm_head
            else backbone.lm_head,
        )

    def save(self, folder: Path, backbone: Llama) -> None:
        """Write the head's folder; it appears whole or not at all."""
        if self.layer is None:
            raise ValueError("a bare early exit has no weights to save")
        tensors = self.layer.named("exit_layer.", backbone.config)
        tensors["norm.weight"] = self.norm
        if self.config.own_lm_head:
            tensors["lm_head.weight"] = self.lm_head
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            fresh = Path(temporary) / "head"
            fresh.mkdir()
            weights, config = fresh / "model.safetensors", fresh / "config.json"
            save_file(tensors, weights, metadata={"format": "pt"})
            config.write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
            weights.chmod(config.stat().st_mode & 0o644)  # safetensors writes for the owner alone
            if folder.exists():  # leaves with the temporary folder, once the new one stands
                os.replace(folder, Path(temporary) / "old")
            os.replace(fresh, folder)

    def run(self, hidden: Tensor, cache: KVCache, block: Block) -> Tensor:
        """The exit layer over `h_N` `[B, T, H]`, writing its K and V."""
        if self.layer is None:
            return hidden
        attend = partial(cache.attend, self._index, block=block, window=self.layer.window)
        return decoder_layer(self.layer, hidden, attend, self._eps)

    def write(self, hidden: Tensor, cache: KVCache, block: Block) -> None:
        """Only the exit layer's K and V of `h_N`, for positions that need no draft."""
        if self.layer is not None:
            cache.write(self._index, project_qkv(self.layer, hidden, self._eps), block)

    def candidates(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k best exit logits of `[B, H]`: values, ids, logsumexp."""
        return exit_topk_op(hidden, self.lm_head, k, self.norm, self._eps)
