"""The action statistics a finetuned policy was trained with -> models.normalization.

The official `data/normalize_libero.py` writes `action_stats.json`: {"mean": [D], "std": [D]} of the raw
actions, with mean 0 and std 1 for the gripper, which it leaves as recorded. Our own optional additions: "low"
and "high", or "q01" and "q99", the demonstrated range that served actions are clipped to.
"""

import json
from pathlib import Path

import numpy as np

from config.embodiment import Embodiment
from models.convert import ConvertError
from models.normalization import Normalizer

SPREAD = 3.0  # standard deviations either side of the mean, where a file does not give the range


def read(path: Path | str, embodiment: Embodiment, gripper: str = "opening") -> Normalizer:
    """An official statistics file, or a normalization.json of ours. Raises ConvertError.

    gripper: how the recorded actions spell it; opening: 0 closed to 1 open, signed: -1 closed to 1 open.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text)
        if isinstance(data, dict) and "centre" in data:
            return Normalizer.from_json(text)
        return _official(data, embodiment, gripper)
    except (OSError, ValueError, TypeError) as error:
        raise ConvertError(f"{path}: {error}") from error


def _official(data: object, embodiment: Embodiment, gripper: str) -> Normalizer:
    if not isinstance(data, dict) or not {"mean", "std"} <= set(data):
        raise ValueError('expected {"mean": [..], "std": [..]}, or a normalization.json of ours')
    known = {"mean", "std", "low", "high", "q01", "q99"}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"unknown keys {unknown}; known: {sorted(known)}")
    values = {key: np.asarray(value, float) for key, value in data.items()}
    for key, value in values.items():
        if value.shape != (embodiment.action_dim,) or not np.isfinite(value).all():
            raise ValueError(f"{key} must hold {embodiment.action_dim} finite numbers")
    mean, std = values["mean"], values["std"]
    low = values.get("low", values.get("q01", mean - SPREAD * std))
    high = values.get("high", values.get("q99", mean + SPREAD * std))
    is_gripper = np.array([dimension.kind == "gripper" for dimension in embodiment.dimensions])
    if gripper == "signed":
        mean, std = np.where(is_gripper, (mean + 1) / 2, mean), np.where(is_gripper, std / 2, std)
    return Normalizer(
        names=embodiment.names,
        kinds=tuple(dimension.kind for dimension in embodiment.dimensions),
        representation="absolute",
        method="mean_std",
        centre=tuple(mean.tolist()),
        scale=tuple(std.tolist()),
        low=tuple(np.where(is_gripper, 0.0, low).tolist()),
        high=tuple(np.where(is_gripper, 1.0, high).tolist()),
    )
