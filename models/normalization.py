"""Actions between the robot's units and the network's: statistics of the demonstrations, kept with the
checkpoint.

Joints are in rad, absolute or relative to the state at t_obs (a_i - q(t_obs)); translations and rotations are
steps, m and rad an action (config.embodiment), and stay as they are; grippers are openings 0 (closed) to 1
(open), always absolute, mapped to [-1, 1]. Everything is `centre + scale * x` per dimension, or per dimension
and action of the chunk: relative joints move little at its start and far at its end, and with numbers of
their own the first ones, which are played, are not lost in the last ones' spread. numpy, float64 inside.
"""

import json
from dataclasses import asdict, dataclass, fields

import numpy as np

JOINT_RANGE = 5.5  # rad, about the width of an FR3 joint's range (Franka Robotics datasheet: 3.6 to 6.0)
SCALE_FLOOR = 1e-3  # of the joint's range: a joint that never moved must not turn noise into huge numbers
MARGIN_FLOOR = 0.02  # rad, of joints; a step's margin is its range's alone
KINDS = {"joint", "gripper", "translation", "rotation"}


class NormalizationError(ValueError):
    """Statistics or arrays do not fit; the message names what and how."""


Statistics = tuple[float, ...] | tuple[tuple[float, ...], ...]  # [D], or of each action of a chunk [H, D]


@dataclass(frozen=True)
class Normalizer:
    """Statistics of D dimensions. Raises NormalizationError for inconsistent or non-finite numbers."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]  # of KINDS
    representation: str  # absolute | relative
    method: str  # mean_std | quantile
    centre: Statistics
    scale: Statistics
    low: tuple[float, ...]  # demonstrated range, absolute
    high: tuple[float, ...]
    margin: float = 0.05  # of the demonstrated range, allowed beyond it (at least MARGIN_FLOOR)

    def __post_init__(self):
        d = len(self.names)
        if self.representation not in ("absolute", "relative"):
            raise NormalizationError(f"representation {self.representation!r} is not absolute or relative")
        if self.method not in ("mean_std", "quantile"):
            raise NormalizationError(f"method {self.method!r} is not mean_std or quantile")
        if d == 0 or len(set(self.names)) != d or not all(isinstance(name, str) for name in self.names):
            raise NormalizationError(f"names {self.names} must be distinct words")
        if len(self.kinds) != d or not set(self.kinds) <= KINDS:
            raise NormalizationError(
                f"kinds {self.kinds} must be one of {', '.join(sorted(KINDS))} for each of {d} names"
            )
        if self.needs_state and not set(self.kinds) <= {"joint", "gripper"}:
            raise NormalizationError("end-effector steps are relative already: use representation absolute")
        for key in ("centre", "scale", "low", "high"):
            values = _numbers(key, getattr(self, key))
            if values.shape[-1:] != (d,) or not np.isfinite(values).all():
                raise NormalizationError(f"{key} must hold {d} finite numbers, got {getattr(self, key)}")
        if np.ndim(self.low) != 1 or np.ndim(self.high) != 1:
            raise NormalizationError(f"low and high must hold {d} numbers each")
        if np.shape(self.centre) != np.shape(self.scale) or np.ndim(self.scale) > 2:
            raise NormalizationError("centre and scale must both be [D], or [H, D]")
        if np.min(self.scale) <= 0:
            raise NormalizationError(f"scale must be positive, got {self.scale}")
        if np.any(np.asarray(self.low) > np.asarray(self.high)):
            raise NormalizationError(f"low {self.low} exceeds high {self.high}")
        if not (np.isfinite(self.margin) and self.margin >= 0):
            raise NormalizationError(f"margin {self.margin} must be finite and not negative")

    @property
    def horizon(self) -> int | None:
        """H, where each action of a chunk has its own statistics."""
        return len(self.scale) if np.ndim(self.scale) == 2 else None

    @property
    def gripper(self) -> np.ndarray:
        """bool [D]."""
        return np.array([kind == "gripper" for kind in self.kinds])

    @property
    def needs_state(self) -> bool:
        return self.representation == "relative"

    @property
    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest action that ever leaves: [D] each, in its kind's unit."""
        low, high = np.asarray(self.low, float), np.asarray(self.high, float)
        floor = [MARGIN_FLOOR if kind == "joint" else 0.0 for kind in self.kinds]
        margin = np.maximum(self.margin * (high - low), floor)
        return np.where(self.gripper, 0.0, low - margin), np.where(self.gripper, 1.0, high + margin)

    def _offset(self, actions: np.ndarray, state: np.ndarray | None) -> np.ndarray | float:
        """What relative joints are measured from, broadcast over the horizon axis."""
        if actions.ndim < 2 or actions.shape[-1] != len(self.names):
            raise NormalizationError(
                f"actions must be [..., H, {len(self.names)}], got {list(actions.shape)}"
            )
        if self.horizon not in (None, actions.shape[-2]):
            raise NormalizationError(f"a chunk has {self.horizon} actions, got {actions.shape[-2]}")
        if not self.needs_state:
            return 0.0
        if state is None:
            raise NormalizationError("actions relative to the state need the state at t_obs")
        state = np.asarray(state, float)
        if state.shape != actions.shape[:-2] + actions.shape[-1:] or not np.isfinite(state).all():
            raise NormalizationError(
                f"state must be finite [..., {len(self.names)}], got {list(state.shape)}"
            )
        return np.where(self.gripper, 0.0, state)[..., None, :]

    def normalize(self, actions: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """Actions [..., H, D] in rad and opening, state [..., D] where relative -> float32 [..., H, D]."""
        actions = np.asarray(actions, float)
        offset = self._offset(actions, state)
        return ((actions - offset - self.centre) / self.scale).astype(np.float32)

    def denormalize(self, x: np.ndarray, state: np.ndarray | None = None) -> np.ndarray:
        """The inverse, clipped to `limits`: float32 [..., H, D]."""
        x = np.asarray(x, float)
        offset, (low, high) = self._offset(x, state), self.limits
        return np.clip(x * self.scale + self.centre + offset, low, high).astype(np.float32)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Normalizer":
        """Strict: every key, no other. Raises NormalizationError."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise NormalizationError(f"normalization is not JSON: {error}") from error
        keys = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != keys:
            raise NormalizationError(f"normalization must hold exactly {sorted(keys)}")
        try:
            return cls(**{key: _tuple(value) for key, value in data.items()})
        except NormalizationError:
            raise
        except (TypeError, ValueError) as error:
            raise NormalizationError(f"normalization holds a wrong type: {error}") from error


def _tuple(value):
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _numbers(key: str, values: Statistics) -> np.ndarray:
    try:
        return np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise NormalizationError(f"{key} holds a wrong type: {error}") from error


def fit(
    chunks: np.ndarray,
    names: tuple[str, ...],
    kinds: tuple[str, ...],
    states: np.ndarray | None = None,
    method: str = "mean_std",
    ranges: float | np.ndarray = JOINT_RANGE,
    margin: float = 0.05,
    each_action: bool = False,
) -> Normalizer:
    """Statistics of demonstrated chunks [n, H, D]; with `states` [n, D] joints become relative to them.

    each_action: of every action of a chunk, instead of all together.

    method mean_std, or quantile (1st and 99th percentile to -1 and 1). ranges: width [D] of what each
    dimension may be, in its unit; JOINT_RANGE where it is not finite.
    """
    chunks = np.asarray(chunks, float)
    if (
        chunks.ndim != 3
        or chunks.shape[-1] != len(names)
        or len(kinds) != len(names)
        or not np.isfinite(chunks).all()
    ):
        raise NormalizationError(f"chunks must be finite [n, H, {len(names)}], got {list(chunks.shape)}")
    gripper = np.array([kind == "gripper" for kind in kinds])
    absolute = chunks.reshape(-1, len(names))
    values = chunks
    if states is not None:
        values = chunks - np.where(gripper, 0.0, np.asarray(states, float))[:, None]
    if not each_action:
        values = values.reshape(-1, len(names))
    if method == "quantile":
        low, high = np.quantile(values, [0.01, 0.99], axis=0)
        centre, scale = (low + high) / 2, (high - low) / 2
    else:
        centre, scale = values.mean(0), values.std(0)
    ranges = np.where(np.isfinite(ranges), ranges, JOINT_RANGE)
    scale = np.maximum(scale, SCALE_FLOOR * ranges)
    return Normalizer(
        names=tuple(names),
        kinds=tuple(kinds),
        representation="absolute" if states is None else "relative",
        method=method,
        centre=_tuple(np.where(gripper, 0.5, centre).tolist()),
        scale=_tuple(np.where(gripper, 0.5, scale).tolist()),
        low=tuple(np.where(gripper, 0.0, absolute.min(0)).tolist()),
        high=tuple(np.where(gripper, 1.0, absolute.max(0)).tolist()),
        margin=margin,
    )


def unfitted(names: tuple[str, ...], kinds: tuple[str, ...], representation: str = "absolute") -> Normalizer:
    """Statistics of nothing, for random weights: unit scale, joints within +-2.9 rad."""
    gripper = [kind == "gripper" for kind in kinds]
    return Normalizer(
        names=tuple(names),
        kinds=tuple(kinds),
        representation=representation,
        method="mean_std",
        centre=tuple(0.5 if g else 0.0 for g in gripper),
        scale=tuple(0.5 if g else 1.0 for g in gripper),
        low=tuple(0.0 if g else -2.9 for g in gripper),
        high=tuple(1.0 if g else 2.9 for g in gripper),
        margin=0.0,
    )
