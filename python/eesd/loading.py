"""`eesd.load`: a folder on disk, or the embedded demo model, becomes a model that generates."""

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from eesd.captures import Captures
from eesd.config import EXIT_HEAD_TYPE, ModelConfig
from eesd.exit_head import ExitHead
from eesd.fields import read_json
from eesd.models import Llama
from eesd.weights import WeightFolder

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
HEAD_FOLDER = "exit_head"
LEAST_CAPABILITY = (8, 0)
"""Ampere: bfloat16 on the tensor cores, and what the CUDA library is compiled for."""


@dataclass
class Model:
    """A backbone, its exit head where it has one, and its tokenizer."""

    name: str
    folder: Path
    backbone: Llama
    exit_head: ExitHead | None
    tokenizer: Tokenizer | None
    fingerprint: str
    measured_costs: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Round costs by batch size and head, measured once a model (`eesd.costs`)."""
    captures: Captures = field(default_factory=Captures, repr=False, compare=False)
    """CUDA graphs of rounds and their caches; `captures.clear()` frees them."""

    @property
    def config(self) -> ModelConfig:
        """The backbone's config."""
        return self.backbone.config

    def encode(self, text: str) -> Tensor:
        """Token ids `[1, P]` int64 of a prompt, with the special tokens the tokenizer adds."""
        ids = self._need_tokenizer().encode(text).ids
        return torch.tensor([ids], dtype=torch.int64, device=self.backbone.device)

    def decode(self, ids: Tensor | list[int]) -> str:
        """Text of `[n]` token ids, without special tokens."""
        flat = ids.tolist() if isinstance(ids, Tensor) else ids
        return str(self._need_tokenizer().decode(flat, skip_special_tokens=True))

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self.folder}: has no tokenizer.json")
        return self.tokenizer


def demo_folder() -> Path:
    """Where the embedded demo model lies."""
    return Path(str(files("eesd") / "demo" / "model"))


def load(
    folder: str | Path,
    exit_head: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    assistant_early_exit: int | None = None,
) -> Model:
    """Load a model.

    Args:
        folder: a Hugging Face folder of a Llama, Mistral, Qwen2 or Qwen3 model, or `"demo"`.
        exit_head: folder of an exit head; by default the model's own (`exit_head/` beside its
            weights) if it has one.
        device: by default a CUDA device where there is one, else the CPU.
        dtype: of activations and cache, a torch dtype or its name. By default the checkpoint's on
            a GPU and float32 on a CPU, where bfloat16 weights are read as they are.
        assistant_early_exit: N for a bare early exit: the backbone's norm and LM head on the
            hidden state after N layers, where no trained head is wanted.

    Raises:
        ValueError: what is missing, damaged, unsupported or does not fit, by name.
    """
    path = demo_folder() if str(folder) == "demo" else Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path}: no such model folder")
    config = ModelConfig.from_folder(path)
    target = target_device(device)
    weights = WeightFolder(path)
    backbone = Llama.load(config, weights, target, target_dtype(dtype, config, target))
    fingerprint = weights.fingerprint()
    if exit_head is not None and assistant_early_exit is not None:
        raise ValueError("exit_head and assistant_early_exit: give one, not both")
    head: ExitHead | None = None
    if assistant_early_exit is not None:
        head = ExitHead.bare(backbone, assistant_early_exit, fingerprint)
    elif exit_head is not None:
        head = ExitHead.load(Path(exit_head), backbone, fingerprint)
    elif _is_head(path / HEAD_FOLDER):
        head = ExitHead.load(path / HEAD_FOLDER, backbone, fingerprint)
    tokenizer = path / "tokenizer.json"
    return Model(
        name=str(folder),
        folder=path,
        backbone=backbone,
        exit_head=head,
        tokenizer=_tokenizer(tokenizer) if tokenizer.exists() else None,
        fingerprint=fingerprint,
    )


def _is_head(folder: Path) -> bool:
    config = folder / "config.json"
    return config.exists() and read_json(config).get("model_type") == EXIT_HEAD_TYPE


def _tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a readable tokenizer: {error}") from None


def target_device(device: str | torch.device | None) -> torch.device:
    """Where to load: `None` is a CUDA device where there is one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected cpu or cuda[:n], got {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda[:n], got {device!r}")
    if chosen.type == "cuda":
        _check_gpu(chosen, device)
    return chosen


def _check_gpu(chosen: torch.device, device: str | torch.device | None) -> None:
    if not torch.cuda.is_available():
        raise ValueError(f"device: {device!r} asked for, but no CUDA device is available")
    if chosen.index is not None and chosen.index >= torch.cuda.device_count():
        raise ValueError(
            f"device: {device!r} asked for, but there are {torch.cuda.device_count()} CUDA devices"
        )
    capability = torch.cuda.get_device_capability(chosen)
    if capability < LEAST_CAPABILITY:
        raise ValueError(
            f"device: expected a GPU of compute capability {_dotted(LEAST_CAPABILITY)} or later, "
            f"got {torch.cuda.get_device_name(chosen)} of {_dotted(capability)}; "
            "device='cpu' is slower and works"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def target_dtype(
    dtype: str | torch.dtype | None, config: ModelConfig, device: torch.device
) -> torch.dtype:
    """Of activations and cache: `None` is the checkpoint's on a GPU and float32 on a CPU."""
    if dtype is None:
        if device.type == "cpu":
            return torch.float32
        dtype = config.dtype
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
        return _DTYPES[dtype]
    if dtype not in _DTYPES.values():
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    return dtype
