"""Beta(a, b) as X / (X + Y) of two gamma deviates (Marsaglia and Tsang, TOMS 2000), in float64.

Attempt i of element (seed, position, bucket) takes the four Philox words of (bucket, position, 0,
BETA + 256 i): 0 and 1 make two normals (Box-Muller, the cosine's for X, the sine's for Y), 2 and 3
their acceptance uniforms; each gamma takes its first accepted attempt. With d = a - 1/3 and
t = z / (3 sqrt d), `d (1 + t)^3` is accepted iff `log u <= 3 d (log(1+t) - t + t^2/2 - t^3/3)`.
A shape below 1 is drawn at a + 1 and multiplied by `U^(1/a)`, on logarithms.
"""

import math

import torch
from torch import Tensor

from eesd_kernels.laws import Purpose
from eesd_kernels.reference.philox import philox_words

SMALLEST, LARGEST = 2.0**-126, 1.0 - 2.0**-24
_MAX_ATTEMPTS = 64


def _uniform(words: Tensor) -> Tensor:
    return ((words.double() + 0.5) / 2.0**32).float().clamp(max=LARGEST).double()


def sample_beta(alpha: Tensor, beta: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    shapes = torch.stack((alpha, beta)).double().reshape(2, seed.shape[0], -1)
    bad = (~((shapes > 0) & shapes.isfinite())).any(0)
    shapes = shapes.masked_fill(bad, 1.0).clamp(1e-30, 1e30)
    rows, buckets = shapes.shape[1:]
    bucket = torch.arange(buckets, device=alpha.device)
    zero = torch.zeros_like(position)

    def words(purpose: int) -> Tensor:  # [4, rows, buckets]
        ids = 4 * bucket + torch.arange(4, device=alpha.device)[:, None]
        drawn = philox_words(seed, position, zero, purpose, ids.reshape(-1))
        return drawn.view(rows, 4, buckets).transpose(0, 1)

    d = torch.where(shapes < 1, shapes + 1, shapes) - 1 / 3
    gamma = d.clone()
    waiting = torch.ones_like(d, dtype=torch.bool)
    for attempt in range(_MAX_ATTEMPTS):
        if not bool(waiting.any()):
            break
        w = words(Purpose.BETA + 256 * attempt)
        # The angle is (quadrant + fraction) quarter turns, fraction in [-1/2, 1/2).
        fraction = (w[1] << 2 & 0xFFFFFFFF).double() / 2.0**32
        fraction = torch.where(fraction >= 0.5, fraction - 1, fraction)
        angle = ((w[1] >> 30).double() + fraction) * (math.pi / 2)
        radius = (-2 * _uniform(w[0]).log()).sqrt()
        z = torch.stack((radius * angle.cos(), radius * angle.sin()))
        t = z / (3 * d.sqrt())
        ratio = torch.log1p(t.clamp(min=-0.9999)) - t + t.square() / 2 - t**3 / 3
        accepted = waiting & (t > -0.9999) & (_uniform(w[2:]).log() <= 3 * d * ratio)
        gamma = torch.where(accepted, d * (1 + t) ** 3, gamma)
        waiting = waiting & ~accepted
    boost = torch.where(shapes < 1, _uniform(words(Purpose.BETA_BOOST)[:2]).log() / shapes, 0.0)
    x, y = gamma.log() + boost
    sample = torch.sigmoid(x - y).clamp(SMALLEST, LARGEST).float()
    # The clamp again: rounding to float32 can reach 1.
    return sample.clamp(max=LARGEST).masked_fill(bad, torch.nan).view_as(alpha)
