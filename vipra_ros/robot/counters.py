"""How well the arms' loop keeps its time and its reference."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

LATE_S = 0.005  # a tick further behind its deadline counts as late


@dataclass
class Counters:
    """Since the loop began."""

    ticks: int = 0
    late_ticks: int = 0  # late ones and deadlines skipped altogether
    starved_ticks: int = 0
    max_late_s: float = 0.0
    max_skew_s: float = 0.0  # between handing the first and the last arm its target
    error_max_rad: float = 0.0
    error_square_sum: float = 0.0
    error_samples: int = 0
    interventions: dict[str, int] = field(default_factory=dict)

    def tick(self, late: float) -> None:
        """A tick that ran `late` s behind its deadline."""
        self.ticks += 1
        self.late_ticks += late > LATE_S
        self.max_late_s = max(self.max_late_s, late)

    def intervene(self, kinds: Mapping[str, int]) -> None:
        for kind, count in kinds.items():
            self.interventions[kind] = self.interventions.get(kind, 0) + count

    def track(self, error: np.ndarray) -> None:
        """Sent minus measured positions [J], rad."""
        self.error_max_rad = max(self.error_max_rad, float(np.abs(error).max()))
        self.error_square_sum += float(error @ error) / len(error)
        self.error_samples += 1

    @property
    def error_rms_rad(self) -> float:
        return (self.error_square_sum / self.error_samples) ** 0.5 if self.error_samples else 0.0
