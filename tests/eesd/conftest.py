"""A tiny Llama folder with seeded random weights, and text for it."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ALPHABET = "\n !\"'(),-.0123456789:;?ABCDEabcdefghijklmnopqrstuvwxyz_=+*/"
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "float32",
}


def write_tiny_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a model folder: config, random weights, a tokenizer of one token a character."""
    config = {**TINY, **changes}
    hidden, inter, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    weights = {
        "model.embed_tokens.weight": matrix(vocab, hidden) * hidden**0.5,
        "model.norm.weight": torch.ones(hidden),
    }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = 3 * matrix(vocab, hidden)  # peaked enough to agree about
    for i in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inter, hidden),
            "mlp.up_proj": (inter, hidden),
            "mlp.down_proj": (hidden, inter),
        }
        for name, shape in shapes.items():
            weights[f"model.layers.{i}.{name}.weight"] = matrix(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{name}.weight"] = torch.ones(hidden)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {"<|endoftext|>": 0, "<unk>": 1, **{c: i + 2 for i, c in enumerate(ALPHABET)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|endoftext|>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sentences(count: int, seed: int = 0) -> list[str]:
    """Short documents over a few words."""
    rng = random.Random(seed)
    words = [
        "a",
        "cat",
        "sees",
        "the",
        "red",
        "dog",
        "and",
        "runs",
        "to",
        "an",
        "old",
        "tree",
        "by",
        "the",
        "sea",
        "in",
        "12",
        "days",
    ]
    return [" ".join(rng.choices(words, k=rng.randint(6, 16))) + "." for _ in range(count)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """At these sizes threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama of 4 layers, hidden 32, vocabulary 64."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    """`make_llama(folder, seed=0, **config)` writes another one."""
    return write_tiny_llama


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 300 documents."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(300)))
    return path
