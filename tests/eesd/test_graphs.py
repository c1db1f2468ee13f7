"""Rounds over static buffers, as CUDA graphs replay them, write the same text as `generate`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eesd import Model, generate, load
from eesd.controller import Controller
from eesd.graphs import FixedRounds, captured_capacity
from eesd.round import Engine, Sampling
from eesd_kernels import Law, Rule

PROMPTS = [torch.tensor([3, 9, 4, 11]), torch.tensor([5]), torch.tensor([7, 8, 30, 2, 1, 40])]
COUNT = 24


@pytest.fixture
def model(tiny_llama: Path) -> Model:
    return load(tiny_llama, assistant_early_exit=2, dtype="float64")


def fixed_texts(model: Model, rule: Rule, temperature: float, eos: Tensor) -> list[list[int]]:
    """New tokens of each prompt, two calls' worth of them over the same buffers; the last one's."""
    head, device = model.exit_head, torch.device("cpu")
    engine = Engine(model.backbone, head, model.backbone.new_cache(3, 40, exit_layers=1))

    def rules(seed: int) -> tuple[Sampling, Controller]:
        law = Law.COUPLED if temperature else Law.SAMPLED
        sampling = Sampling.uniform(
            [seed, seed + 1, seed + 2], device, temperature=temperature, law=law
        )
        costs = torch.linspace(1.0, 1.6, 5)
        return sampling, Controller(3, device, rule=rule, max_draft=4, prior=(2, 1), costs=costs)

    rounds = FixedRounds(engine, *rules(0), eos)
    for seed in (100, 5):
        state = engine.prefill(PROMPTS)
        state.remaining.fill_(COUNT)
        rounds.start(state, *rules(seed), eos)
        texts: list[list[int]] = [[], [], []]
        while bool(rounds.state.alive.any()):
            for text, (*tokens, accepted, drafted, status) in zip(texts, rounds.run(), strict=True):
                assert status == 0
                if drafted >= 0:
                    text += tokens[: accepted + 1]
    return texts


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("rule", [Rule.CONSTANT, Rule.COST, Rule.BERNOULLI])
@torch.inference_mode()
def test_texts_are_generate_s(model: Model, rule: Rule, temperature: float) -> None:
    eos = torch.tensor([17, 23], dtype=torch.int32)
    for number, (prompt, got) in enumerate(
        zip(PROMPTS, fixed_texts(model, rule, temperature, eos), strict=True)
    ):
        want = generate(
            model, prompt[None], max_new_tokens=COUNT, num_assistant_tokens=0,
            eos_token_id=(17, 23), do_sample=temperature > 0, temperature=temperature or 1.0,
            seed=5 + number,
        )[0, len(prompt) :].tolist()  # fmt: skip
        end = next((i + 1 for i, t in enumerate(got) if t in (17, 23)), len(got))
        assert got[:end] == want


def test_capacity_of_a_capture() -> None:
    assert captured_capacity(5, 4096) == 1024
    assert captured_capacity(1025, 4096) == 2048
    assert captured_capacity(3000, 3500) == 3500
    assert captured_capacity(64, 64) == 64
