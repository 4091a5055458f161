"""Actions and states of the episodes a run trains on, for normalisation and for checks before it starts."""

import numpy as np
from rich.progress import track

from config.embodiment import Embodiment
from training.data.episode import DataError
from training.data.sampling import Samples

_RATE_TOLERANCE = 0.05


def actions_and_states(samples: Samples) -> tuple[np.ndarray, np.ndarray | None]:
    """(actions [N, D], states [N, S] or None where one has none) of every readable episode of the subset."""
    actions, states = [], []
    places = {(dataset, episode) for dataset, episode, _ in samples.enumerate()}
    for dataset, index in track(sorted(places), "actions", disable=len(places) < 2000):
        try:
            episode = samples.readers[dataset].episode(index)
        except DataError:
            if samples.mixture.on_error == "raise":
                raise
            continue
        if episode.actions is None:
            raise DataError(
                f"{episode.key}: has no actions; set action_key, or leave this dataset to stages 1 and 2"
            )
        actions.append(episode.actions)
        states.append(episode.state)
    if not actions:
        raise DataError("no readable episode with actions")
    if len({a.shape[1] for a in actions}) > 1:
        raise DataError(
            f"the datasets' actions have {sorted({a.shape[1] for a in actions})} dimensions: one robot a run"
        )
    known = all(s is not None for s in states) and len({s.shape[1] for s in states}) == 1
    return np.concatenate(actions), np.concatenate(states) if known else None


def check_embodiment(samples: Samples, embodiment: Embodiment) -> None:
    """Raises DataError where a dataset's actions are not this robot's: names, number or rate."""
    for config, reader in zip(samples.mixture.datasets, samples.readers, strict=True):
        names = reader.action_names
        if names is not None and tuple(names) != embodiment.names:
            raise DataError(
                f"{config.path}: actions {', '.join(names)}; embodiment {embodiment.name!r} commands "
                f"{', '.join(embodiment.names)}: choose the embodiment it was recorded with"
            )
        episode = _first_readable(reader)
        if episode.actions is None or episode.actions.shape[1] != embodiment.action_dim:
            found = "no" if episode.actions is None else episode.actions.shape[1]
            raise DataError(
                f"{config.path}: {found} action dimensions, embodiment {embodiment.name!r} has "
                f"{embodiment.action_dim}"
            )
        rate = episode.rate_hz / config.stride
        if abs(rate - embodiment.rate_hz) > _RATE_TOLERANCE * embodiment.rate_hz:
            raise DataError(
                f"{config.path}: {rate:.2f} frames/s, {embodiment.name!r} has {embodiment.rate_hz}: "
                "set stride, rate_hz, or the embodiment's rate"
            )


def _first_readable(reader):
    error: DataError | None = None
    for index in range(min(len(reader), 16)):
        try:
            episode = reader.episode(index)
        except DataError as failure:
            error = failure
            continue
        if episode.length > 1:
            return episode
    raise DataError(f"none of the first episodes is readable: {error}")
