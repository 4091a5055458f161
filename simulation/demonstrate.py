"""Trials played by an expert in lockstep: what a demonstrator's hands and recorder would have seen."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from simulation.experts.ik import HandIK
from simulation.experts.picking import HELD_OPENING, World, expert
from simulation.lockstep import Lockstep
from simulation.tasks.trial import Trial

LEVEL_RAD_S = 0.8  # peak joint speed of turning the hand straight down at the start
SETTLE_S = 0.8  # after the expert's end, for the score


@dataclass(frozen=True)
class Step:
    """One control step, before its action has any effect."""

    time_s: float
    joints: dict[str, np.ndarray]  # measured [7] rad by arm
    openings: dict[str, float]  # measured, 0 to 1
    action_joints: dict[str, np.ndarray]  # commanded for this step [7] rad
    action_openings: dict[str, float]
    qpos: np.ndarray  # of the whole scene, for the picture
    settling: bool  # the expert is done, things come to rest


class Arms(World, Protocol):
    """What a demonstrator looks at: an expert's world and where its arms are."""

    arms: Iterable[str]

    def joints(self, arm: str) -> np.ndarray: ...


def lead(
    world: Arms, ik: HandIK, rate_hz: float, random: np.random.Generator
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, float]]]:
    """Joints [7] rad and openings by arm, one pair a control step: hands straight down, then the task."""
    bases = world.trial.workcell.arms
    down = {arm: _turn(bases[arm].yaw_rad) @ np.diag([1.0, -1.0, -1.0]) for arm in world.arms}
    start = {arm: world.joints(arm) for arm in world.arms}
    openings = {arm: float(world.opening(arm) > HELD_OPENING[1]) for arm in world.arms}
    level = {arm: ik.solve(arm, world.tcp(arm)[0], down[arm], q) for arm, q in start.items()}
    turn = max(float(np.abs(level[arm] - q).max()) for arm, q in start.items())
    steps = int(np.ceil(1.875 * turn / LEVEL_RAD_S * rate_hz))
    for s in np.arange(1, steps + 1) / max(steps, 1):
        ease = s**3 * (10 - 15 * s + 6 * s**2)
        yield {arm: q + ease * (level[arm] - q) for arm, q in start.items()}, dict(openings)
    commanded = dict(level)
    for poses in expert(world, rate_hz, random):
        for arm, pose in poses.items():
            rotation = _turn(pose.yaw) @ down[arm] @ _lean(pose.tilt)
            commanded[arm] = ik.solve(arm, pose.xyz, rotation, commanded[arm])
            openings[arm] = pose.opening
        yield dict(commanded), dict(openings)


class Demonstrator:
    """Plays trials of one task, one after the other, in one simulation."""

    def __init__(self, trial: Trial, rate_hz: float = 15.0):
        self.world, self.rate_hz = Lockstep(trial), rate_hz
        self._ik = HandIK(trial.workcell)

    def play(
        self,
        trial: Trial,
        seed: int,
        start_spread_rad: float = 0.0,
        homes: dict[str, np.ndarray] | None = None,
        limit_s: float | None = None,
    ) -> Iterator[Step]:
        """Steps of `trial`; `world.judge` holds the score at the end.

        seed: of the expert's style and, with `start_spread_rad`, of a perturbed first pose. homes: first
        joints [7] rad by arm, instead of the simulation's. limit_s: instead of the task's.
        """
        random = np.random.default_rng([trial.seed, seed])
        world = self.world
        world.reset(trial, homes)
        homes = {arm: world.joints(arm) for arm in world.arms}
        if start_spread_rad:
            spread = {arm: q + random.normal(0, start_spread_rad, 7) for arm, q in homes.items()}
            world.reset(trial, spread)
        yield from self.go_on(random, limit_s)

    def go_on(self, random: np.random.Generator, limit_s: float | None = None) -> Iterator[Step]:
        """Steps of the trial that `world` is in, from how things stand now."""
        world = self.world
        limit_s = limit_s or world.trial.task.time_limit_s
        commanded, openings = {}, {}
        for commanded, openings in lead(world, self._ik, self.rate_hz, random):
            yield self._step(commanded, openings)
            if world.time_s > limit_s:
                return
        for _ in range(round(SETTLE_S * self.rate_hz)):
            yield self._step(commanded, openings, settling=True)

    def _step(
        self, commanded: dict[str, np.ndarray], openings: dict[str, float], settling: bool = False
    ) -> Step:
        world = self.world
        step = Step(
            time_s=world.time_s,
            joints={arm: world.joints(arm) for arm in world.arms},
            openings={arm: world.opening(arm) for arm in world.arms},
            action_joints={arm: q.copy() for arm, q in commanded.items()},
            action_openings=dict(openings),
            qpos=world.data.qpos.copy(),
            settling=settling,
        )
        for arm, opening in openings.items():
            world.open_hand(arm, opening)
        world.advance(1 / self.rate_hz, commanded)
        return step


def _turn(yaw: float) -> np.ndarray:
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def _lean(tilt: float) -> np.ndarray:
    c, s = np.cos(tilt), np.sin(tilt)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])
