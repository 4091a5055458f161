"""Demonstrations for stage 3, held in memory: frame codes, states and actions, cut into chunks.

Frames are encoded once; a chunk is rows t .. t+H-1 of an episode's actions, action i recorded together with
frame t+i, the last one repeated (and masked) past the end.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from config.dataset import Mixture
from config.embodiment import Embodiment
from models.vqgan import VQGAN
from policy_server.images import fit
from training.data.episode import DataError, Episode
from training.data.open import open_dataset
from training.data.sampling import held_out
from training.data.windows import check_usable, pick_view
from training.distributed import Ranks
from training.run import Run, TrainingError

OUTSIDE = 1e-3  # of a dimension's unit: recorded numbers are rounded


@dataclass(frozen=True)
class Demonstration:
    """One episode of T frames at the embodiment's rate."""

    key: str
    instruction: str
    codes: np.ndarray  # uint16 [T, tokens a frame]
    actions: np.ndarray  # float32 [T, D], raw
    states: np.ndarray  # float32 [T, D], zeros where none were recorded


def chunk(actions: np.ndarray, t: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions [T, D] -> (rows t .. t+H-1 [H, D], mask [H]: False past the end)."""
    index = np.arange(t, t + horizon)
    return actions[np.minimum(index, len(actions) - 1)], index < len(actions)


def check_episode(name: str, episode: Episode, robot: Embodiment) -> None:
    """Raises TrainingError for an episode that is not the embodiment's."""
    actions, rate = episode.actions, episode.rate_hz
    if actions is None:
        raise TrainingError(
            f"{name} has no actions: name their field in data.datasets.N.action_key, or leave this dataset "
            "to stages 0 to 2"
        )
    if actions.ndim != 2 or actions.shape[1] != robot.action_dim:
        raise TrainingError(
            f"{name}: actions are {list(actions.shape)}, embodiment {robot.name} has "
            f"{robot.action_dim} dimensions: choose the embodiment it was recorded with"
        )
    if rate and abs(rate - robot.rate_hz) > 0.02 * robot.rate_hz:
        raise TrainingError(
            f"{name} was recorded at {rate:.3g} Hz, embodiment {robot.name} says {robot.rate_hz:g} Hz: "
            "correct rate_hz (the embodiment's, or the dataset's where no file says it), or resample it"
        )
    low, high = robot.limits
    out = np.maximum(low - actions, actions - high)
    row, column = np.unravel_index(out.argmax(), out.shape)
    if out[row, column] > OUTSIDE:
        raise TrainingError(
            f"{name}: {robot.names[column]} is {actions[row, column]:.4g} in frame {row}, embodiment "
            f"{robot.name} allows {low[column]:g} to {high[column]:g} {robot.dimensions[column].unit}: "
            "convert the units, or correct low and high"
        )
    if robot.stateful and episode.state is not None and episode.state.shape != actions.shape:
        raise TrainingError(
            f"{name}: state is {list(episode.state.shape)}, actions are {list(actions.shape)}: name the "
            "state in the actions' units in data.datasets.N.state_key"
        )


def check_reader(path: str, names: tuple[str, ...] | None, robot: Embodiment) -> None:
    """Raises TrainingError when a dataset names other actions than the recipe's embodiment."""
    if names is None or tuple(names) == robot.names:
        return
    i = next((i for i, (a, b) in enumerate(zip(names, robot.names, strict=False)) if a != b), None)
    i = min(len(names), len(robot.names)) if i is None else i
    theirs, ours = (n[i] if i < len(n) else "nothing" for n in (names, robot.names))
    raise TrainingError(
        f"{path}: action {i} of {len(names)} is {theirs}, embodiment {robot.name} has {ours} "
        f"({len(robot.names)} in all): choose the dataset's embodiment"
    )


@dataclass(frozen=True)
class Corpus:
    """Episodes by (dataset, number), in memory. weights: share of the samples of each dataset."""

    episodes: dict[tuple[int, int], Demonstration]
    weights: tuple[float, ...]

    @property
    def frames(self) -> list[tuple[tuple[int, int], int]]:
        return [(name, t) for name, e in self.episodes.items() for t in range(len(e.actions))]

    def spread(self, count: int) -> list[tuple[tuple[int, int], int]]:
        """`count` places evenly over all frames (every one if there are fewer)."""
        every = self.frames
        return [every[i] for i in np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)]


class Chunks:
    """Endless `chunks[n]`: codes of o_{t-1}, o_t (with `future` also o_{t+H}, or the last frame), and the
    chunk that starts at o_t; a pure function of (seed, n).

    A dataset by its weight, then any of its frames alike. lags: share of samples whose o_{t-1} lies 0,
    1, 2 .. times `history` frames back. Chunks may be played faster than demonstrations were recorded,
    and a policy that reads its speed off the two frames runs away with it (causal confusion, de Haan
    et al. 2019): mixed lags prevent that.
    """

    broken = ()  # read_corpus has said what could not be read

    def __init__(
        self, corpus: Corpus, seed: int, horizon: int, history: int, lags=(0.0, 1.0), future: bool = False
    ):
        self.corpus, self.seed, self.horizon, self.history, self.lags = corpus, seed, horizon, history, lags
        self.future = future
        self.places = [[] for _ in corpus.weights]
        for name, t in corpus.frames:
            self.places[name[0]].append((name, t))
        weights = np.array([w if p else 0.0 for w, p in zip(corpus.weights, self.places, strict=True)])
        self.weights = weights / weights.sum()

    def __getitem__(self, n: int) -> dict:
        rng = np.random.default_rng([self.seed, n])
        places = self.places[rng.choice(len(self.places), p=self.weights)]
        name, t = places[rng.integers(len(places))]
        lag = int(rng.choice(len(self.lags), p=self.lags))
        return {"n": n, **self.read(name, t, lag)}

    def read(self, name: tuple[int, int], t: int, lag: int = 1) -> dict:
        """The sample at frame t of an episode."""
        e = self.corpus.episodes[name]
        actions, mask = chunk(e.actions, t, self.horizon)
        at = [max(t - lag * self.history, 0), t]
        if self.future:
            at.append(min(t + self.horizon, len(e.codes) - 1))
        return {
            "errors": [],
            "codes": e.codes[at].astype(np.int64),
            "actions": actions,
            "mask": mask,
            "state": e.states[t],
            "instruction": e.instruction,
        }


def history_frames(robot: Embodiment) -> int:
    """Frames between o_{t-1} and o_t."""
    return max(round(robot.history_seconds * robot.rate_hz), 1)


def encode(vqgan: VQGAN, frames: np.ndarray, batch: int = 64) -> np.ndarray:
    """uint8 RGB [n, h, w, 3] of any size -> codes uint16 [n, tokens a frame], resized as in serving."""
    size = vqgan.config.image_size
    fitted = np.stack([fit(frame, (size, size)) for frame in frames])
    device = next(vqgan.parameters()).device
    with torch.no_grad():
        parts = [
            vqgan.encode(vqgan.to_input(torch.from_numpy(fitted[i : i + batch]).to(device))).cpu()
            for i in range(0, len(fitted), batch)
        ]
    return torch.cat(parts).numpy().astype(np.uint16)


def read_corpus(
    mixture: Mixture, robot: Embodiment, vqgan: VQGAN, ranks: Ranks, run: Run, relative: bool = False
) -> tuple[Corpus, Corpus]:
    """Every episode of the mixture, encoded by all ranks together: (training, held out).

    relative: actions are learned relative to the state, so every episode needs one.

    An unreadable or left-out episode is skipped and said where the mixture asks for that. Raises
    TrainingError for demonstrations of another robot or rate, DataError for what cannot be read.
    """
    mine: dict[tuple[int, int], Demonstration] = {}
    broken: list[str] = []
    out: set[tuple[int, int]] = set()
    for number, config in enumerate(mixture.datasets):
        if config.stride != 1:
            raise TrainingError(
                f"data.datasets.{number}.stride is {config.stride}, stage 3 learns every recorded action: "
                "set it to 1"
            )
        reader = open_dataset(config)
        check_reader(config.path, reader.action_names, robot)
        chosen = held_out([reader.key(i) for i in range(len(reader))], mixture.validation_share)
        out |= {(number, int(i)) for i in np.flatnonzero(chosen)}
        for index in run.track(range(ranks.rank, len(reader), ranks.size), f"encoding {config.path}"):
            try:
                episode = reader.episode(index)
                check_usable(episode, config)
                check_episode(f"{config.path}/{episode.key}", episode, robot)
                if relative and episode.state is None:
                    raise TrainingError(
                        f"{config.path}/{episode.key} has no state for representation: relative: name its "
                        f"field in data.datasets.{number}.state_key, or choose representation: absolute"
                    )
                frames = episode.frames(pick_view(episode, config.views), range(episode.length))
            except DataError as error:
                if mixture.on_error == "raise":
                    raise
                broken.append(f"{config.path}: {error}")
                continue
            known = robot.stateful and episode.state is not None
            states = episode.state if known else np.zeros_like(episode.actions)
            mine[number, index] = Demonstration(
                episode.key, episode.instruction, encode(vqgan, frames), episode.actions, states
            )
    shares = ranks.gather(mine)
    for line in itertools.chain(*ranks.gather(broken)):
        run.say(f"skipped {line}")
    every = {name: e for share in shares for name, e in share.items()}
    out &= every.keys()
    if not every.keys() - out:
        raise TrainingError(f"no episode is left to train on ({len(every)} readable, {len(out)} held out)")
    if wordless := sum(not e.instruction.strip() for e in every.values()):
        run.say(f"{wordless} of {len(every)} episodes have no instruction: they are learned for no words")
    weights = tuple(config.weight for config in mixture.datasets)
    training, held = ({n: every[n] for n in sorted(names)} for names in (every.keys() - out, out))
    return Corpus(training, weights), Corpus(held, weights)
