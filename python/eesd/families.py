"""The model families: what each adds to Llama's decoder, and how its `config.json` says so.

One backbone serves them all (`eesd.models`): pre-norm layers of RMSNorm, RoPE, grouped-query
attention and SwiGLU. They differ in biases, in norms of the query and key heads, and in sliding
windows. Whatever else a config asks for is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from eesd.fields import Fields

Windows = tuple[int | None, ...]
"""A layer's window each: the positions that a row sees, its own among them; None is all."""


def _no_windows(fields: Fields, layers: int) -> Windows:
    fields.refuse("sliding_window", " for this architecture")
    fields.refuse("layer_types", " for this architecture")
    return (None,) * layers


def _one_window(fields: Fields, layers: int) -> Windows:
    fields.refuse("layer_types", " for this architecture")
    window = fields.size("sliding_window") if fields.given("sliding_window") else None
    return (window,) * layers


def _windows_by_layer(fields: Fields, layers: int) -> Windows:
    full, sliding = "full_attention", "sliding_attention"
    window = None
    if fields.flag("use_sliding_window") and fields.given("sliding_window"):
        window = fields.size("sliding_window")
    kinds = fields.content.get("layer_types")
    if kinds is None:
        first = layers if window is None else fields.size("max_window_layers", least=0)
        return tuple(window if i >= first else None for i in range(layers))
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(kind not in (full, sliding) for kind in kinds)
    ):
        raise fields.wrong("layer_types", f"a list of {layers}, each {full} or {sliding}")
    if sliding in kinds and window is None:
        raise fields.wrong("layer_types", f"{full} alone, as no sliding window is in use")
    return tuple(window if kind == sliding else None for kind in kinds)


@dataclass(frozen=True)
class Family:
    """An architecture.

    defaults: what transformers takes where `config.json` has no such key. qkv_bias: on the query,
    key and value projections. attention_bias: a config may put a bias on these three and on the
    output projection. qk_norm: RMSNorm of each query and key head before RoPE.
    """

    model_type: str
    defaults: Mapping[str, Any]
    windows: Callable[[Fields, int], Windows] = _no_windows
    qkv_bias: bool = False
    attention_bias: bool = False
    qk_norm: bool = False


_QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILIES = {
    "LlamaForCausalLM": Family("llama", {"max_position_embeddings": 2048}, attention_bias=True),
    "MistralForCausalLM": Family(
        "mistral",
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        _one_window,
    ),
    "Qwen2ForCausalLM": Family("qwen2", _QWEN, _windows_by_layer, qkv_bias=True),
    "Qwen3ForCausalLM": Family(
        "qwen3", {**_QWEN, "head_dim": 128}, _windows_by_layer, attention_bias=True, qk_norm=True
    ),
}


def family_of(fields: Fields) -> tuple[str, Family]:
    """Name and family; `architectures` decides, or where it is absent `model_type`."""
    name = fields.architecture()
    by_type = {family.model_type: known for known, family in FAMILIES.items()}
    known = by_type.get(name, name) if isinstance(name, str) else None
    if known not in FAMILIES:
        raise ValueError(
            f"{fields.where}: architecture {name!r} is not supported ({', '.join(FAMILIES)} are)"
        )
    family = FAMILIES[known]
    if fields.content.get("model_type", family.model_type) != family.model_type:
        raise fields.wrong("model_type", f"{family.model_type!r} for {known}")
    return known, family
