"""Demonstrations of the circles expert as the front camera sees them: `python -m training.simulated --help`.

Kinematic: the arms are drawn where the expert puts them, without physics. A process of its own, since
MuJoCo's renderer and torch do not share one.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.progress import track

from config.embodiment import Embodiment
from config.loading import load
from config.robot import Robot
from config.workcell import Workcell
from policy_server.images import fit
from simulation import render, workcell
from simulation.experts import circles
from training.demonstrations import Demonstrations

START_SPREAD_RAD = 0.08  # of an episode's first configuration about the cycle


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


def record(
    robot: Robot, image_size: int, episodes: int, steps: int, seed: int, cache: Path
) -> Demonstrations:
    """`episodes` short episodes of `steps` frames at the embodiment's rate."""
    scene, embodiment = load(Workcell, robot.workcell), load(Embodiment, robot.embodiment)
    painter = render.Painter(scene, robot.camera.width, robot.camera.height, render.live_meshes(cache))
    addresses = {arm: arm_addresses(painter.model, i) for i, arm in enumerate(scene.arms)}
    homes = {arm: np.array(robot.arms[arm].home_rad) for arm in scene.arms}
    tasks = tuple(task for task, arms in circles.TASKS.items() if set(arms) <= set(homes))
    rng = np.random.default_rng(seed)
    frames, states, actions, episode, task_index = [], [], [], [], []
    for number in track(range(episodes), "episodes"):
        task = number % len(tasks)
        q = start(rng, homes, circles.TASKS[tasks[task]])
        joints, openings = circles.rollout(
            q, homes, tasks[task], steps + embodiment.horizon - 1, embodiment.rate_hz
        )
        vectors = np.stack([_dimension(name, joints, openings) for name in embodiment.names], -1)
        workcell.place_props(painter.model, painter.data, scene, int(rng.integers(1 << 31)))
        qpos = painter.data.qpos.copy()
        for step in range(steps):
            for arm, (joint_at, finger_at) in addresses.items():
                qpos[joint_at] = joints[arm][step]
                qpos[finger_at] = workcell.HAND_WIDTH / 2 * openings[arm][max(step - 3, 0)]
            frames.append(fit(painter.paint(qpos), (image_size, image_size)))
            states.append(vectors[step])
            actions.append(vectors[step : step + embodiment.horizon])
            episode.append(number)
            task_index.append(task)
    painter.close()
    return Demonstrations(
        frames=np.stack(frames),
        states=np.array(states, np.float32),
        actions=np.array(actions, np.float32),
        episode=np.array(episode, np.int32),
        task=np.array(task_index, np.int32),
        tasks=tasks,
    )


def _dimension(name: str, joints: dict[str, np.ndarray], openings: dict[str, np.ndarray]) -> np.ndarray:
    arm, _, part = name.split("_")  # left_fr3_joint1, left_fr3_gripper
    return openings[arm] if part == "gripper" else joints[arm][:, int(part.removeprefix("joint")) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--robot", default="sim_bimanual", help="file in config/robots, or a path")
    parser.add_argument("--image-size", type=int, default=64, help="px, square, as the policy sees it")
    parser.add_argument("--episodes", type=int, default=180)
    parser.add_argument("--steps", type=int, default=60, help="frames of an episode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="demonstrations, .npz")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "vipra_ros", help="decimated meshes"
    )
    args = parser.parse_args()
    record(load(Robot, args.robot), args.image_size, args.episodes, args.steps, args.seed, args.cache).save(
        args.out
    )


if __name__ == "__main__":
    main()
