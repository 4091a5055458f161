"""A policy's chunks along recorded episodes: real pictures in, actions out, nothing executed (section 5.5).

Through the same `models.runner` that serves, without the server.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml

from config.embodiment import Embodiment
from config.loading import parse
from models import checkpoint as checkpoints
from models import sequence
from models.checkpoint import Checkpoint, CheckpointError
from models.runner import Runner
from policy_server.images import cut, fit
from training.analysis.arrays import AnalysisError
from training.data.episode import Episode
from training.data.windows import history


@dataclass(frozen=True)
class Replayer:
    """A checkpoint that acts, its robot, and the buffers it computes in."""

    checkpoint: Checkpoint
    robot: Embodiment
    runner: Runner


def load(folder: Path, device: str = "cpu", batch: int = 4) -> Replayer:
    """Raises CheckpointError for a folder that is none or cannot act."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    loaded = checkpoints.load(folder, device, dtype, serving=True)
    if loaded.config.action_heads == "none":
        raise CheckpointError(
            f"{folder} is pretrained and cannot act: finetune it with `vipra train finetune`"
        )
    robot = parse(Embodiment, yaml.safe_load(loaded.embodiment), f"{folder}/embodiment.yaml")
    bridge = sequence.encode_bridge(loaded.tokenizer)
    counts = loaded.bins.counts if loaded.bins else ()
    return Replayer(
        loaded, robot, Runner(loaded.policy, loaded.vqgan, bridge, batch, cuda_graphs=False, counts=counts)
    )


def check(replayer: Replayer, episode: Episode) -> None:
    """Raises AnalysisError for an episode that is not the policy's."""
    robot = replayer.robot
    rate = episode.rate_hz
    if rate and abs(rate - robot.rate_hz) > 0.05 * robot.rate_hz:
        raise AnalysisError(
            f"{episode.key}: {rate:.3g} frames/s, the policy of {robot.name} was trained at {robot.rate_hz:g}"
        )
    if episode.actions is not None and episode.actions.shape[1] != robot.action_dim:
        raise AnalysisError(
            f"{episode.key}: {episode.actions.shape[1]} action dimensions, {robot.name} has "
            f"{robot.action_dim}"
        )
    if replayer.checkpoint.normalizer.needs_state:
        shape = None if episode.state is None else episode.state.shape[1:]
        if shape != (robot.action_dim,):
            raise AnalysisError(
                f"{episode.key}: this policy's actions are relative to the state [{robot.action_dim}], "
                f"the dataset has {'none' if shape is None else list(shape)}: set state_key"
            )


@torch.inference_mode()
def chunks(
    replayer: Replayer, episode: Episode, view: str, every: int, task: str | None = None, seed: int = 0
) -> np.ndarray:
    """Chunks [n, H, D] in rad and opening, one for every `every`-th frame, all of the same noise as on the
    robot. task: instead of the episode's instruction. Raises AnalysisError.
    """
    check(replayer, episode)
    loaded, runner = replayer.checkpoint, replayer.runner
    prompt = sequence.encode_prompt(loaded.tokenizer, episode.instruction if task is None else task)
    if len(prompt) > loaded.config.max_text_tokens:
        raise AnalysisError(
            f"{episode.key}: its prompt is {len(prompt)} tokens, the policy takes "
            f"{loaded.config.max_text_tokens}: give a shorter --task"
        )
    text, size = runner.policy.encode_text(prompt), (loaded.config.vqgan.image_size,) * 2
    moments = np.arange(0, episode.length, every)
    before = [history(episode.timestamps, t, replayer.robot.history_seconds) for t in moments]
    out = []
    for at in range(0, len(moments), runner.max_batch):
        now = moments[at : at + runner.max_batch]
        pairs = np.stack([before[at : at + runner.max_batch], now], 1)
        frames = cut(episode.frames(view, pairs.ravel()), replayer.robot.crop)
        for row in range(len(now)):
            images = np.stack([fit(frame, size) for frame in frames[2 * row : 2 * row + 2]])
            runner.set_row(row, images, seed)
        runner.run([text] * len(now))
        if runner.device.type == "cuda":
            torch.cuda.synchronize()
        found = runner.chunk.host[: len(now)].numpy().copy()
        if not np.isfinite(found).all():
            raise AnalysisError(f"{episode.key}: the policy's actions hold NaN or infinity")
        out.append(_actions(loaded, found, None if episode.state is None else episode.state[now]))
    return np.concatenate(out)


def _actions(loaded: Checkpoint, found: np.ndarray, states: np.ndarray | None) -> np.ndarray:
    """The network's chunks [n, H, D] -> rad and opening, within the demonstrated limits."""
    if loaded.bins is None:
        return loaded.normalizer.denormalize(found, states if loaded.normalizer.needs_state else None)
    low, high = loaded.normalizer.limits
    return np.clip(loaded.bins.decode(found.astype(np.int64)), low, high).astype(np.float32)
