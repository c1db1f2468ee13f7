"""What a model and an exit head are made of, read from their `config.json`."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eesd.families import Windows, family_of
from eesd.fields import Fields, read_json

EXIT_HEAD_TYPE = "eesd_exit_head"
MAX_POSITION = 2**24  # far above any model's: more is a slip, met here and not as lack of memory


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` is default, linear or llama3, with the parameters of each."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    @classmethod
    def from_hf(cls, of_config: Fields) -> "RopeConfig":
        """From transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) keys."""
        config, where = of_config.content, of_config.where
        scaling = {**of_config.mapping("rope_scaling"), **of_config.mapping("rope_parameters")}
        place = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        fields = Fields(scaling, f"{where}: {place}")
        if nested := [name for name, value in scaling.items() if isinstance(value, dict)]:
            raise ValueError(f"{where}: {place}: {nested[0]}: RoPE by layer is not supported")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(
                f"{where}: RoPE of type {kind!r} is not supported (default, linear, llama3 are)"
            )
        if config.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ValueError(f"{where}: partial_rotary_factor other than 1 is not supported")
        llama3 = kind == "llama3"
        return cls(
            theta=(fields if "rope_theta" in scaling else of_config).number("rope_theta", 10000.0),
            kind=kind,
            factor=fields.number("factor", 1.0 if kind == "default" else None),
            low_freq_factor=fields.number("low_freq_factor", None if llama3 else 1.0),
            high_freq_factor=fields.number("high_freq_factor", None if llama3 else 4.0),
            original_max_position=fields.size(
                "original_max_position_embeddings", of_config.size("max_position_embeddings")
            ),
        )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder. Sizes in elements; `eos_token_ids` may be empty.

    windows: by layer, see `Windows`. qkv_bias, output_bias: of the attention's projections.
    qk_norm: RMSNorm of each query and key head before RoPE.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    windows: Windows
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    rms_eps: float
    max_position: int
    tied_head: bool
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    rope: RopeConfig = field(default_factory=RopeConfig)

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `config.json`; an unsupported feature is named in the `ValueError`.

        The ids of end and padding in `generation_config.json` go before, as in transformers.
        """
        path, beside = folder / "config.json", folder / "generation_config.json"
        config = cls.from_hf(read_json(path), str(path))
        if not beside.exists():
            return config
        fields = Fields(read_json(beside), str(beside))
        ids: dict[str, Any] = {
            "eos_token_ids": fields.tokens("eos_token_id") or None,
            "pad_token_id": fields.token("pad_token_id"),
        }
        given = {name: value for name, value in ids.items() if value is not None}
        return dataclasses.replace(config, **given)

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config") -> "ModelConfig":
        """From the keys of a Hugging Face `config.json`."""
        architecture, family = family_of(Fields(config, where))
        fields = Fields({**family.defaults, **config}, where)
        size = fields.size
        fields.refuse("quantization_config")
        fields.refuse("mlp_bias")
        if not family.attention_bias:
            fields.refuse("attention_bias", " for this architecture")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"{where}: hidden_act = {config['hidden_act']!r} is not supported (silu is)"
            )
        layers, hidden = size("num_hidden_layers"), size("hidden_size")
        heads = size("num_attention_heads")
        kv_heads = heads
        if fields.given("num_key_value_heads"):
            kv_heads = size("num_key_value_heads")
        head_size = size("head_dim") if fields.given("head_dim") else hidden // heads
        if heads % kv_heads:
            raise ValueError(
                f"{where}: num_attention_heads = {heads} is not a multiple of "
                f"num_key_value_heads = {kv_heads}"
            )
        if head_size % 2 or (not fields.given("head_dim") and hidden % heads):
            exact = head_size if fields.given("head_dim") else hidden / heads
            raise ValueError(f"{where}: head size {exact:g} is not supported (even is)")
        positions = size("max_position_embeddings", most=MAX_POSITION)
        # A window as wide as the model's positions hides nothing.
        windows = tuple(
            None if window is None or window >= positions else window
            for window in family.windows(fields, layers)
        )
        attention_bias = fields.flag("attention_bias")
        return cls(
            architecture=architecture,
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            windows=windows,
            qkv_bias=family.qkv_bias or attention_bias,
            output_bias=attention_bias,
            qk_norm=family.qk_norm,
            rms_eps=fields.number("rms_norm_eps", 1e-6),
            max_position=positions,
            tied_head=fields.flag("tie_word_embeddings"),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            bos_token_id=fields.token("bos_token_id"),
            eos_token_ids=fields.tokens("eos_token_id"),
            pad_token_id=fields.token("pad_token_id"),
            rope=RopeConfig.from_hf(fields),
        )


@dataclass(frozen=True)
class ExitHeadConfig:
    """An exit head's `config.json`: which backbone it fits, and what was measured of it.

    exit_layer is N: the head reads the hidden state after the first N layers. prior_alpha and
    prior_beta are the measured Beta prior of a draft token's acceptance.
    """

    exit_layer: int
    backbone_architecture: str
    backbone_fingerprint: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    own_lm_head: bool = False
    prior_alpha: float = 1.0
    prior_beta: float = 1.0
    recipe: dict[str, Any] = field(default_factory=dict)
    model_type: str = EXIT_HEAD_TYPE

    def __post_init__(self) -> None:
        if self.model_type != EXIT_HEAD_TYPE:
            raise ValueError(f"model_type: expected {EXIT_HEAD_TYPE!r}, got {self.model_type!r}")
        if type(self.exit_layer) is not int or not 1 <= self.exit_layer < self.num_layers:
            raise ValueError(
                f"exit_layer: expected an integer, 1 to {self.num_layers - 1}, "
                f"got {self.exit_layer!r}"
            )
        if not all(0 < value < math.inf for value in (self.prior_alpha, self.prior_beta)):
            raise ValueError(
                "prior_alpha, prior_beta: expected finite and above 0, "
                f"got {self.prior_alpha}, {self.prior_beta}"
            )

    @classmethod
    def from_folder(cls, folder: Path) -> "ExitHeadConfig":
        """Read `config.json`, refusing unknown and missing fields by name."""
        path = folder / "config.json"
        content = read_json(path)
        if content.get("model_type") != EXIT_HEAD_TYPE:
            raise ValueError(
                f"{path}: not an exit head: model_type is {content.get('model_type')!r}, "
                f"expected {EXIT_HEAD_TYPE!r}"
            )
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(content) - known):
            raise ValueError(f"{path}: unknown field(s): {', '.join(unknown)}")
        try:
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as `config.json` holds them."""
        return dataclasses.asdict(self)
