"""Flow matching: what the network is trained to predict, and how a chunk is integrated from noise.

Default (`corrected`, as in the authors' code): x0 ~ N(0, I), b ~ Beta(1.5, 1), s = 0.999 (1 - b), so most
training happens near noise; x_s = (1 - s) x0 + s a; the network predicts v = a - x0; sampling integrates s
from 0 to 1.

`paper_literal` is the printed text (equation 9, algorithm 3): s ~ Beta(1.5, 1), x_s = s x0 + (1 - s) a, loss
||a - x0 - (1 - s) g||^2, Euler from s = 0 to 1. These contradict each other: integrated as printed, samples
collapse to the mean. Trained that way, `integrate` runs backwards from s = 1 with u += ds (1 - s) g, which
recovers the data. For study only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]  # (u [B, H, D] fp32, s) -> g(u, s) [B, H, D]


@dataclass
class Target:
    x: Tensor  # [B, H, D], x_s
    s: Tensor  # [B]
    velocity: Tensor  # [B, H, D], what weight * prediction should equal
    weight: Tensor  # [B, 1, 1]


def sample_target(
    actions: Tensor, objective: str = "corrected", generator: torch.Generator | None = None
) -> Target:
    """Draw noise and time for normalised `actions` [B, H, D] (fp32)."""
    batch, kind = actions.shape[0], {"device": actions.device, "generator": generator}
    noise = torch.randn(actions.shape, **kind)
    b = torch.rand(batch, **kind) ** (1 / 1.5)  # Beta(1.5, 1) by its inverse distribution function
    if objective == "corrected":
        s = 0.999 * (1 - b)
        data_part = s[:, None, None]
        weight = torch.ones_like(data_part)
    else:
        s = b
        data_part = 1 - s[:, None, None]
        weight = data_part
    x = (1 - data_part) * noise + data_part * actions
    return Target(x, s, actions - noise, weight)


def flow_loss(prediction: Tensor, target: Target, valid: Tensor | None = None) -> Tensor:
    """Mean squared error of the flow; `valid` [B, H] bool leaves repeat-padded actions out."""
    error = (target.weight * prediction.float() - target.velocity).square().mean(-1)
    if valid is None:
        return error.mean()
    return (error * valid).sum() / valid.sum().clamp(min=1)


def schedule(steps: int, objective: str = "corrected") -> list[tuple[float, float]]:
    """(time s, gain) of each step: u += gain * g(u, s).

    corrected: s = 0, 1/n, ... with gain 1/n. paper_literal: s falls from 1 to 0, read at the middle of each
    step since the printed loss gives the network no signal at s = 1, with gain (1 - s) / n.
    """
    if objective == "corrected":
        return [(k / steps, 1 / steps) for k in range(steps)]
    times = [1 - (k + 0.5) / steps for k in range(steps)]
    return [(s, (1 - s) / steps) for s in times]


def integrate(
    velocity: Velocity,
    noise: Tensor,
    steps: int = 10,
    sampler: str = "euler",
    objective: str = "corrected",
    first: Tensor | None = None,
) -> Tensor:
    """Noise [B, H, D] -> actions [B, H, D], integrator state in fp32, no host synchronisation.

    `first`: g(noise, s) at the first time of `schedule`, when the caller has it already (it rides in the
    prefill pass). Heun takes the mean of the slopes at both ends of each step: two evaluations a step,
    corrected only.
    """
    if sampler == "heun" and objective != "corrected":
        raise ValueError("the heun sampler integrates the corrected objective only: use euler")
    u = noise.float()
    for k, (s, gain) in enumerate(schedule(steps, objective)):
        slope = first.float() if k == 0 and first is not None else velocity(u, s).float()
        if sampler == "heun":
            slope = (slope + velocity(u + gain * slope, s + gain).float()) / 2
        u = u + gain * slope
    return u
