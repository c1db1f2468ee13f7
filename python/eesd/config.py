"""What a model and an exit head are made of, read from their `config.json`."""

import dataclasses
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXIT_HEAD_TYPE = "eesd_exit_head"
MAX_POSITION = 2**24  # far above any model's: more is a slip, met here and not as lack of memory


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `ValueError` naming the file where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


@dataclass(frozen=True)
class _Fields:
    """Typed reads of a JSON object; a `ValueError` names the field, what fits and what came."""

    content: dict[str, Any]
    where: str

    def wrong(self, name: str, expected: str) -> ValueError:
        got = self.content.get(name)
        return ValueError(f"{self.where}: {name}: expected {expected}, got {got!r}")

    def size(self, name: str, default: int | None = None, most: int | None = None) -> int:
        value = self.content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(name, "a positive integer")
        if most is not None and value > most:
            raise self.wrong(name, f"at most {most}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.wrong(name, "a number")
        if not 0 < value <= sys.float_info.max:
            raise self.wrong(name, "a finite number above 0")
        return float(value)

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.content.get(name)
        if not isinstance(value, dict | None):
            raise self.wrong(name, "an object or null")
        return value or {}

    def token(self, name: str) -> int | None:
        value = self.content.get(name)
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise self.wrong(name, "an integer or null")
        return value

    def tokens(self, name: str) -> tuple[int, ...]:
        value = self.content.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise self.wrong(name, "an integer, a list of integers or null")
        return tuple(ids)

    def architecture(self) -> Any:
        names = self.content.get("architectures")
        if not isinstance(names, str | list | None):
            raise self.wrong("architectures", "a list of names")
        names = [names] if isinstance(names, str) else names or [self.content.get("model_type")]
        return names[0]


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
    def from_hf(cls, config: dict[str, Any], where: str) -> "RopeConfig":
        """From transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) keys."""
        of_config = _Fields(config, where)
        scaling = {**of_config.mapping("rope_scaling"), **of_config.mapping("rope_parameters")}
        place = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        fields = _Fields(scaling, f"{where}: {place}")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(
                f"{where}: RoPE of type {kind!r} is not supported (default, linear, llama3 are)"
            )
        if config.get("partial_rotary_factor", scaling.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ValueError(f"{where}: partial_rotary_factor other than 1 is not supported")
        return cls(
            theta=(fields if "rope_theta" in scaling else of_config).number("rope_theta", 10000.0),
            kind=kind,
            factor=fields.number("factor", 1.0),
            low_freq_factor=fields.number("low_freq_factor", 1.0),
            high_freq_factor=fields.number("high_freq_factor", 4.0),
            original_max_position=fields.size("original_max_position_embeddings", 8192),
        )


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-shaped decoder. Sizes in elements; `eos_token_ids` may be empty."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
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
        """Read `config.json`; an unsupported feature is named in the `ValueError`."""
        path = folder / "config.json"
        return cls.from_hf(read_json(path), str(path))

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config") -> "ModelConfig":
        """From the keys of a Hugging Face `config.json`."""
        fields = _Fields(config, where)
        size, architecture = fields.size, fields.architecture()
        if architecture not in ("LlamaForCausalLM", "llama"):
            raise ValueError(
                f"{where}: architecture {architecture!r} is not supported (LlamaForCausalLM is)"
            )
        unsupported = {
            "attention_bias": config.get("attention_bias", False),
            "mlp_bias": config.get("mlp_bias", False),
            "quantization_config": bool(config.get("quantization_config")),
            "sliding_window": config.get("sliding_window") is not None,
        }
        for name, present in unsupported.items():
            if present:
                raise ValueError(f"{where}: {name} = {config[name]!r} is not supported")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"{where}: hidden_act = {config['hidden_act']!r} is not supported (silu is)"
            )
        hidden, heads = size("hidden_size"), size("num_attention_heads")
        given = {name for name, value in config.items() if value is not None}
        kv_heads = size("num_key_value_heads") if "num_key_value_heads" in given else heads
        head_size = size("head_dim") if "head_dim" in given else hidden // heads
        if heads % kv_heads:
            raise ValueError(
                f"{where}: num_attention_heads = {heads} is not a multiple of "
                f"num_key_value_heads = {kv_heads}"
            )
        if head_size % 2 or ("head_dim" not in given and hidden % heads):
            exact = head_size if "head_dim" in given else hidden / heads
            raise ValueError(f"{where}: head size {exact:g} is not supported (even is)")
        return cls(
            architecture="LlamaForCausalLM",
            vocab_size=size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_layers=size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            rms_eps=fields.number("rms_norm_eps", 1e-6),
            max_position=size("max_position_embeddings", 2048, MAX_POSITION),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            bos_token_id=fields.token("bos_token_id"),
            eos_token_ids=fields.tokens("eos_token_id"),
            pad_token_id=fields.token("pad_token_id"),
            rope=RopeConfig.from_hf(config, where),
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
