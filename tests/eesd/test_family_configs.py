"""What is read of a family's config.json, and what is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eesd import load
from eesd.config import ModelConfig

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 8192,
}  # fmt: skip
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
LINEAR = {"rope_type": "linear"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOWED = {"use_sliding_window": True, "sliding_window": 100}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A `config.json` of this family."""
    return {
        "architectures": [ARCHITECTURES[family]], "model_type": family, **SIZES, **changes
    }  # fmt: skip


# --- what is read


@pytest.mark.parametrize("name", ["architectures", "model_type"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_either_name_is_enough(family: str, name: str) -> None:
    config = config_of(family)
    config.pop("model_type" if name == "architectures" else "architectures")
    assert ModelConfig.from_hf(config).architecture == ARCHITECTURES[family]


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {"sliding_window": None, "layer_types": None}, (None, None, None)),
        ("mistral", {}, (4096, 4096, 4096)),
        ("mistral", {"sliding_window": None}, (None, None, None)),
        ("mistral", {"sliding_window": 7}, (7, 7, 7)),
        ("mistral", {"sliding_window": 8191}, (8191, 8191, 8191)),
        ("mistral", {"sliding_window": 8192}, (None, None, None)),
        ("qwen2", {}, (None, None, None)),
        ("qwen2", {"sliding_window": 100}, (None, None, None)),
        ("qwen2", {"use_sliding_window": True}, (None, None, None)),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, (None, None, 4096)),
        ("qwen2", {**WINDOWED, "max_window_layers": 1}, (None, 100, 100)),
        ("qwen3", {**WINDOWED, "max_window_layers": 0}, (100, 100, 100)),
        ("qwen3", {**WINDOWED, "sliding_window": None, "max_window_layers": 0}, (None,) * 3),
        (
            "qwen3",
            {**WINDOWED, "max_window_layers": 0, "layer_types": ["full_attention"] * 3},
            (None, None, None),
        ),
        (
            "qwen2",
            {**WINDOWED, "layer_types": ["sliding_attention", *["full_attention"] * 2]},
            (100, None, None),
        ),
    ],
    ids=str,
)
def test_windows(family: str, changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert ModelConfig.from_hf(config_of(family, **changes)).windows == windows


@pytest.mark.parametrize(
    ("family", "changes", "parts"),
    [
        ("llama", {}, (False, False, False)),
        ("llama", {"attention_bias": True}, (True, True, False)),
        ("mistral", {"attention_bias": False}, (False, False, False)),
        ("qwen2", {}, (True, False, False)),
        ("qwen3", {}, (False, False, True)),
        ("qwen3", {"attention_bias": True}, (True, True, True)),
    ],
)
def test_parts(family: str, changes: dict[str, Any], parts: tuple[bool, bool, bool]) -> None:
    config = ModelConfig.from_hf(config_of(family, **changes))
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == parts


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """Where `config.json` lacks a key."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(family)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    config = {name: getattr(theirs, name) for name in (*sizes, "num_attention_heads")}
    ours = ModelConfig.from_hf({"model_type": family, **config})
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.num_kv_heads == theirs.num_key_value_heads
    head_size = getattr(theirs, "head_dim", None) or theirs.hidden_size // ours.num_heads
    assert ours.head_size == head_size
    assert ours.rms_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied_head == theirs.tie_word_embeddings
    window = getattr(theirs, "sliding_window", None)
    assert set(ours.windows) == {window}


def test_llama3_scaling_starts_from_the_model_s_positions() -> None:
    config = ModelConfig.from_hf(config_of("llama", rope_scaling=LLAMA3))
    assert config.rope.original_max_position == 8192


# --- what is refused


@pytest.mark.parametrize(
    "name",
    [
        "GemmaForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "Qwen2VLForConditionalGeneration",
        "Phi3ForCausalLM", "GPT2LMHeadModel", "MistralModel", "MinistralForCausalLM",
        "DeepseekV3ForCausalLM", "mixtral", "qwen3_moe",
    ],
)  # fmt: skip
def test_other_architectures(name: str) -> None:
    key = {"architectures": [name]} if name[0].isupper() else {"model_type": name}
    message = (
        rf"somewhere: architecture '{name}' is not supported \(LlamaForCausalLM, "
        r"MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM are\)"
    )
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**SIZES, **key}, "somewhere")


ALL = tuple(ARCHITECTURES)


@pytest.mark.parametrize(
    ("families", "changes", "message"),
    [
        (ALL, {"mlp_bias": True}, "mlp_bias = True is not supported"),
        (("mistral", "qwen2"), {"attention_bias": True}, "attention_bias = True is not supported"),
        (ALL, {"attention_bias": "yes"}, "attention_bias.* 'yes'"),
        (ALL, {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        (ALL, {"hidden_act": None}, "hidden_act = None is not supported"),
        (ALL, {"quantization_config": {"bits": 4}}, "quantization_config = .*is not supported"),
        (ALL, {"tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false, got 1"),
        (("llama",), {"sliding_window": 4096}, "sliding_window = 4096 is not supported"),
        (("llama", "mistral"), {"layer_types": ["full_attention"] * 3}, "layer_types = .* is not"),
        (("mistral",), {"sliding_window": 0}, "sliding_window: expected a positive integer, got 0"),
        (("mistral",), {"sliding_window": 8.5}, "sliding_window: expected .*, got 8.5"),
        (
            ("qwen2", "qwen3"),
            {"use_sliding_window": True, "sliding_window": -1},
            "sliding_window: expected a positive integer, got -1",
        ),
        (("qwen2", "qwen3"), {"use_sliding_window": "on"}, "use_sliding_window: expected true or"),
        (
            ("qwen2", "qwen3"),
            {**WINDOWED, "max_window_layers": -1},
            "max_window_layers: expected an integer, 0 or more, got -1",
        ),
        (
            ("qwen2", "qwen3"),
            {**WINDOWED, "layer_types": ["sliding_attention"]},
            "layer_types: expected a list of 3, each full_attention or sliding_attention, got",
        ),
        (
            ("qwen2", "qwen3"),
            {**WINDOWED, "layer_types": ["full_attention", "linear_attention", "full_attention"]},
            "layer_types: expected a list of 3, .*'linear_attention'",
        ),
        (("qwen2", "qwen3"), {"layer_types": "full_attention"}, "layer_types: expected a list"),
        (("qwen2", "qwen3"), {"layer_types": [[], {}, 1]}, "layer_types: expected a list"),
        (
            ("qwen2", "qwen3"),
            {"layer_types": ["sliding_attention"] * 3},
            "layer_types: expected full_attention alone, as no sliding window is in use, got",
        ),
        (ALL, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "RoPE of type 'yarn'"),
        (ALL, {"rope_scaling": {"type": "mrope"}}, "RoPE of type 'mrope'"),
        (ALL, {"rope_scaling": {"rope_type": "dynamic"}}, "RoPE of type 'dynamic'"),
        (ALL, {"rope_parameters": {"rope_type": "longrope"}}, "RoPE of type 'longrope'"),
        (ALL, {"rope_parameters": {"rope_type": ["a"]}}, r"RoPE of type \['a'\]"),
        (
            ALL,
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            "rope_parameters: full_attention: RoPE by layer is not supported",
        ),
        (ALL, {"rope_scaling": LINEAR}, "rope_scaling: factor: expected a number, got None"),
        (
            ALL,
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
            "rope_scaling: high_freq_factor: expected a number, got None",
        ),
        (ALL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (ALL, {"model_type": "gemma"}, "model_type: expected '.*' for .*ForCausalLM, got 'gemma'"),
        (ALL, {"hidden_size": 0}, "hidden_size: expected a positive integer, got 0"),
        (ALL, {"hidden_size": "32"}, "hidden_size: expected a positive integer, got '32'"),
        (ALL, {"num_hidden_layers": True}, "num_hidden_layers: expected a positive integer, got"),
        (ALL, {"vocab_size": None}, "vocab_size: expected a positive integer, got None"),
        (ALL, {"num_key_value_heads": 3}, "num_attention_heads = 4 is not a multiple of .* = 3"),
        (ALL, {"head_dim": 9}, "head size 9 is not supported"),
        (ALL, {"head_dim": None, "hidden_size": 36}, "head size 9 is not supported"),
        (ALL, {"head_dim": None, "hidden_size": 50}, r"head size 12\.5 is not supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_unsupported_config_is_refused_by_name(
    families: tuple[str, ...], changes: dict[str, Any], message: str
) -> None:
    for family in families:
        assert ModelConfig.from_hf(config_of(family)).num_layers == 3
        with pytest.raises(ValueError, match=f"somewhere: {message}"):
            ModelConfig.from_hf(config_of(family, **changes), "somewhere")


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj.bias", "self_attn.q_norm.weight", "pre_feedforward_layernorm.weight"]
)
def test_tensors_that_the_config_has_no_place_for(
    make_llama: Any, tmp_path: Path, name: str
) -> None:
    """They would change what the layer computes; the tables of old RoPE code would not."""
    folder = make_llama(tmp_path / "model")
    path, layer = folder / "model.safetensors", "model.layers.1."
    tensors = load_file(path)
    tensors[f"{layer}self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, path)
    load(folder)
    save_file({**tensors, layer + name: torch.ones(32)}, path)
    message = f"tensor '{layer}{name}' is not supported .LlamaForCausalLM with this config has none"
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_tensors_that_the_config_asks_for(make_llama: Any, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", attention_bias=True)
    with pytest.raises(ValueError, match=r"no tensor 'model\.layers\.0\.self_attn\.q_proj\.bias'"):
        load(folder)
