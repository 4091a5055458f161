"""The shipped tiny policy, start to end.

    python -m training.tiny --robot sim_bimanual --out checkpoints/vipra_tiny_bimanual

Simulated demonstrations of the circles expert -> frame tokenizer and vocabulary (stage 0) -> flow policy
(stage 3, from scratch: no video pretraining) -> checkpoint folder with a model card that holds what was
measured. About half an hour on one CPU core.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from config.embodiment import Embodiment
from config.loading import find, load
from config.robot import Robot
from models import checkpoint, normalization, sequence
from models.config import SIZES, ModelConfig
from models.policy import Policy
from models.tokenizer import Tokenizer
from training import tokenizer
from training.demonstrations import Demonstrations
from training.finetune import shared_prefix_loss

SAMPLES = 4  # draws of noise and time that share a prefix


@dataclass(frozen=True)
class Recipe:
    episodes: int
    tokenizer_steps: int
    policy_steps: int
    seed: int


def vocabulary(tasks: tuple[str, ...], size: int) -> Tokenizer:
    """BPE trained on the prompts themselves: they become a few tokens, any other text still encodes."""
    prompts = [sequence.PROMPT.format(task=task) for task in tasks]
    return Tokenizer.train([*prompts, "<vision>", "</vision> <action>"], size)


@torch.no_grad()
def action_error(
    policy: Policy,
    normalizer: normalization.Normalizer,
    texts: list[list[int]],
    bridge: torch.Tensor,
    codes: torch.Tensor,
    data: Demonstrations,
    rows: np.ndarray,
) -> np.ndarray:
    """|sampled - demonstrated| of the joints, rad [H, joints], mean over `rows`, with 10 Euler steps."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.stack([codes[data.previous[rows]], codes[rows]], 1)
    noise = torch.randn((len(rows), *data.actions.shape[1:]), generator=generator)
    sampled = policy.sample_recomputing([texts[data.task[n]] for n in rows], pair, noise, bridge).numpy()
    actions = normalizer.denormalize(sampled)
    joints = ~normalizer.gripper
    return np.abs(actions - data.actions[rows])[..., joints].mean(0)


def split(data: Demonstrations) -> tuple[np.ndarray, np.ndarray]:
    """Frames to train on and frames of the last tenth of the episodes, which are held out."""
    held_out = data.episode >= int(0.9 * (data.episode.max() + 1))
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def stage_0(
    data: Demonstrations, robot: Robot, recipe: Recipe, start: checkpoint.Checkpoint | None = None
) -> checkpoint.Checkpoint:
    """Frame tokenizer, vocabulary and statistics of `data`, and a policy with random weights.

    start: take its frame tokenizer and weights instead. Actions are absolute joint positions, as in the
    paper's real-robot set-up: a chunk relative to the state lets errors that 64 px do not show add up.
    """
    embodiment = load(Embodiment, robot.embodiment)
    rows, _ = split(data)
    base: ModelConfig = SIZES["vipra_tiny"]
    config = base.with_embodiment(embodiment.action_dim, embodiment.horizon, chunk_attention="bidirectional")
    kinds = tuple(d.kind for d in embodiment.dimensions)
    normalizer = normalization.fit(data.actions[rows], embodiment.names, kinds)
    policy = Policy(config)
    if start is None:
        vqgan, _ = tokenizer.train(data.frames[rows], config.vqgan, recipe.tokenizer_steps, seed=recipe.seed)
        checkpoint.initialize(policy, recipe.seed)
    else:
        vqgan = start.vqgan
        policy.load_state_dict(start.policy.state_dict())
    words = vocabulary(data.tasks, config.text_vocab)
    text = find("embodiments", robot.embodiment).read_text()
    return checkpoint.Checkpoint(config, policy, vqgan, words, normalizer, text)


def stage_3(start: checkpoint.Checkpoint, data: Demonstrations, recipe: Recipe) -> dict:
    """Train `start.policy` on, in place; returns what was measured on the held-out episodes."""
    rows, test_rows = split(data)
    codes = tokenizer.encode(start.vqgan, data.frames)
    texts = [sequence.encode_prompt(start.tokenizer, task) for task in data.tasks]
    bridge = torch.tensor(sequence.encode_bridge(start.tokenizer))
    actions = torch.from_numpy(start.normalizer.normalize(data.actions))
    start.policy, losses = train(
        start.policy.train(), texts, codes, data.previous, data.task, actions, rows, bridge,
        recipe.policy_steps, seed=recipe.seed,
    )  # fmt: skip
    picture = tokenizer.evaluate(start.vqgan, data.frames[test_rows[:512]])
    rng = np.random.default_rng(recipe.seed)
    tested = rng.choice(test_rows, 256, replace=False)
    error = action_error(start.policy, start.normalizer, texts, bridge, codes, data, tested)
    return {
        "demonstrations": int(data.episode.max() + 1),
        "frames": len(data.frames),
        "tokenizer_l1_of_255": round(picture["l1"], 2),
        "tokenizer_codes_used": picture["codes_used"],
        "flow_loss_last_100": round(float(np.mean(losses[-100:])), 4),
        "held_out_action_error_rad": {
            "mean": round(float(error.mean()), 4),
            "last_step": round(float(error[-1].mean()), 4),
        },
    }


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
    """Train on frame codes [N, tokens] (frame n follows frame previous[n]) and normalised actions [N, H,
    D].

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
            loss = shared_prefix_loss(
                policy, [texts[task[n]] for n in now], pair, actions[now], bridge, SAMPLES
            )
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


CARD = """# {name}

ViPRA-FM at its smallest, **briefly trained on simulated demonstrations only** so that the whole system can be
seen running without a GPU. It moves the hands in circles; it stacks no cups and has seen no real camera.

- Instructions it knows: {tasks}
- {parameters:,} parameters, 64 px frames, 64 tokens a frame
- Actions are absolute joint positions; bidirectional chunk
- Trained from scratch (no latent-action or video pretraining) by `python -m training.tiny {arguments}`;
  {minutes:.0f} minutes here, on one CPU core
- Measured on held-out simulated episodes:

```json
{measured}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--robot", default="sim_bimanual", help="file in config/robots, or a path")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--demonstrations", type=Path, help=".npz of training.simulated; default: record them now"
    )
    parser.add_argument("--episodes", type=int, default=180)
    parser.add_argument("--tokenizer-steps", type=int, default=1500)
    parser.add_argument("--policy-steps", type=int, default=1500)
    parser.add_argument(
        "--continue-from", type=Path, help="checkpoint whose frame tokenizer and weights to start from"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    robot = load(Robot, args.robot)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = args.demonstrations or Path(folder) / "demonstrations.npz"
        if args.demonstrations is None:
            command = [sys.executable, "-m", "training.simulated", "--robot", args.robot, "--out", str(path)]
            command += ["--episodes", str(args.episodes), "--seed", str(args.seed)]
            subprocess.run(command, check=True)
        data = Demonstrations.load(path)
    recipe = Recipe(args.episodes, args.tokenizer_steps, args.policy_steps, args.seed)
    start = args.continue_from and checkpoint.load(args.continue_from)
    result = stage_0(data, robot, recipe, start)
    measured = stage_3(result, data, recipe)
    digest = checkpoint.save(args.out, result, torch.bfloat16)
    card = CARD.format(
        name=args.out.name,
        tasks="; ".join(data.tasks),
        parameters=sum(p.numel() for p in result.policy.parameters()),
        arguments=" ".join(sys.argv[1:]),
        minutes=(time.monotonic() - started) / 60,
        measured=json.dumps(measured, indent=1),
    )
    (args.out / "README.md").write_text(card)
    print(json.dumps({**measured, "checkpoint": digest}, indent=1))


if __name__ == "__main__":
    main()
