"""Discrete actions of ViPRA-AR: each dimension of a raw action is one of its own bins.

Bins hold equal shares of the demonstrated values (quantiles; paper appendix G: 255, official code: 2047).
Quantiles that coincide are dropped, so the dimensions differ in how many bins they have. A gripper has two,
closed 0 and open 1. Units are the robot's: rad and opening. numpy, float64 inside.
"""

import json
from dataclasses import asdict, dataclass, fields

import numpy as np

PAPER_BINS, OFFICIAL_BINS = 255, 2047


class BinsError(ValueError):
    """Bins or arrays do not fit; the message names what and how."""


@dataclass(frozen=True)
class ActionBins:
    """Bins of D dimensions: value x has id `number of boundaries <= x`, id i stands for `centres[i]`.

    Raises BinsError for inconsistent or non-finite numbers.
    """

    names: tuple[str, ...]
    boundaries: tuple[tuple[float, ...], ...]  # between neighbouring bins, increasing; one fewer than bins
    centres: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        d = len(self.names)
        if d == 0 or len(set(self.names)) != d or not all(isinstance(name, str) for name in self.names):
            raise BinsError(f"names {self.names} must be distinct words")
        if len(self.boundaries) != d or len(self.centres) != d:
            raise BinsError(f"boundaries and centres must hold one list for each of {d} names")
        for name, between, middle in zip(self.names, self.boundaries, self.centres, strict=True):
            inner, centres = np.asarray(between), np.asarray(middle)
            if not {inner.dtype.kind, centres.dtype.kind} <= set("fiu"):
                raise BinsError(f"{name}: boundaries and centres must be numbers")
            if inner.ndim != 1 or centres.ndim != 1 or len(centres) != len(inner) + 1:
                raise BinsError(f"{name}: {len(middle)} centres need {len(middle) - 1} boundaries")
            if not (np.isfinite(inner).all() and np.isfinite(centres).all()):
                raise BinsError(f"{name}: boundaries and centres must be finite")
            if np.any(np.diff(inner) <= 0) or np.any(centres[1:] < inner) or np.any(centres[:-1] > inner):
                raise BinsError(f"{name}: boundaries must increase, each between its neighbouring centres")

    @property
    def counts(self) -> tuple[int, ...]:
        """Bins of each dimension: its valid ids are 0..count-1."""
        return tuple(map(len, self.centres))

    @property
    def vocab(self) -> int:
        """`ModelConfig.action_vocab`: the largest count, and the id that ends an action."""
        return max(self.counts) + 1

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Raw actions [..., D] -> ids [..., D] int64; outside the demonstrated range, an end bin."""
        actions = np.asarray(actions, float)
        if actions.ndim == 0 or actions.shape[-1] != len(self.names) or not np.isfinite(actions).all():
            raise BinsError(f"actions must be finite [..., {len(self.names)}], got {list(actions.shape)}")
        columns = [
            np.searchsorted(np.asarray(inner), actions[..., i], side="right")
            for i, inner in enumerate(self.boundaries)
        ]
        return np.stack(columns, -1)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Ids [..., D] -> raw actions [..., D] float32, the centre of each bin."""
        ids = np.asarray(ids)
        if ids.ndim == 0 or ids.shape[-1] != len(self.names) or not np.issubdtype(ids.dtype, np.integer):
            raise BinsError(
                f"ids must be integers [..., {len(self.names)}], got {ids.dtype} {list(ids.shape)}"
            )
        if np.any(ids < 0) or np.any(ids >= np.asarray(self.counts)):
            raise BinsError(f"ids must be at least 0 and below the bin counts {self.counts}")
        columns = [np.asarray(centres)[ids[..., i]] for i, centres in enumerate(self.centres)]
        return np.stack(columns, -1).astype(np.float32)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ActionBins":
        """Strict: every key, no other. Raises BinsError."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise BinsError(f"bins are not JSON: {error}") from error
        keys = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != keys:
            raise BinsError(f"bins must hold exactly {sorted(keys)}")
        if not all(isinstance(value, list) for value in data.values()):
            raise BinsError(f"bins must hold a list for each of {sorted(keys)}")
        try:
            return cls(
                tuple(data["names"]),
                tuple(map(tuple, data["boundaries"])),
                tuple(map(tuple, data["centres"])),
            )
        except BinsError:
            raise
        except (TypeError, ValueError) as error:
            raise BinsError(f"bins hold a wrong type: {error}") from error


def _fit(values: np.ndarray, bins: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Boundaries and centres for one dimension's values [n]."""
    distinct = np.unique(values)
    if len(distinct) <= bins:  # each value its own bin; a joint that never moves has one
        return tuple(((distinct[1:] + distinct[:-1]) / 2).tolist()), tuple(distinct.tolist())
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)))
    return tuple(edges[1:-1].tolist()), tuple(((edges[1:] + edges[:-1]) / 2).tolist())


def fit(
    actions: np.ndarray, names: tuple[str, ...], kinds: tuple[str, ...], bins: int = PAPER_BINS
) -> ActionBins:
    """Bins of demonstrated raw actions [..., D]; kinds are joint or gripper. Raises BinsError."""
    actions = np.asarray(actions, float)
    if actions.ndim < 2 or actions.shape[-1] != len(names) or len(kinds) != len(names) or actions.size == 0:
        raise BinsError(f"actions must be [..., {len(names)}] and not empty, got {list(actions.shape)}")
    if not np.isfinite(actions).all():
        raise BinsError("actions must be finite")
    if bins < 1:
        raise BinsError(f"bins {bins} must be at least 1")
    columns = actions.reshape(-1, len(names)).T
    fitted = [
        ((0.5,), (0.0, 1.0)) if kind == "gripper" else _fit(values, bins)
        for values, kind in zip(columns, kinds, strict=True)
    ]
    return ActionBins(tuple(names), tuple(f[0] for f in fitted), tuple(f[1] for f in fitted))
