"""Synthetic models: of the shape asked for, and their exit agrees as often as asked."""

from typing import Any

import pytest
import torch

import eesd
from eesd import synthetic
from eesd.synthetic_models import SHAPES

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("agreement", [0.6, 0.9])
def test_agrees_as_often_as_asked(agreement: float) -> None:
    """On random text, and nearly so on the text that it writes: there 500 tokens are counted."""
    model = synthetic(SMALL, agreement=agreement, exit_layer=2, device="cpu")
    head = model.exit_head
    assert head is not None
    assert abs(head.config.recipe["measured_agreement"] - agreement) < 0.02
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 512, (4, 8), generator=generator)
    out = eesd.generate(
        model, ids, max_new_tokens=128, num_assistant_tokens=1, do_sample=True, temperature=0.3,
        num_assistant_tokens_schedule="constant", seed=1, eos_token_id=(),
        return_dict_in_generate=True,
    )  # fmt: skip
    assert abs(out.speculative.draft_acceptance_rate - agreement) < 0.15


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"tie_word_embeddings": True},
    ],
    ids=["qwen3", "qwen2", "tied"],
)
def test_greedy_text_is_plain_decoding_s(changes: dict[str, Any]) -> None:
    model = synthetic({**SMALL, **changes}, agreement=0.8, exit_layer=1, device="cpu")
    ids = torch.randint(3, 512, (3, 5), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": ()}
    plain = eesd.generate(model, ids, num_assistant_tokens=0, **options)
    assert torch.equal(eesd.generate(model, ids, seed=0, **options), plain)


def test_same_seed_same_weights() -> None:
    first, again, other = (
        synthetic(SMALL, agreement=0.7, exit_layer=1, seed=seed, device="cpu").backbone
        for seed in (3, 3, 4)
    )
    assert torch.equal(first.layers[-1].down, again.layers[-1].down)
    assert not torch.equal(first.embedding, other.embedding)


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama-2-7b", 6.74e9),
        ("llama-2-13b", 13.02e9),
        ("llama-2-70b", 68.98e9),
        ("llama-3-8b", 8.03e9),
    ],
)
def test_named_shapes_have_the_parameters_of_their_names(shape: str, parameters: float) -> None:
    c = SHAPES[shape]
    hidden, inter, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    kv = hidden // heads * c["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inter + 2 * hidden
    total = c["num_hidden_layers"] * layer + 2 * c["vocab_size"] * hidden + hidden
    assert total == pytest.approx(parameters, rel=2e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"shape": "llama-9"}, "shape: expected one of llama-2-7b.*got 'llama-9'"),
        ({"agreement": 0.0}, "agreement: expected above 0"),
        ({"agreement": 1.5}, "agreement: expected above 0"),
        ({"exit_layer": 6}, "exit_layer: expected an integer, 1 to 5, got 6"),
    ],
)
def test_says_what_is_wrong(arguments: dict[str, Any], said: str) -> None:
    given = {"shape": SMALL, "agreement": 0.8, "exit_layer": 1, "device": "cpu", **arguments}
    with pytest.raises(ValueError, match=said):
        synthetic(given.pop("shape"), **given)
