"""Stage 3: flow-matching finetuning of a small ViPRA-FM policy on demonstrations (paper section 4.3,
appendix D).

Notable: the prefix (text and two frames) never sees the actions, so `SAMPLES` independent draws of noise
and flow time share one prefix in one pass: the same gradient in expectation, for a fraction of the
arithmetic.
"""

import copy

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from models import sequence
from models.backbone import rope
from models.flow import flow_loss, sample_target
from models.policy import Policy

SAMPLES = 4


def shared_prefix_loss(
    policy: Policy,
    texts: list[list[int]],
    codes: Tensor,
    actions: Tensor,
    bridge: Tensor,
    samples: int = SAMPLES,
) -> Tensor:
    """Flow-matching loss of `samples` draws a row. codes [B, 2, N]; actions [B, H, D] normalised. Equals
    `Policy.loss` for one sample.
    """
    config, (batch, horizon, dim) = policy.config, actions.shape
    layout = policy.layout(max(map(len, texts)), bridge)
    ids, lengths = sequence.pad_left(texts, layout.text_slots)
    target = sample_target(actions.repeat_interleave(samples, 0), config.objective)
    noisy = policy.action_encoder(target.x, target.s).reshape(batch, samples * horizon, -1)
    x = torch.cat([policy.backbone.text_embedding(ids), policy.embed_scene(codes, bridge), noisy], 1)

    positions = sequence.positions(lengths, layout)
    prefix, chunk = positions[:, : layout.first_action], positions[:, layout.first_action :]
    mask = sequence.attention_mask(lengths, layout, config.chunk_attention)
    first = layout.first_action
    size = first + samples * horizon
    wide = mask.new_zeros(batch, 1, size, size)
    wide[:, :, :first, :first] = mask[:, :, :first, :first]
    for k in range(samples):
        rows = slice(first + k * horizon, first + (k + 1) * horizon)
        wide[:, :, rows, :first] = mask[:, :, first:, :first]
        wide[:, :, rows, rows] = mask[:, :, first:, first:]
    rotation = rope(config, torch.cat([prefix, chunk.repeat(1, samples)], 1))
    hidden = policy.backbone(x, rotation, wide, tail=samples * horizon)
    prediction = policy.action_head(hidden).reshape(batch * samples, horizon, dim)
    return flow_loss(prediction, target)


def train(
    policy: Policy,
    texts: list[list[int]],
    codes: Tensor,
    previous: np.ndarray,
    task: np.ndarray,
    actions: Tensor,
    rows: np.ndarray,
    bridge: Tensor,
    steps: int,
    batch: int = 24,
    learning_rate: float = 1e-3,
    lags: tuple[float, ...] = (0.3, 0.4, 0.3),
    seed: int = 0,
) -> tuple[Policy, list[float]]:
    """Train on frame codes [N, tokens] (frame n follows frame previous[n]) and normalised actions [N, H, D].

    Only `rows` are drawn. `texts` by task index. `lags`: share of samples whose o_{t-1} lies 0, 1, 2 ..
    frames back: chunks are played faster than demonstrations were recorded, and a policy that reads its
    speed off the two frames runs away with it (causal confusion, de Haan et al. 2019). Returns the
    exponential moving average of the policy and the loss curve.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    average = copy.deepcopy(policy).requires_grad_(False)
    losses = []
    with Progress() as progress:
        bar = progress.add_task("finetune", total=steps)
        for step in range(steps):
            now = rng.choice(rows, size=batch)
            before, lag = now, rng.choice(len(lags), size=batch, p=lags)
            for back in range(1, len(lags)):
                before = np.where(lag >= back, previous[before], before)
            pair = torch.stack([codes[before], codes[now]], 1)
            loss = shared_prefix_loss(policy, [texts[task[n]] for n in now], pair, actions[now], bridge)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            decay = min(0.998, (1 + step) / (10 + step))
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), policy.parameters(), strict=True):
                    slow.lerp_(fast, 1 - decay)
            losses.append(loss.item())
            progress.update(bar, advance=1, description=f"finetune loss {np.mean(losses[-50:]):.3f}")
            if step % 100 == 99:
                progress.console.print(f"step {step + 1}: loss {np.mean(losses[-100:]):.4f}")
    return average.eval(), losses
