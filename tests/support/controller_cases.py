"""Random states of the controller, awkward on purpose: shared by the CPU's and the GPU's tests."""

import torch
from torch import Tensor

BATCHES = [0, 1, 2, 33, 300]
DRAFTS = [0, 1, 5, 8, 131]
BUCKETS = [1, 2, 8, 37]

BAD = (0.0, -1.0, float("nan"), float("inf"))


def generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(numbers) % 2**31)


def posterior(g: torch.Generator, *shape: int, bad: float = 0.1) -> Tensor:
    """Log-uniform in [0.02, 300], a share of them no parameter of a Beta law."""
    x = torch.exp(torch.rand(shape, generator=g) * 9.6 - 3.9)
    wrong = torch.tensor(BAD)[torch.randint(4, shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < bad, wrong, x)


def keys(g: torch.Generator, batch: int) -> tuple[Tensor, Tensor]:
    """seed, position."""
    seed = torch.randint(-(2**62), 2**62, (batch,), generator=g)
    return seed, torch.randint(0, 2**31 - 1, (batch,), generator=g, dtype=torch.int32)


def costs(g: torch.Generator, drafts: int) -> Tensor:
    """Mostly rising, like a real table; not always."""
    rise = torch.rand(drafts + 1, generator=g) * float(torch.rand(1, generator=g)) - 0.01
    return (1 + rise.cumsum(0)).clamp(min=0.05)


def caps(g: torch.Generator, batch: int, drafts: int) -> Tensor:
    return torch.randint(-1, drafts + 1, (batch,), generator=g, dtype=torch.int32)


def credits(g: torch.Generator, batch: int, seed: int) -> dict[str, Tensor]:
    """For some seeds none; else a mean that bounds some lengths, one in ten a debt or no number."""
    if seed % 4 not in (1, 2):
        return {}
    mean = torch.exp(torch.rand(1, generator=g) * 4 - 3)
    x = mean * 2 * torch.rand(batch, generator=g)
    wrong = torch.tensor([-3.0, *BAD[2:]])[torch.randint(3, (batch,), generator=g)]
    return {"credit": torch.where(torch.rand(batch, generator=g) < 0.1, wrong, x)}


def plan(batch: int, drafts: int, buckets: int, seed: int) -> dict[str, Tensor]:
    """Arguments of thompson_draft_length but for the rule; buckets 0: none."""
    g = generator(batch, drafts, buckets, seed)
    shape = (batch, buckets) if buckets else (batch,)
    bad = 0.1 if seed % 2 else 0.0
    key = keys(g, batch)
    return {
        "alpha": posterior(g, *shape, bad=bad / max(buckets, 1)),
        "beta": posterior(g, *shape, bad=bad / max(buckets, 1)),
        "cap": caps(g, batch, drafts),
        "costs": costs(g, drafts),
        "seed": key[0],
        "position": key[1],
        **credits(g, batch, seed),
    }


def outcome(batch: int, drafts: int, buckets: int, seed: int) -> dict[str, Tensor | float | None]:
    """Arguments of thompson_update but for the discount."""
    g = generator(batch, drafts, buckets, seed, 1)
    shape = (batch, buckets) if buckets else (batch,)
    drafted = caps(g, batch, drafts)
    accepted = (torch.rand(batch, generator=g) * (drafted.clamp(min=0) + 1)).to(torch.int32)
    bucket = torch.randint(max(buckets, 1), (batch, drafts), generator=g, dtype=torch.int32)
    unused = torch.arange(drafts) >= drafted[:, None]
    return {
        "alpha": posterior(g, *shape),
        "beta": posterior(g, *shape),
        "prior_alpha": posterior(g, *shape, bad=0.0),
        "prior_beta": posterior(g, *shape, bad=0.0),
        "drafted": drafted,
        "accepted": accepted,
        "bucket": bucket.masked_fill(unused, -1) if buckets else None,
        **credits(g, batch, seed),
        "token_credit": 1.01,
        "credit_limit": 2.0,
    }


def looks(batch: int, drafts: int, buckets: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of thompson_look but for the step and its top_prob; top_prob `[K+1, B]`."""
    arguments = plan(batch, drafts, buckets, seed)
    g = generator(batch, drafts, buckets, seed, 2)
    # Kind posteriors and mild costs, so that drafts get long.
    arguments["alpha"] = arguments["alpha"] + 3 * (seed % 3)
    arguments["costs"] = 1 + (arguments["costs"] - 1) * 0.3
    top_prob = torch.rand(drafts + 1, batch, generator=g)
    odd = torch.tensor([0.0, 1.0, 1.0000001, float("nan"), -0.5, float("inf")])
    chosen = odd[torch.randint(6, top_prob.shape, generator=g)]
    top_prob = torch.where(torch.rand(top_prob.shape, generator=g) < 0.05, chosen, top_prob)
    state = {
        "length": torch.full((batch,), 77, dtype=torch.int32),
        "bucket": torch.full((batch, drafts), 77, dtype=torch.int32),
        "run": torch.full((batch, 3), float("nan")),
        "looking": torch.full((batch,), 77, dtype=torch.int32),
    }
    return {**arguments, **state}, top_prob
