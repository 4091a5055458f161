"""Demonstrations of the scripted expert in volume, faster than real time, as the recorder would write them.

Lockstep physics and the recorder's features: frame i holds the picture, the measured joints and the reference
at one moment. Each episode is made in a worker process (MuJoCo renders there, torch must stay out).
"""

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config.embodiment import Embodiment
from config.loading import load
from config.recording import FIRST_SEED, Recording
from config.robot import Robot
from config.task import Task
from episodes import demonstration
from episodes.parallel import in_order
from simulation.tasks.trial import make_trial
from vipra_ros.recording.worker import open_writer

START_SPREAD_RAD = 0.05  # of an episode's first pose about home
ATTEMPTS = 3  # at one trial, each in another style


class ExpertFailed(RuntimeError):
    """No demonstration came of a trial; the message says why."""


@dataclass(frozen=True)
class Wanted:
    """Which demonstrations. Episode n is trial `first_seed` + n: an interrupted run goes on with the next."""

    task: Task
    robot: Robot
    episodes: int
    first_seed: int = FIRST_SEED
    split: str = "seen"
    seconds: float | None = None  # end every episode here, done or not
    keep_flagged: bool = False  # through the nodes: do not record again what the recorder flags

    def trial(self, number: int):
        return make_trial(self.task, self.first_seed + number, self.split, template=None)


@dataclass(frozen=True)
class Episode:
    """T frames, D dimensions in the embodiment's order."""

    task: str
    capture: np.ndarray  # [T] s
    frames: np.ndarray  # uint8 RGB [T, h, w, 3]
    state: np.ndarray  # [T, D] measured, rad and opening
    action: np.ndarray  # [T, D] the reference at the same moment


def generate(
    wanted: Wanted,
    root: Path,
    cache: Path,
    workers: int = 2,
    progress: Callable[[int], None] = lambda n: None,
) -> int:
    """Bring the dataset at `root` to `wanted.episodes`; how many were made now. progress: episodes there.

    Raises EpisodesError if another robot's dataset is there, ExpertFailed.
    """
    import simulation.render as render  # first: it chooses the renderer before MuJoCo is imported

    embodiment, camera = load(Embodiment, wanted.robot.embodiment), wanted.robot.camera
    render.live_meshes(cache)  # made once, before the workers look for them
    size, rate = (camera.height, camera.width), round(embodiment.rate_hz)
    with open_writer(root, embodiment.names, embodiment.name, rate, size, Recording().crf) as writer:
        numbers = range(writer.episodes, wanted.episodes)
        progress(writer.episodes)
        if not numbers:
            return 0
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            min(workers, len(numbers)), context, _open_stage, (wanted.robot, cache, os.environ["MUJOCO_GL"])
        )
        try:
            # an episode of 640x360 px takes 10 MB a second
            for episode in in_order(pool, functools.partial(_make, wanted), numbers, 2 * workers):
                for i, picture in enumerate(episode.frames):
                    row = {
                        demonstration.CAMERA: picture,
                        demonstration.STATE: episode.state[i],
                        demonstration.ACTION: episode.action[i],
                        demonstration.CAPTURE: episode.capture[i : i + 1],
                        demonstration.SYNC: np.zeros(1),
                    }
                    writer.add(row, episode.task)
                writer.save()
                progress(writer.episodes)
        except BrokenProcessPool as error:
            raise ExpertFailed("a worker process was killed (memory?): the same command goes on") from error
        finally:
            pool.shutdown(cancel_futures=True)
    return len(numbers)


_stage = None  # of a worker process


def _open_stage(robot: Robot, cache: Path, renderer: str) -> None:
    global _stage
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    os.environ["MUJOCO_GL"] = renderer
    from vipra_ros.evaluation.lockstep import Stage

    _stage = Stage(robot, cache)


def _make(wanted: Wanted, number: int) -> Episode:
    for attempt in range(ATTEMPTS):
        episode = _play(_stage, wanted, number, attempt)
        if wanted.seconds is not None or _stage.world.judge.success:
            return episode
    raise ExpertFailed(
        f"{wanted.task.name}, trial {wanted.first_seed + number}: the expert failed {ATTEMPTS} times: "
        "choose another --first-seed"
    )


def _play(stage, wanted: Wanted, number: int, style: int) -> Episode:
    trial = wanted.trial(number)
    stage.set(trial)
    names = load(Embodiment, stage.robot.embodiment).names
    capture, frames, state, action = [], [], [], []
    told: tuple[dict, dict] | None = None
    for step in stage.demonstrator.play(trial, style, START_SPREAD_RAD, stage.homes):
        if wanted.seconds is not None and step.time_s >= wanted.seconds - 1e-9:
            break
        if not step.settling:  # what follows serves the score
            told = told or (step.joints, dict.fromkeys(step.joints, 1.0))
            capture.append(step.time_s)
            frames.append(stage.picture(step.qpos))
            state.append(_vector(names, step.joints, step.openings))
            action.append(_vector(names, *told))
        told = step.action_joints, step.action_openings  # reached when the next step begins
    return Episode(trial.instruction, *map(np.array, (capture, frames, state, action)))


def _vector(names: tuple[str, ...], joints: dict[str, np.ndarray], openings: dict[str, float]) -> np.ndarray:
    """[D] in the order of `names`: left_fr3_joint1, left_fr3_gripper."""
    values = []
    for name in names:
        arm, _, part = name.split("_")
        values.append(
            openings[arm] if part == "gripper" else joints[arm][int(part.removeprefix("joint")) - 1]
        )
    return np.array(values)
