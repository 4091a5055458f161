"""What may be wrong with an episode: pure functions over its frames' times, vectors and picture changes.

Used by the recorder on what it has just recorded and by `vipra dataset check` on what is on disk.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from config.recording import Quality
from config.safety import JointRange

_BLOCK = 16  # px
_HELD_RAD, _PAUSE_S = 0.02, 0.5  # an arm that moved less over a longer gap was held: a pause
_MOVING_RAD_S = 0.2  # an arm this fast moves in every picture


@dataclass(frozen=True)
class Finding:
    """One problem; `first`, `last`: the frames it concerns."""

    kind: str  # short dropped sync stale gap pause pace frozen idle limit tracking duplicate
    text: str
    first: int = 0
    last: int = 0
    problem: bool = True  # False: worth knowing, nothing to worry about

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Trace:
    """An episode without its pictures. T frames, D dimensions."""

    fps: float
    names: tuple[str, ...]  # of the D dimensions; a hand's ends in "gripper"
    capture: np.ndarray  # [T] s
    sync: np.ndarray  # [T] s
    state: np.ndarray  # [T, D] rad, opening
    action: np.ndarray  # [T, D]
    change: np.ndarray  # [T] levels, see `change`; 0 at the first frame
    compressed: bool = False  # `change` is that of a video: what moves little may be lost in it

    def __len__(self) -> int:
        return len(self.capture)

    @property
    def joints(self) -> np.ndarray:
        """Which dimensions are joints, [D] bool."""
        return np.array([not name.endswith("gripper") for name in self.names])


def change(before: np.ndarray, after: np.ndarray) -> float:
    """Largest mean change of a 16x16 px block between two pictures [h, w, 3], in levels of 255.

    A small thing that moves shows in one block; noise and compression spread over all.
    """
    if np.array_equal(before, after):
        return 0.0
    height, width = (n - n % _BLOCK for n in before.shape[:2])
    if not height or not width:
        return float(np.abs(before.astype(np.int16) - after).mean())
    moved = np.abs(before[:height, :width, 1].astype(np.int16) - after[:height, :width, 1])
    blocks = moved.reshape(height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK)
    return float(blocks.mean((1, 3)).max())


def spans(mask: np.ndarray) -> list[tuple[int, int]]:
    """First and last index of every run of True in [T]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(a), int(b) - 1) for a, b in edges.reshape(-1, 2)]


def inspect(trace: Trace, quality: Quality, limits: JointRange | None = None) -> list[Finding]:
    """Everything suspicious about an episode, in the order of its frames; `limits` adds limit hits."""
    if not len(trace):
        return [Finding("short", "no frames")]
    found = [*_times(trace, quality), *_frozen(trace, quality), *_idle(trace, quality)]
    found += _commands(trace, quality, limits)
    return sorted(found, key=lambda f: f.first)


def summary(findings: Sequence[Finding]) -> str:
    """One line: the first finding of each kind, and how many more of it there are."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    more = {kind: f" and {len(found) - 1} more" if len(found) > 1 else "" for kind, found in kinds.items()}
    return ", ".join(found[0].text + more[kind] for kind, found in kinds.items())


def _at(trace: Trace, first: int, last: int) -> str:
    return f"{first / trace.fps:.1f} to {(last + 1) / trace.fps:.1f} s"


def _times(trace: Trace, quality: Quality) -> list[Finding]:
    found = []
    length = len(trace) / trace.fps
    if length < quality.min_s:
        found.append(Finding("short", f"only {length:.1f} s long", 0, len(trace) - 1))
    worst = 1000 * float(np.quantile(trace.sync, 0.99))
    if worst > quality.sync_ms:
        at = int(trace.sync.argmax())
        text = f"synchronisation error {worst:.1f} ms (99th percentile), over {quality.sync_ms:g} ms"
        found.append(Finding("sync", text, at, at))
    step = np.diff(trace.capture)
    new = np.append(True, step > 0)
    for first, last in spans(new & (1000 * trace.sync > quality.stale_ms)):
        worst = 1000 * trace.sync[first : last + 1].max()
        text = f"states or actions {worst:.0f} ms from their picture at {_at(trace, first, last)}"
        found.append(Finding("stale", text, first, last))
    for first, last in spans(step <= 0):
        count = last - first + 1
        text = f"{count} frame{'s' * (count > 1)} without a new picture at {_at(trace, first + 1, last + 1)}"
        found.append(Finding("dropped", text, first + 1, last + 1))
    for i in np.flatnonzero(step > quality.gap_frames / trace.fps):
        i = int(i)
        if i and step[i - 1] <= 0:  # the end of dropped frames, told already
            continue
        moved = np.maximum(*(np.abs(values[i + 1] - values[i]) for values in (trace.state, trace.action)))
        held = moved[trace.joints].max(initial=0) < _HELD_RAD and step[i] > _PAUSE_S
        held &= bool(moved[~trace.joints].max(initial=0) < quality.freeze_motion_opening)
        kind = "pause" if held else "gap"
        text = f"{kind} of {1000 * step[i]:.0f} ms between two pictures at {(i + 1) / trace.fps:.1f} s"
        found.append(Finding(kind, text, i, i + 1, problem=not held))
    return found + _pace(trace, quality)


def _pace(trace: Trace, quality: Quality) -> list[Finding]:
    """Whether action i of a chunk of a second is due i / fps after its picture, as training takes it.

    A camera that drifts past the grid shows in one chunk now and then; one of another rate in nearly all.
    Chunks with a gap or a lost picture are left out: those are findings of their own.
    """
    n = round(trace.fps)
    if len(trace) <= n:
        return []
    step = np.diff(trace.capture) * trace.fps
    even = (step > 0) & (step <= quality.gap_frames)
    whole = np.lib.stride_tricks.sliding_window_view(even, n).all(1)
    stray = np.cumsum(np.lib.stride_tricks.sliding_window_view(step - 1, n)[whole], axis=1)
    if not len(stray):
        return []
    worst = 1000 / trace.fps * np.abs(stray).max(1)
    off = float(np.quantile(worst, 0.95))
    if off <= quality.pace_ms:
        return []
    at = int(np.flatnonzero(whole)[worst.argmax()])
    text = (
        f"pictures stray {off:.0f} ms from {trace.fps:g} a second, over {quality.pace_ms:g}: camera's rate?"
    )
    return [Finding("pace", text, at, at + n)]


def _frozen(trace: Trace, quality: Quality) -> list[Finding]:
    found = []
    still = trace.change <= quality.freeze_levels
    still[:1] = False
    for first, last in spans(still):
        first -= 1  # the picture that stayed
        moved = np.ptp(trace.state[first : last + 1], axis=0)
        arm, hand = moved[trace.joints].max(initial=0), moved[~trace.joints].max(initial=0)
        if (last - first) / trace.fps <= quality.freeze_s:
            continue
        if arm > quality.freeze_motion_rad or (hand > quality.freeze_motion_opening and not trace.compressed):
            what = f"an arm moved {arm:.2f} rad" if arm > quality.freeze_motion_rad else "a hand moved"
            text = f"camera frozen at {_at(trace, first, last)} while {what}"
            found.append(Finding("frozen", text, first, last))
    return found + _copies(trace, quality, found)


def _copies(trace: Trace, quality: Quality, frozen: list[Finding]) -> list[Finding]:
    """Seconds in which the same picture came again and again under new times while an arm moved."""
    n = round(trace.fps)
    speed = trace.fps * np.abs(np.diff(trace.state[:, trace.joints], axis=0)).max(1, initial=0)
    copy = (np.diff(trace.capture) > 0) & (trace.change[1:] == 0) & (speed > _MOVING_RAD_S)
    copy = np.append(False, copy)
    for finding in frozen:  # told already
        copy[finding.first : finding.last + 1] = False
    if len(trace) < n:
        return []
    often = np.lib.stride_tricks.sliding_window_view(copy, n).mean(1) > quality.copies_share
    found = []
    for first, last in spans(often):
        last += n - 1
        text = f"{copy[first : last + 1].sum()} of {last - first + 1} pictures equal the one before"
        found.append(
            Finding("frozen", f"{text} at {_at(trace, first, last)} while an arm moved", first, last)
        )
    return found


def _idle(trace: Trace, quality: Quality) -> list[Finding]:
    """Rest of all joints and hands, as they are and as they are told to be."""
    limit = np.where(trace.joints, quality.idle_speed_rad_s, quality.idle_opening_per_s)
    speed = np.abs(np.diff(trace.state, axis=0)) * trace.fps
    told = np.abs(np.diff(trace.action, axis=0)) * trace.fps
    found = []
    for first, last in spans(((speed < limit) & (told < limit)).all(1)):
        length = (last - first + 1) / trace.fps
        if length > quality.idle_s + 1e-9:
            text = f"{length:.1f} s without motion at {_at(trace, first, last)}"
            found.append(Finding("idle", text, first, last + 1))
    return found


def _commands(trace: Trace, quality: Quality, limits: JointRange | None) -> list[Finding]:
    found = []
    joints = trace.joints
    names = np.array(trace.names)[joints]
    error = np.abs(trace.action - trace.state)[:, joints]
    if error.size and error.max() > quality.tracking_rad:
        frame, joint = np.unravel_index(error.argmax(), error.shape)
        text = f"{names[joint]} was {error.max():.2f} rad off its action, over {quality.tracking_rad:g} rad"
        found.append(Finding("tracking", f"{text} at {frame / trace.fps:.1f} s", int(frame), int(frame)))
    each = len(limits.position_min_rad) if limits else 0
    if not each or len(names) % each:
        return found
    arms = len(names) // each
    action = trace.action[:, joints]
    low = np.tile(limits.position_min_rad, arms) + limits.soft_margin_rad
    high = np.tile(limits.position_max_rad, arms) - limits.soft_margin_rad
    fastest = np.tile(limits.velocity_rad_s, arms) * limits.software_share * 0.99
    at_limit = (action <= low + 1e-4) | (action >= high - 1e-4)
    speed = np.abs(np.diff(action, axis=0)) * trace.fps
    too_fast = np.vstack([np.zeros((1, action.shape[1]), bool), speed >= fastest])
    for hit, what in ((at_limit, "at its soft position limit"), (too_fast, "at its velocity limit")):
        for joint in np.flatnonzero(hit.any(0)):
            frames = np.flatnonzero(hit[:, joint])
            first, last = int(frames[0]), int(frames[-1])
            text = f"{names[joint]} {what} in {len(frames)} frames, {_at(trace, first, last)}"
            found.append(Finding("limit", text, first, last))
    return found


def fingerprint(trace: Trace) -> str:
    """Equal for episodes with the same motion: 0.1 mrad, times left out."""
    values = np.round(np.hstack([trace.state, trace.action]).astype(np.float64), 4) + 0.0
    return hashlib.sha256(values.tobytes()).hexdigest()


def duplicates(prints: Sequence[str]) -> dict[int, int]:
    """Episode -> the earlier episode with the same fingerprint."""
    first: dict[str, int] = {}
    return {i: first[p] for i, p in enumerate(prints) if first.setdefault(p, i) != i}
