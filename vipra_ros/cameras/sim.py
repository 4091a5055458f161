"""The simulated workcell's front camera, rendered from the simulator's published state.

Where the simulator sets up trials of a task, the scene is that of the trial that is set up now.

MuJoCo renders in this process; nothing that imports triton may ever join it (the two crash together).
"""

import math

from config.loading import load
from config.task import Task
from config.workcell import Workcell
from simulation.state import SharedState
from simulation.tasks.trial import make_trial
from vipra_ros.cameras.source import CameraError, Clock, Frame, Intrinsics, wait_until

ROUNDING_S = 1e-6  # simulated time is told in whole microseconds


class SimSource:
    """Pictures at multiples of 1 / `rate_hz` of simulated time. Where rendering falls behind, pictures are
    skipped, or with `waited_for` simulated time waits for them.
    """

    # Arms at rest render identically, to the bit. A stopped simulator stops the stamps instead.
    noisy = False

    def __init__(
        self,
        workcell: Workcell,
        state_name: str,
        width: int,
        height: int,
        rate_hz: float,
        clock: Clock,
        waited_for: bool = False,
    ):
        self._workcell, self._state_name, self._size = workcell, state_name, (width, height)
        self._period_s, self._clock, self._waited_for = 1.0 / rate_hz, clock, waited_for
        self._renderer = None

    def open(self) -> Intrinsics:
        from simulation.render import Renderer, intrinsics

        self.close()
        try:
            workcell = self._scene()
            self._renderer = Renderer(workcell, self._state_name, *self._size)
        except (OSError, TimeoutError, RuntimeError, ValueError) as error:
            raise CameraError(f"cannot render simulation '{self._state_name}': {error}") from error
        self._due = math.ceil(self._clock.now() / self._period_s)
        self._stamp_s = -math.inf
        matrix = intrinsics(workcell, *self._size)
        return Intrinsics(matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2])

    def _scene(self) -> Workcell:
        """What there is to draw now; notes of which trial it is."""
        state = SharedState.attach(self._state_name)
        try:
            task, self._trial = state.facts.task, state.trial()
        finally:
            state.close()
        if not task:
            return self._workcell
        split, seed = self._trial
        return make_trial(load(Task, task), seed, split).workcell

    def grab(self, timeout_s: float) -> Frame | None:
        if not wait_until(self._clock, self._due * self._period_s - ROUNDING_S, timeout_s):
            return None
        if self._waited_for:  # the next picture is that of the next moment, however long this one takes
            self._renderer.state.limit((self._due + 1) * self._period_s)
        try:
            rgb, stamp_s = self._renderer.render()
        except (OSError, TimeoutError, RuntimeError, ValueError) as error:
            raise CameraError(f"simulation '{self._state_name}' is gone: {error}") from error
        if self._renderer.state.trial() != self._trial:
            self.open()
            return None
        now_s = stamp_s if self._waited_for else self._clock.now()
        behind = max(0, math.floor(now_s / self._period_s) - self._due)
        self._due += behind + 1
        if stamp_s <= self._stamp_s:
            return None
        self._stamp_s = stamp_s
        return Frame(rgb, stamp_s, behind)

    def close(self) -> None:
        if self._renderer is not None:
            if self._waited_for:
                self._renderer.state.limit(math.inf)
            self._renderer.close()
            self._renderer = None
