"""Trials of scripted experts, in two steps: played once into small files of states, drawn where needed.

    python -m training.scripted play --task stack_cups --first-seed 100000 --episodes 1400 --out OUT/states
    python -m training.scripted correct EVALUATION --out OUT/corrections
    python -m training.scripted film OUT/states --out OUT/videos        (videos, no actions)
    python -m training.scripted film OUT/states --out OUT/demonstrations --actions    (successes only)

Half of the trials are disturbed: something shoves the arm off its way, or a cup, while the expert's reference
goes on, so that finding back and trying again are seen. Corrections begin where a policy went, at moments of
the trials of `vipra evaluate`, and the expert takes over there (Ross et al. 2011, DAgger; Kelly et al. 2019,
HG-DAgger), so that a policy learns to get out of what no demonstrator gets into. States take about 2 kB a
second, pictures a hundred times that. Pictures hold the part of the camera's picture that `--embodiment`
crops, at the camera's resolution or smaller. Torch-free: MuJoCo's renderer and torch do not share a process.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import simulation.render as render  # isort: skip  first: it chooses the renderer before MuJoCo is imported
import numpy as np
from rich.progress import track

from config.embodiment import Embodiment
from config.loading import ConfigError, load
from config.recording import FIRST_SEED
from config.robot import Robot
from config.task import Task
from episodes import demonstration, layout
from episodes.layout import EpisodesError
from episodes.parallel import in_order
from episodes.writer import Writer
from policy_server.images import cut, fit
from simulation.demonstrate import Demonstrator, Step
from simulation.experts.picking import HELD_OPENING
from simulation.lockstep import Lockstep
from simulation.tasks.score import UPRIGHT
from simulation.tasks.trial import Trial, make_trial, scene
from training.run import TrainingError
from training.seen import ABSENT, NAMES, PLACES

CRF = 18  # of H.264: little noise, since the policy's camera sends raw pictures
TRIALS = "trials.txt"
SHARD = 25  # episodes of a file of states
START_SPREAD_RAD = 0.04  # of the first configuration about home; its turn of the elbow stays, unseen
DISTURBED = 0.5  # of the trials
SHOVE_N = (8.0, 30.0)  # on the hand
SHOVE_S = (0.1, 0.4)
PAUSE_S = (0.8, 4.0)  # between disturbances
NUDGE_M_S = (0.15, 0.45)  # of a cup: it slides 1 to 3 cm
NUDGED = 0.25  # of the disturbances
PICKED = ("stack", "pick_place")  # kinds of tasks whose expert begins wherever the hand and the object are
TAKE_OVER_S = 0.3  # the arm stands still
CORRECTED = 5  # trials whose corrections share a file of states


@dataclass(frozen=True)
class Played:
    """One trial as played, T steps at the embodiment's rate. Arrays float32."""

    task: str
    seed: int
    success: bool
    qpos: np.ndarray  # [T, nq] of the scene
    state: np.ndarray  # [T, D] measured, embodiment's order
    action: np.ndarray  # [T, D] the reference at the same moment
    hands: np.ndarray  # [T, arms, 3] tool centre points, m

    @property
    def key(self) -> str:
        """Names it among the trials and corrections of a folder."""
        state = hashlib.sha256(self.qpos[0].tobytes()).hexdigest()[:8]
        return f"{self.task} {self.seed} {state}"


class Disturbance:
    """Shoves the hand, or nudges an object that lies on the table, at random moments."""

    def __init__(self, world: Lockstep, random: np.random.Generator):
        self._world, self._random = world, random
        self._next, self._until = world.time_s + random.uniform(*PAUSE_S), 0.0

    def step(self) -> None:
        """Call once a control step."""
        world, random = self._world, self._random
        if world.time_s >= self._until:
            world.data.xfrc_applied[:] = 0.0
        if world.time_s < self._next:
            return
        self._next = world.time_s + random.uniform(*PAUSE_S)
        if random.random() < NUDGED:
            self._nudge()
            return
        arm = world.arms[world.trial.task.arm]
        push = random.normal(size=3)
        world.data.xfrc_applied[arm.hand_body, :3] = random.uniform(*SHOVE_N) * push / np.linalg.norm(push)
        self._until = world.time_s + random.uniform(*SHOVE_S)

    def _nudge(self) -> None:
        world, random = self._world, self._random
        hand = world.tcp(world.trial.task.arm)[0]
        free = [name for name, thing in world.things().items() if np.hypot(*(thing.xyz - hand)[:2]) > 0.12]
        if not free:
            return
        joint = world.model.joint(f"{free[random.integers(len(free))]}_free")
        angle, speed = random.uniform(-np.pi, np.pi), random.uniform(*NUDGE_M_S)
        at = int(joint.dofadr[0])
        world.data.qvel[at : at + 2] += speed * np.cos(angle), speed * np.sin(angle)


def play(
    trial: Trial,
    demonstrator: Demonstrator,
    names: tuple[str, ...],
    homes: dict[str, np.ndarray] | None = None,
) -> Played:
    """The expert's trial, disturbed or not, from about `homes` up to the end of its motion."""
    random = np.random.default_rng([trial.seed, 7])
    return record(demonstrator, demonstrator.play(trial, 0, START_SPREAD_RAD, homes), names, random)


def record(
    demonstrator: Demonstrator, steps: Iterator[Step], names: tuple[str, ...], random: np.random.Generator
) -> Played:
    """What comes of `steps`, which `random` disturbs or does not."""
    world, told, rows = demonstrator.world, None, []
    disturbed = random.random() < DISTURBED
    disturbance = None
    for step in steps:
        if not step.settling:
            told = told or (step.joints, step.action_openings)
            hands = [world.tcp(arm)[0] for arm in world.arms]
            rows.append((step.qpos, vector(names, step.joints, step.openings), vector(names, *told), hands))
            told = step.action_joints, step.action_openings  # reached when the next step begins
        if disturbed:
            disturbance = disturbance or Disturbance(world, random)
            disturbance.step()
    columns = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    return Played(world.trial.task.name, world.trial.seed, world.judge.success, *columns)


def vector(names: tuple[str, ...], joints: dict[str, np.ndarray], openings: dict[str, float]) -> list[float]:
    """[D] in the order of `names` (right_fr3_joint1, .., right_fr3_gripper)."""
    parts = [name.split("_") for name in names]
    return [
        openings[a] if p == "gripper" else joints[a][int(p.removeprefix("joint")) - 1] for a, _, p in parts
    ]


# --- corrections


@dataclass(frozen=True)
class Moment:
    """How things stood at one time of a policy's trial."""

    seed: int
    arms: dict[str, np.ndarray]  # [8] joints, rad, and opening by arm
    poses: dict[str, np.ndarray]  # [7] m and wxyz by object


def moments(path: Path, each: int) -> list[Moment]:
    """Up to `each` moments of a trial `vipra evaluate` left at `path` (seen-<seed>.npz), with every object
    upright on the table or higher.
    """
    seed = int(path.stem.rpartition("-")[2])
    with np.load(path, allow_pickle=False) as data:
        state, poses, objects, arms = data["state"], data["poses"], data["objects"], data["arms"]
    tilt = 1 - 2 * (poses[..., 4] ** 2 + poses[..., 5] ** 2)
    fine = ((tilt > UPRIGHT) & (poses[..., 2] > poses[0, :, 2] - 0.01)).all(1)
    random = np.random.default_rng([seed, 11])
    at = np.flatnonzero(fine)
    return [
        Moment(seed, dict(zip(arms, state[i], strict=True)), dict(zip(objects, poses[i], strict=True)))
        for i in sorted(random.choice(at, min(each, len(at)), replace=False))
    ]


def correct_trials(folder: Path, task: str, embodiment: str, each: int, paths: list[Path]) -> Path:
    """The expert takes over at moments of the trials at `paths`: one file of states, whole or not at all."""
    out = folder / f"{task}-corrections-{paths[0].stem.rpartition('-')[2].zfill(7)}.npz"
    chosen = [moment for path in paths for moment in moments(path, each)]
    if holds(out, [moment.seed for moment in chosen]):
        return out
    what, names = load(Task, task), load(Embodiment, embodiment).names
    demonstrator, played = None, []
    for number, moment in enumerate(chosen):
        trial = make_trial(what, moment.seed, template=None)
        demonstrator = demonstrator or Demonstrator(trial, load(Embodiment, embodiment).rate_hz)
        played.append(correct(moment, trial, demonstrator, names, number))
    if played:
        write_shard(out, played)
    return out


def correct(
    moment: Moment, trial: Trial, demonstrator: Demonstrator, names: tuple[str, ...], number: int
) -> Played:
    """The expert's correction of what a policy had come to; things come to rest before."""
    random, world = np.random.default_rng([moment.seed, 13, number]), demonstrator.world
    world.reset(trial)
    openings = {arm: float(values[7]) for arm, values in moment.arms.items()}
    world.restore({arm: values[:7] for arm, values in moment.arms.items()}, openings, moment.poses)
    for arm, opening in openings.items():
        world.open_hand(arm, float(opening > HELD_OPENING[1]))
    world.advance(TAKE_OVER_S, {})
    return record(demonstrator, demonstrator.go_on(random), names, random)


def correct_all(evaluation: Path, folder: Path, embodiment: str, each: int, workers: int) -> None:
    """Files of corrections of an evaluation's trials; what is there stays. Raises TrainingError."""
    settings = evaluation / "settings.json"
    if not settings.is_file():
        raise TrainingError(f"{evaluation} is no folder of vipra evaluate: settings.json is missing")
    played = json.loads(settings.read_text())
    task = played["task"]
    if scene(load(Task, task)) != played["scene"]:
        raise TrainingError(
            f"{evaluation} was played with another {task} than config/tasks has: put that file there, under "
            "a name of its own, and evaluate with it"
        )
    if load(Task, task).kind not in PICKED:
        raise TrainingError(
            f"{task}: the expert begins in the middle of tasks of one arm that pick and put alone"
        )
    tested = min(
        (int(p.stem.partition("-")[2]) for p in (evaluation / "trials").glob("seen-*.npz")), default=0
    )
    if tested < FIRST_SEED:
        raise TrainingError(
            f"{evaluation} has trial {tested}: below {FIRST_SEED} is for tests, not to train on"
        )
    folder.mkdir(parents=True, exist_ok=True)
    paths = [
        p for p in sorted((evaluation / "trials").glob("seen-*.npz")) if p.with_suffix(".json").is_file()
    ]
    parts = [paths[i : i + CORRECTED] for i in range(0, len(paths), CORRECTED)]
    job = functools.partial(correct_trials, folder, task, embodiment, each)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for _ in track(pool.map(job, parts), f"correcting {task}", total=len(parts)):
            pass


# --- states on disk


def shard_path(folder: Path, task: str, first: int) -> Path:
    return folder / f"{task}-{first:07d}.npz"


def play_shard(folder: Path, task: str, robot: str, embodiment: str, seeds: range) -> Path:
    """Play trials `seeds` into one file, whole or not at all."""
    path = shard_path(folder, task, seeds.start)
    what, names = load(Task, task), load(Embodiment, embodiment).names
    homes = {name: np.array(arm.home_rad) for name, arm in load(Robot, robot).arms.items()}
    demonstrator, played = None, []
    for seed in seeds:
        trial = make_trial(what, seed, template=None)
        demonstrator = demonstrator or Demonstrator(trial, load(Embodiment, embodiment).rate_hz)
        played.append(play(trial, demonstrator, names, homes))
    write_shard(path, played)
    return path


def write_shard(path: Path, played: list[Played]) -> None:
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(
        partial,
        task=np.array(played[0].task),
        seeds=np.array([p.seed for p in played]),
        success=np.array([p.success for p in played]),
        lengths=np.array([len(p.qpos) for p in played]),
        **{key: _packed(np.concatenate([getattr(p, key) for p in played])) for key in _COLUMNS},
    )
    os.replace(partial, path)


_COLUMNS = ("qpos", "state", "action", "hands")
_STEP = 1e-5  # rad, m, opening: what states are rounded to


def _packed(values: np.ndarray) -> np.ndarray:
    """Changes from row to row in `_STEP`, int32: a third of the floats once compressed."""
    return np.diff(np.round(values.astype(float) / _STEP).astype(np.int32), axis=0, prepend=0)


def _unpacked(changes: np.ndarray) -> np.ndarray:
    return (np.cumsum(changes, axis=0) * _STEP).astype(np.float32)


def read_states(folder: Path) -> Iterator[Played]:
    """Every played trial, in the order of the files' names."""
    for path in sorted(folder.glob("*-*.npz")):
        if path.name.endswith(".partial.npz"):
            continue
        with np.load(path, allow_pickle=False) as data:
            columns = {key: _unpacked(data[key]) for key in _COLUMNS}
            task, ends = str(data["task"]), np.cumsum(data["lengths"])
            rows = list(zip(data["seeds"], data["success"], ends - data["lengths"], ends, strict=True))
        for seed, success, first, end in rows:
            yield Played(task, int(seed), bool(success), *(columns[key][first:end] for key in _COLUMNS))


def holds(path: Path, seeds: list[int]) -> bool:
    """Whether the file of states at `path` has these trials, all of them."""
    if not path.is_file():
        return False
    with np.load(path, allow_pickle=False) as data:
        return data["seeds"].tolist()[: len(seeds)] == seeds


def play_all(folder: Path, task: str, robot: str, embodiment: str, seeds: range, workers: int) -> None:
    """Files of states of `seeds` in shards; a file that has its trials stays."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [range(s, min(s + SHARD, seeds.stop)) for s in range(seeds.start, seeds.stop, SHARD)]
    shards = [s for s in shards if not holds(shard_path(folder, task, s.start), list(s))]
    job = functools.partial(play_shard, folder, task, robot, embodiment)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for _ in track(pool.map(job, shards), f"playing {task}", total=len(shards)):
            pass


# --- pictures


class Film:
    """Draws played trials as the robot's camera sees them, cut as the embodiment says."""

    def __init__(self, robot: Robot, embodiment: Embodiment, size: int | None, cache: Path):
        self._robot, self._embodiment, self._size = robot, embodiment, size
        self._meshes, self._painters = render.live_meshes(cache), {}

    def draw(self, played: Played) -> tuple[str, np.ndarray, np.ndarray]:
        """(instruction, frames uint8 [T, h, w, 3], places [T, K * 3])."""
        trial = make_trial(load(Task, played.task), played.seed, template=None)
        painter = self._painter(trial)
        frames = []
        for qpos in played.qpos:
            part = painter.paint(qpos.astype(float))
            frames.append(fit(part, (self._size, self._size)) if self._size else part)
        return trial.instruction, np.stack(frames), self._places(trial, painter, played)

    def _painter(self, trial: Trial) -> render.Painter:
        key = str([prop.model_dump(exclude={"xy", "rgb"}) for prop in trial.workcell.props])
        if key not in self._painters:
            camera = self._robot.camera
            size = camera.height, camera.width
            part = self._embodiment.crop.of(*size) if self._embodiment.crop else None
            self._painters[key] = render.Painter(trial.workcell, *size[::-1], self._meshes, part)
        for prop in trial.workcell.props:
            self._painters[key].model.material(prop.name).rgba[:3] = prop.rgb
        return self._painters[key]

    def _places(self, trial: Trial, painter: render.Painter, played: Played) -> np.ndarray:
        places = {"hand": played.hands[:, list(trial.workcell.arms).index(trial.task.arm)]}
        words = {c.rgb: c.word for c in trial.task.seen.colours}
        for prop in trial.workcell.props:
            if prop.kind == "cup" and prop.rgb in words:
                at = int(painter.model.joint(f"{prop.name}_free").qposadr[0])
                places[words[prop.rgb]] = played.qpos[:, at : at + 3]
        absent = np.full((len(played.qpos), 3), ABSENT, np.float32)
        return np.concatenate([places.get(name, absent) for name in NAMES], 1).astype(np.float32)


_film: Film  # of a worker process


def _open_film(robot: Robot, embodiment: Embodiment, size: int | None, cache: Path) -> None:
    global _film
    _film = Film(robot, embodiment, size, cache)


def _draw(played: Played) -> tuple[Played, str, np.ndarray, np.ndarray]:
    return (played, *_film.draw(played))


def film(
    states: Path,
    out: Path,
    robot: Robot,
    embodiment: Embodiment,
    cache: Path,
    actions: bool = False,
    episodes: int | None = None,
    size: int | None = None,
    crf: int = CRF,
    workers: int = 2,
) -> int:
    """A LeRobotDataset of the trials in `states`, and in it TRIALS, one line an episode; goes on where it
    was, also when trials were added. Returns its episodes.

    actions: successes only, with state and action. size: px, square; None: the camera's resolution.
    Raises EpisodesError for another robot's dataset at `out`, TrainingError where there are no states or it
    cannot be told what was filmed.
    """
    every = [p for p in read_states(states) if p.success or not actions]
    if not every and not any(states.glob("*-*.npz")):
        raise TrainingError(f"{states} holds no trials: play some first (training.scripted play --out)")
    camera = robot.camera
    whole = np.empty((camera.height, camera.width, 0), bool)
    height, width = (size, size) if size else cut(whole, embodiment.crop).shape[:2]
    features = demonstration.features(embodiment.names, height, width)
    features[PLACES] = layout.vector([f"{name}_{axis}" for name in NAMES for axis in "xyz"])
    if not actions:
        features = {key: features[key] for key in (demonstration.CAMERA, PLACES)}
    rate = round(embodiment.rate_hz)
    if (out / layout.INFO).is_file():
        writer = Writer(out, crf)
        demonstration.check_same(out, writer.info, rate, embodiment.name, features)
    else:
        writer = Writer.create(out, rate, features, embodiment.name, video_file_mb=8, crf=crf)
    render.live_meshes(cache)  # made once, before the workers look for them
    context = multiprocessing.get_context("spawn")
    with writer, ProcessPoolExecutor(workers, context, _open_film, (robot, embodiment, size, cache)) as pool:
        filmed = _filmed(out, writer.episodes)
        todo = [p for p in every if p.key not in filmed]
        if episodes is not None:
            todo = todo[: max(episodes - len(filmed), 0)]
        drawn = in_order(pool, _draw, todo, 2 * workers)
        for played, task, frames, places in track(drawn, "drawing", total=len(todo)):
            for i, frame in enumerate(frames):
                row = {demonstration.CAMERA: frame, PLACES: places[i]}
                if actions:
                    row[demonstration.STATE], row[demonstration.ACTION] = played.state[i], played.action[i]
                    row[demonstration.CAPTURE] = np.array([i / embodiment.rate_hz])
                    row[demonstration.SYNC] = np.zeros(1, np.float32)
                writer.add(row, task)
            with (out / TRIALS).open("a") as file:  # first: a line too many is seen by the count
                file.write(f"{played.key}\n")
            writer.save()
        return writer.episodes


def _filmed(out: Path, episodes: int) -> list[str]:
    """Keys of the trials that the dataset at `out` shows, episode by episode."""
    path = out / TRIALS
    lines = path.read_text().splitlines() if path.is_file() else []
    if len(lines) < episodes:
        raise TrainingError(f"{path} tells of {len(lines)} of {episodes} episodes: film to another folder")
    if len(lines) > episodes:  # killed before the last was saved
        path.write_text("".join(f"{line}\n" for line in lines[:episodes]))
    return lines[:episodes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--robot", default="sim_single_low", help="file in config/robots: camera, home")
    parser.add_argument("--embodiment", default="franka_single_workspace", help="file in config/embodiments")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    what = parser.add_subparsers(dest="what", required=True)
    one = what.add_parser("play", help="trials -> states")
    one.add_argument("--task", required=True, help="file in config/tasks")
    one.add_argument("--first-seed", type=int, required=True)
    one.add_argument("--episodes", type=int, required=True)
    one.add_argument("--out", type=Path, required=True, help="folder of states")
    third = what.add_parser("correct", help="trials of vipra evaluate -> states: the expert takes over")
    third.add_argument("evaluation", type=Path, help="its folder")
    third.add_argument("--each", type=int, default=2, help="corrections of a trial")
    third.add_argument("--out", type=Path, required=True, help="folder of states")
    other = what.add_parser("film", help="states -> LeRobotDataset")
    other.add_argument("states", type=Path)
    other.add_argument("--out", type=Path, required=True, help="folder of the dataset")
    other.add_argument("--actions", action="store_true", help="successes only, with state and action")
    other.add_argument("--episodes", type=int, help="at most so many")
    other.add_argument("--size", type=int, help="px, square; default: the camera's resolution")
    other.add_argument("--crf", type=int, default=CRF, help="H.264 quality, lower is better")
    other.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "vipra_ros", help="meshes")
    given = parser.parse_args()
    try:
        _run(given)
    except (TrainingError, ConfigError, EpisodesError) as error:
        parser.error(str(error))


def _run(given: argparse.Namespace) -> None:
    robot, embodiment = load(Robot, given.robot), load(Embodiment, given.embodiment)
    if given.what == "play":
        load(Task, given.task)
        seeds = range(given.first_seed, given.first_seed + given.episodes)
        play_all(given.out, given.task, given.robot, given.embodiment, seeds, given.workers)
    elif given.what == "correct":
        correct_all(given.evaluation, given.out, given.embodiment, given.each, given.workers)
    else:
        film(
            given.states, given.out, robot, embodiment, given.cache, given.actions, given.episodes,
            given.size, given.crf, given.workers,
        )  # fmt: skip


if __name__ == "__main__":
    main()
