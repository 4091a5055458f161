"""The whole robot side in one thread on a clock of the test's own: commander, executor, safety gate, and arms
that follow exactly. No ROS, no simulator.
"""

from types import SimpleNamespace

import numpy as np

from config.embodiment import Embodiment
from config.robot import Control
from config.robot import PolicyClient as PolicyConfig
from config.safety import Safety
from config.workcell import Workcell
from vipra_ros.commander import ArmsStatus, Commander
from vipra_ros.execution.planner import Planner
from vipra_ros.robot.arm import ArmState
from vipra_ros.robot.commands import Tag
from vipra_ros.robot.executor import ArmsExecutor
from vipra_ros.safety.supervisor import Supervisor

TICK_S = 0.005


class KinematicArm:
    """`robot.arm.Arm`: is where it was last told to be."""

    streaming, link_error = True, ""

    def __init__(self, q: np.ndarray):
        self.q, self.dq, self.told = np.array(q, float), np.zeros(len(q)), []
        self._reads = 0

    def start(self) -> np.ndarray:
        return self.q

    def read(self) -> ArmState:
        self._reads += 1
        return ArmState(1e-3 * self._reads, self.q, self.dq, 0 * self.q, "Move", "")

    def set_target(self, q, dq, now, fresh=False) -> None:
        self.q, self.dq = q.copy(), dq.copy()
        self.told.append((now, self.q))

    def abort(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


class KinematicHand:
    """`robot.arm.Hand`: opens and closes at once."""

    opening, fault, grasped, moving = 1.0, "", None, None

    def start(self) -> None:
        pass

    def wish(self, wish: str) -> None:
        self.opening = float(wish == "open")

    def lost(self) -> bool:
        return False

    def forget(self) -> None:
        pass

    def stop(self, timeout_s: float = 1.0) -> bool:
        return True


class Stepped(ArmsExecutor):
    def _run(self) -> None:
        """Ticked by who made it instead of by a thread."""


class Robot:
    """Arms of `embodiment` at `home` [n] rad each, commanded by what answers behind `client`."""

    def __init__(
        self,
        embodiment: Embodiment,
        safety: Safety,
        workcell: Workcell | None,
        home: np.ndarray,
        client,
        config: PolicyConfig,
        picture,
    ):
        """picture: time s -> uint8 RGB, the camera."""
        self.names, self.picture, self.t = tuple(embodiment.by_arm), picture, 100.0
        self.arms = {name: KinematicArm(home) for name in self.names}
        self.hands = {name: KinematicHand() for name in self.names}
        clock = SimpleNamespace(now=lambda: self.t)
        homes = {name: home for name in self.names}
        self.executor = Stepped(self.arms, self.hands, homes, clock, Control(), safety, workcell)
        self.executor.start()
        gate = Supervisor(safety, self.names, workcell, np.tile(home, len(self.names)), self.t)
        planner = Planner(config, embodiment.horizon, 1 / 30, safety.chunk_lead_s)
        self.commander = Commander(config, embodiment, self.names, client, planner, gate, clock, self._send)
        self.chunks = []
        self._tick = 0

    def _send(self, seq, chunk) -> None:
        if chunk is not None:
            self.chunks.append(chunk)
        self.executor.submit(Tag.parse(f"{self.commander.lease}:{seq}"), chunk)

    def step(self) -> None:
        """One tick of the arms; at its rates the camera and the commander."""
        commander, executor = self.commander, self.executor
        if self._tick % 7 == 0:
            commander.on_picture(self.picture(self.t), self.t)
        if self._tick % 2 == 0:
            for name, arm in self.arms.items():
                commander.on_joints(name, self.t, np.append(arm.q, self.hands[name].opening))
            lease = executor.lease
            commander.on_arms(
                ArmsStatus(
                    executor.state.value,
                    executor.reason,
                    f"{lease.holder}:{lease.epoch}" if lease.holder else "",
                    self.t,
                    executor.accepted_seq,
                    executor.rejected,
                )
            )
            commander.tick()
            if commander.wants_lease:
                commander.granted(executor.acquire_lease())
        executor._tick(self.t, 0.0, TICK_S)
        self._tick += 1
        self.t += TICK_S

    def run(self, seconds: float) -> "Robot":
        end = self.t + seconds
        while self.t < end:
            self.step()
        return self
