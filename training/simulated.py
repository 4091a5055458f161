"""Demonstrations as the front camera sees them, in quantity: `python -m training.simulated --help`.

Kinematic: the arms are drawn where circles and scripted motions towards cups put them, without physics.
Processes of their own, since MuJoCo's renderer and torch do not share one.
"""

import argparse
import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import track

from config.embodiment import Embodiment
from config.loading import load
from config.robot import Robot
from config.workcell import Workcell
from episodes import demonstration, layout
from episodes.writer import Writer
from policy_server.images import fit
from simulation import render, workcell
from simulation.experts import circles
from training import motions
from training.truth import PLACES

START_SPREAD_RAD = 0.08  # of an episode's first configuration about the cycle
KINDS = ("circles", *motions.KINDS, "both")
_SUPERSAMPLING = 3  # of the picture's height, before it is made small
_TRIES = 200
_CRF = 14  # the pictures are small: compression that suits a camera would blur them


def arm_addresses(model, arm: int) -> tuple[list[int], list[int]]:
    """qpos addresses of the seven joints and two fingers of the `arm`-th arm in the workcell's order."""
    joints = [int(model.joint(f"robot{arm}_fr3_joint{i}").qposadr[0]) for i in range(1, 8)]
    fingers = [int(model.joint(f"robot{arm}_finger_joint{i}").qposadr[0]) for i in (1, 2)]
    return joints, fingers


def start(
    rng: np.random.Generator, homes: dict[str, np.ndarray], moving: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """First configuration of an episode: home, or a random place near the cycle of the moving arms."""
    if rng.random() < 0.25:
        return {arm: home.copy() for arm, home in homes.items()}
    phase = rng.uniform(0, 2 * np.pi)
    on_cycle = {arm: circles.cycle(phase, home) if arm in moving else home for arm, home in homes.items()}
    return {arm: q + rng.normal(0, START_SPREAD_RAD, 7) for arm, q in on_cycle.items()}


@dataclass(frozen=True)
class Episode:
    """One recording. T frames at the embodiment's rate, D dimensions in its order."""

    task: str
    frames: np.ndarray  # uint8 RGB [T, s, s, 3]
    state: np.ndarray  # float32 [T, D], where arms and fingers are
    actions: np.ndarray  # float32 [T, D], where they are told to be
    places: np.ndarray  # float32 [T, K], x, y, z in m of what `Studio.places` names


class Studio:
    """One renderer and what it takes to act in front of it."""

    def __init__(self, robot: Robot, image_size: int, cache: Path):
        self.scene, self.embodiment = load(Workcell, robot.workcell), load(Embodiment, robot.embodiment)
        height = _SUPERSAMPLING * image_size
        width = round(height * robot.camera.width / robot.camera.height)
        self._size = image_size
        self._painter = render.Painter(self.scene, width, height, render.live_meshes(cache))
        model = self._painter.model
        self._addresses = {arm: arm_addresses(model, i) for i, arm in enumerate(self.scene.arms)}
        self._props = {p.name: int(model.joint(f"{p.name}_free").qposadr[0]) for p in self.scene.props}
        self._homes = {arm: np.array(robot.arms[arm].home_rad) for arm in self.scene.arms}
        self._hands = {arm: motions.Hand(model, i, self._homes[arm]) for i, arm in enumerate(self.scene.arms)}

    def episode(self, number: int, kinds: tuple[str, ...], steps: int, seed: int) -> Episode:
        """Episode `number` of the run `seed`: the same whoever makes it. Raises Unreachable."""
        rng = np.random.default_rng([seed, number])
        kind = kinds[number % len(kinds)]
        if kind == "circles":
            return self._circles(steps, rng)
        for _ in range(_TRIES):
            try:
                return self._act(kind, motions.scatter(self.scene, rng), steps, rng)
            except motions.Unreachable as error:
                failure = error
        raise failure

    def _circles(self, steps: int, rng: np.random.Generator) -> Episode:
        """Things stand where the workcell has them, as when `vipra demo` starts."""
        places = motions.tidy(self.scene, rng)
        tasks = [task for task, arms in circles.TASKS.items() if set(arms) <= set(self._homes)]
        task = tasks[int(rng.integers(len(tasks)))]
        q = start(rng, self._homes, circles.TASKS[task])
        joints, openings = circles.rollout(q, self._homes, task, steps, self.embodiment.rate_hz)
        seen = {arm: np.concatenate([np.full(3, o[0]), o[:-3]]) for arm, o in openings.items()}
        return self._film(task, joints, openings, seen, places, {}, rng)

    def _act(self, kind: str, places: dict[str, np.ndarray], steps: int, rng: np.random.Generator) -> Episode:
        """One arm acts and the other stands still; `both`: each acts on a cup of its own."""
        acts = [kind] if kind != "both" else list(rng.choice(motions.SHORT, 2))
        hands, left, done = dict(self._hands), dict(places), []
        for act in acts:
            motion = motions.draw(self.scene, hands, left, act, steps, self.embodiment.rate_hz, rng)
            hands = {arm: hand for arm, hand in hands.items() if arm != motion.arm}
            left = {name: place for name, place in left.items() if name not in motion.things}
            done.append(motion)
        count = len(done[0].joints)
        still = {arm: home + rng.normal(0, 0.03, 7) for arm, home in self._homes.items()}
        joints = {arm: np.tile(q, (count, 1)) for arm, q in still.items()}
        openings = {arm: np.ones(count) for arm in self._homes}
        seen, moved = dict(openings), {}
        for motion in done:
            joints[motion.arm], openings[motion.arm] = motion.joints, motion.command
            seen[motion.arm] = motion.opening
            moved |= motion.things
        return self._film(" and ".join(m.task for m in done), joints, openings, seen, places, moved, rng)

    def _film(
        self,
        task: str,
        joints: dict[str, np.ndarray],
        openings: dict[str, np.ndarray],
        seen: dict[str, np.ndarray],
        places: dict[str, np.ndarray],
        moving: dict[str, np.ndarray],
        rng: np.random.Generator,
    ) -> Episode:
        names, steps = self.embodiment.names, len(next(iter(joints.values())))
        qpos = self._painter.data.qpos.copy()
        for name, address in self._props.items():
            yaw = rng.uniform(-np.pi, np.pi)
            qpos[address : address + 7] = [*places[name], np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        frames = np.empty((steps, self._size, self._size, 3), np.uint8)
        for step in range(steps):
            for arm, (joint_at, finger_at) in self._addresses.items():
                qpos[joint_at] = joints[arm][step]
                qpos[finger_at] = workcell.HAND_WIDTH / 2 * seen[arm][step]
            for name, path in moving.items():
                qpos[self._props[name] : self._props[name] + 3] = path[step]
            frames[step] = fit(self._painter.paint(qpos), (self._size, self._size))
        centres = [[hand.pose(q)[0] for q in joints[arm]] for arm, hand in self._hands.items()]
        centres += [moving.get(name, np.tile(places[name], (steps, 1))) for name in self._props]
        return Episode(
            task=task,
            frames=frames,
            places=np.concatenate(centres, 1).astype(np.float32),
            state=np.stack([_dimension(n, joints, seen) for n in names], -1).astype(np.float32),
            actions=np.stack([_dimension(n, joints, openings) for n in names], -1).astype(np.float32),
        )

    def close(self) -> None:
        self._painter.close()


_studio: Studio  # of a worker process


def truth_names(scene: Workcell) -> list[str]:
    """Names of `Episode.places`."""
    centres = [f"{arm}_hand" for arm in scene.arms] + [prop.name for prop in scene.props]
    return [f"{name}_{axis}" for name in centres for axis in "xyz"]


def _open_studio(robot: Robot, image_size: int, cache: Path) -> None:
    global _studio
    _studio = Studio(robot, image_size, cache)


def _make(kinds: tuple[str, ...], steps: int, seed: int, number: int) -> Episode:
    return _studio.episode(number, kinds, steps, seed)


def write(
    out: Path,
    robot: Robot,
    image_size: int,
    episodes: int,
    steps: int,
    seed: int,
    cache: Path,
    kinds: tuple[str, ...] = KINDS,
    workers: int = 2,
) -> None:
    """A LeRobotDataset v3.0 at `out`; an interrupted run goes on where it was.

    Raises EpisodesError if the dataset there is another robot's, Unreachable if no motion fits in `steps`.
    """
    embodiment = load(Embodiment, robot.embodiment)
    features = demonstration.features(embodiment.names, image_size, image_size)
    features[PLACES] = layout.vector(truth_names(load(Workcell, robot.workcell)))
    if (out / layout.INFO).is_file():
        writer = Writer(out, _CRF)
        rate = round(embodiment.rate_hz)
        demonstration.check_same(out, writer.info, rate, embodiment.name, features)
    else:
        writer = Writer.create(
            out, round(embodiment.rate_hz), features, embodiment.name, video_file_mb=4, crf=_CRF
        )
    render.live_meshes(cache)  # made once, before the workers look for them
    make = functools.partial(_make, kinds, steps, seed)
    numbers = range(writer.episodes, episodes)
    context = multiprocessing.get_context("spawn")
    with writer, ProcessPoolExecutor(workers, context, _open_studio, (robot, image_size, cache)) as pool:
        for episode in track(pool.map(make, numbers), "episodes", total=len(numbers)):
            for i, frame in enumerate(episode.frames):
                row = {
                    demonstration.CAMERA: frame,
                    demonstration.STATE: episode.state[i],
                    demonstration.ACTION: episode.actions[i],
                    demonstration.CAPTURE: np.array([i / embodiment.rate_hz]),
                    demonstration.SYNC: np.zeros(1, np.float32),
                    PLACES: episode.places[i],
                }
                writer.add(row, episode.task)
            writer.save()


def _dimension(name: str, joints: dict[str, np.ndarray], openings: dict[str, np.ndarray]) -> np.ndarray:
    arm, _, part = name.split("_")  # left_fr3_joint1, left_fr3_gripper
    return openings[arm] if part == "gripper" else joints[arm][:, int(part.removeprefix("joint")) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--robot", default="sim_bimanual", help="file in config/robots, or a path")
    parser.add_argument("--image-size", type=int, default=64, help="px, square, as the policy sees it")
    parser.add_argument("--episodes", type=int, default=180)
    parser.add_argument("--steps", type=int, default=60, help="frames of an episode; long motions take more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the LeRobotDataset")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, help="motions, in turn (default: all that the arms can do)"
    )
    parser.add_argument("--workers", type=int, default=2, help="rendering processes")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "vipra_ros", help="decimated meshes"
    )
    args = parser.parse_args()
    robot = load(Robot, args.robot)
    kinds = args.kinds or [kind for kind in KINDS if kind != "both" or len(robot.arms) > 1]
    write(
        args.out, robot, args.image_size, args.episodes, args.steps, args.seed, args.cache, tuple(kinds),
        args.workers,
    )  # fmt: skip


if __name__ == "__main__":
    main()
