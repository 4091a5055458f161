"""`vipra dataset`: check, count, look at, merge, replay and, in simulation, generate demonstrations."""

import argparse
import contextlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from config.loading import ConfigError, load, parse
from config.recording import FIRST_SEED, Quality
from config.safety import JointRange, Safety
from episodes import layout, quality
from episodes.demonstration import ACTION, CAPTURE, STATE, SYNC
from episodes.layout import EpisodesError
from episodes.quality import Finding, Trace
from episodes.reader import Dataset
from episodes.video import VideoError
from episodes.writer import finish_interrupted

EPILOG = """\
  vipra dataset check recordings/cups                 gaps, frozen camera, rests, limit hits, duplicates, ...
  vipra dataset check recordings/cups --quality idle_s=1.0 --json report.json
  vipra dataset stats recordings/cups
  vipra dataset view recordings/cups --episode 12     pictures and joint plots
  vipra dataset merge recordings/monday recordings/tuesday recordings/both
  vipra dataset merge recordings/cups recordings/good --without 12,17     a copy without these episodes
  vipra dataset replay recordings/cups --episode 12 --robot franka_single    on the arms (vipra up first)
  vipra dataset generate stack_cups recordings/sim --episodes 200    simulated, by the task's scripted expert
"""
_AT_ONCE = 64  # pictures decoded together
_PICTURES = (".png", ".jpg", ".pdf", ".svg")
_SHEET = 40  # episodes of a contact sheet: a picture that can still be opened


def main(argv: list[str] | None = None) -> int:
    """0, or 1 where `check` found a problem. Raises EpisodesError, ConfigError, ProcessError."""
    parser = argparse.ArgumentParser(
        prog="vipra dataset",
        description="Look after demonstrations (LeRobotDataset v3.0), and generate simulated ones.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("check", help="what may be wrong, episode by episode; status 1 if anything is")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    check.add_argument(
        "--no-pictures", action="store_true", help="do not decode videos: no frozen camera found"
    )
    stats = verbs.add_parser("stats", help="episodes, minutes, tasks, ranges")
    view = verbs.add_parser("view", help="contact sheet, or pictures and joint plots of one episode")
    view.add_argument(
        "--episode", type=int, metavar="N", help=f"default: a contact sheet of the first {_SHEET}"
    )
    view.add_argument(
        "--out", type=Path, metavar="FILE", help="PNG to write (default: here, named as FOLDER)"
    )
    view.add_argument(
        "--columns", type=_positive, default=8, help="moments of an episode (default: %(default)s)"
    )
    replay = verbs.add_parser("replay", help="send an episode's actions to the arms")
    replay.add_argument("--episode", type=int, required=True, metavar="N", help="which one, from 0")
    replay.add_argument(
        "--robot", default="sim_bimanual", help="file in config/robots (default: %(default)s)"
    )
    replay.add_argument("--speed", type=float, default=1.0, help="0.1 to 1 (default: %(default)s)")
    for verb in (check, stats, view, replay):
        verb.add_argument("dataset", type=Path, metavar="FOLDER", help="the dataset")
    for verb in (check, view):
        verb.add_argument(
            "--safety", default="fr3", help="limits, file in config/safety (default: %(default)s)"
        )
        verb.add_argument(
            "--quality",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=f"another threshold: {', '.join(Quality.model_fields)}",
        )
    merge = verbs.add_parser(
        "merge", help="several datasets of one robot, or one without some episodes, to a new one; no loss"
    )
    merge.add_argument("sources", type=Path, nargs="+", metavar="FOLDER", help="datasets to copy from")
    merge.add_argument("out", type=Path, metavar="OUT", help="folder of the new dataset")
    merge.add_argument(
        "--without", default="", metavar="N,N", help="episodes of the one FOLDER that are left out"
    )
    generate = verbs.add_parser("generate", help="simulated demonstrations of a task's scripted expert")
    generate.add_argument("task", metavar="TASK", help="file in config/tasks")
    generate.add_argument("dataset", type=Path, metavar="FOLDER", help="an interrupted run goes on there")
    generate.add_argument("--episodes", type=int, default=200, metavar="N", help="in the end (default: 200)")
    generate.add_argument(
        "--first-seed",
        type=int,
        default=FIRST_SEED,
        metavar="S",
        help="trial of episode 0; evaluate on other seeds (default: %(default)s)",
    )
    generate.add_argument("--robot", help="file in config/robots (default: sim_ and the task's workcell)")
    generate.add_argument(
        "--real-path",
        action="store_true",
        help="in real time through the nodes: GELLO's topics, teleop, arms, camera, recorder",
    )
    generate.add_argument(
        "--keep-flagged",
        action="store_true",
        help="with --real-path: keep what the recorder flags, instead of recording it again",
    )
    generate.add_argument(
        "--seconds", type=float, metavar="S", help="end every episode after S, done or not: for a quick look"
    )
    generate.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes, not with --real-path (default: 2)"
    )
    said = parser.parse_args(argv)
    run = {
        "check": _check,
        "stats": _stats,
        "view": _view,
        "merge": _merge,
        "replay": _replay,
        "generate": _generate,
    }
    if said.verb in ("check", "stats", "view", "replay"):
        finish_interrupted(said.dataset)
    return run[said.verb](said)


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def thresholds(settings: list[str]) -> Quality:
    """Quality with `KEY=VALUE` settings. Raises ConfigError."""
    given = {}
    for setting in settings:
        key, found, value = setting.partition("=")
        if not found:
            raise ConfigError(
                f"--quality {setting}: write KEY=VALUE; keys: {', '.join(Quality.model_fields)}"
            )
        given[key] = value
    return parse(Quality, given, "--quality")


def trace(dataset: Dataset, episode: int, pictures: bool = True) -> Trace:
    """An episode for `episodes.quality`. Raises EpisodesError, VideoError where it cannot be read."""
    length = dataset.rows[episode].length
    action = dataset.values(episode, ACTION).reshape(length, -1)
    state = dataset.values(episode, STATE).reshape(length, -1)
    if state.shape != action.shape:
        raise EpisodesError(
            f"{dataset.root}: {STATE} has {state.shape[1]} entries, {ACTION} {action.shape[1]}"
        )
    known = dataset.vectors
    return Trace(
        fps=dataset.fps,
        names=_names(dataset),
        capture=dataset.values(episode, CAPTURE if CAPTURE in known else "timestamp").astype(float),
        sync=dataset.values(episode, SYNC).astype(float) if SYNC in known else np.zeros(length),
        state=state,
        action=action,
        change=changes(dataset, episode) if pictures and dataset.cameras else np.full(length, np.inf),
        compressed=_compressed(dataset),
    )


def _names(dataset: Dataset) -> tuple[str, ...]:
    """Of the action's dimensions, also where the dataset does not name them."""
    count = dataset.info["features"][ACTION]["shape"][0] if ACTION in dataset.info["features"] else 0
    return dataset.names(ACTION) or tuple(f"dimension {i}" for i in range(count))


def changes(dataset: Dataset, episode: int) -> np.ndarray:
    """Change of each picture of the first camera to the one before [T], see `quality.change`.

    In a video of copies every key frame looks a little different: a picture there has changed once it differs
    from both of its neighbours.
    """
    length, camera, before = dataset.rows[episode].length, dataset.cameras[0], None
    found = np.zeros(length)
    for first in range(0, length, _AT_ONCE):
        some = range(first, min(first + _AT_ONCE, length))
        for i, rgb in zip(some, dataset.frames(episode, camera, some), strict=True):
            found[i] = 0.0 if before is None else quality.change(before, rgb)
            before = rgb
    if length > 2 and _compressed(dataset):
        found[1:] = np.minimum(found[1:], np.append(found[2:], found[-2]))
    return found


def _compressed(dataset: Dataset) -> bool:
    """Whether the first camera's pictures are a video."""
    return bool(dataset.cameras) and dataset.cameras[0] in layout.keys(dataset.info, "video")


def inspect(
    dataset: Dataset, limits: Quality, joints: JointRange | None, pictures: bool = True, progress=lambda: None
) -> list[list[Finding]]:
    """What is wrong with every episode."""
    found, prints = [], []
    for episode, row in enumerate(dataset.rows):
        try:
            seen = trace(dataset, episode, pictures)
            findings = quality.inspect(seen, limits, joints)
            prints.append(quality.fingerprint(seen))
        except (EpisodesError, VideoError) as error:
            findings = [Finding("unreadable", str(error))]
            prints.append(f"unreadable {episode}")
        if not any(task.strip() for task in row.tasks):
            findings.append(Finding("task", "no instruction"))
        found.append(findings)
        progress()
    for episode, other in quality.duplicates(prints).items():
        found[episode].append(Finding("duplicate", f"the same motion as episode {other}"))
    return found


def _check(said: argparse.Namespace) -> int:
    dataset, limits = Dataset(said.dataset), thresholds(said.quality)
    joints = load(Safety, said.safety).joints
    with Progress(console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("episodes", total=len(dataset))
        found = inspect(dataset, limits, joints, not said.no_pictures, lambda: bar.advance(job))
    problems = [[f for f in findings if f.problem] for findings in found]
    table = Table("episode", "s", "task", "found", title=str(said.dataset), title_justify="left")
    for row, findings in zip(dataset.rows, found, strict=True):
        if findings:
            lines = "\n".join(f"{f.kind}: {f.text}" for f in findings)
            table.add_row(str(row.index), f"{row.length / dataset.fps:.1f}", ", ".join(row.tasks), lines)
    console = Console(markup=False)  # instructions may hold brackets
    if table.row_count:
        console.print(table)
    each = len(joints.position_min_rad)
    if (count := sum(not name.endswith("gripper") for name in dataset.names(ACTION))) % each:
        console.print(f"limits are not checked: {count} joints, --safety {said.safety} is for {each} an arm")
    kinds = Counter(f.kind for findings in problems for f in findings)
    bad = sum(bool(p) for p in problems)
    frames = sum(row.length for row in dataset.rows)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    verdict = f"{bad} with a problem: {told}" if bad else "clean"
    minutes = frames / dataset.fps / 60
    console.print(f"{len(dataset)} episodes, {frames} frames, {minutes:.1f} min: {verdict}", highlight=False)
    if said.json:
        report = {
            "dataset": str(said.dataset),
            "robot": dataset.info["robot_type"],
            "fps": dataset.fps,
            "episodes": len(dataset),
            "frames": frames,
            "episodes_with_problems": bad,
            "problems": dict(kinds),
            "sync_error_ms_p99": _sync_p99_ms(dataset),
            "findings": [
                {"episode": row.index, **finding.as_dict()}
                for row, findings in zip(dataset.rows, found, strict=True)
                for finding in findings
            ],
        }
        said.json.write_text(json.dumps(report, indent=2))
    return 1 if bad or not len(dataset) else 0


def _sync_p99_ms(dataset: Dataset) -> float | None:
    """Of every episode that can be read."""
    errors = []
    if SYNC in dataset.vectors:
        for episode in range(len(dataset)):
            with contextlib.suppress(EpisodesError):
                errors.append(dataset.values(episode, SYNC))
    if not errors:
        return None
    errors = np.concatenate(errors)
    return round(1000 * float(np.quantile(errors, 0.99)), 3)


def _stats(said: argparse.Namespace) -> int:
    dataset = Dataset(said.dataset)
    if not len(dataset):
        raise EpisodesError(f"{said.dataset}: has no episode yet")
    console = Console(highlight=False, markup=False)
    lengths = np.array([row.length for row in dataset.rows]) / dataset.fps
    low, middle, high = np.quantile(lengths, (0, 0.5, 1))
    console.print(f"{dataset.info['robot_type']}, {dataset.fps} frames/s, {', '.join(dataset.cameras)}")
    span = f"{low:.1f} to {high:.1f} s, median {middle:.1f} s"
    console.print(f"{len(dataset)} episodes, {lengths.sum() / 60:.1f} min; {span}")
    if (p99 := _sync_p99_ms(dataset)) is not None:
        console.print(f"synchronisation error {p99:.1f} ms (99th percentile)")
    for task, count in Counter(task for row in dataset.rows for task in row.tasks).most_common():
        console.print(f"{count:5d}  {task or '(no instruction)'}")
    actions = np.concatenate([dataset.values(e, ACTION) for e in range(len(dataset))])
    table = Table("dimension", "min", "mean", "max", "std", title="actions", title_justify="left")
    columns = actions.min(0), actions.mean(0), actions.max(0), actions.std(0)
    for name, *values in zip(_names(dataset), *columns, strict=True):
        table.add_row(name, *(f"{value:.3f}" for value in values))
    console.print(table)
    return 0


def _moments(dataset: Dataset, episode: int, columns: int) -> np.ndarray:
    if not dataset.cameras:
        raise EpisodesError(f"{dataset.root}: no camera was recorded")
    last = dataset.rows[episode].length - 1
    moments = np.unique(np.round(np.linspace(0, last, columns)).astype(int))
    frames = dataset.frames(episode, dataset.cameras[0], moments)
    step = max(1, frames.shape[2] // 240)
    return frames[:, ::step, ::step]


def _view(said: argparse.Namespace) -> int:
    from vipra_ros.recording import pictures

    dataset = Dataset(said.dataset)
    if not len(dataset):
        raise EpisodesError(f"{said.dataset}: has no episode yet")
    if said.out and said.out.suffix.lower() not in _PICTURES:
        raise EpisodesError(f"--out {said.out}: name a file that ends in {', '.join(_PICTURES)}")
    if said.episode is None:
        out = said.out or Path(f"{dataset.root.resolve().name}.png")
        strips = []
        for episode, row in enumerate(dataset.rows[:_SHEET]):
            name = f"episode {row.index}: {row.length / dataset.fps:.1f} s, {', '.join(row.tasks)}"
            strips.append((name, _moments(dataset, episode, said.columns)))
        columns = max(len(frames) for _, frames in strips)
        strips = [(name, np.concatenate([f, np.repeat(f[-1:], columns - len(f), 0)])) for name, f in strips]
        pictures.sheet(strips, out)
        if len(dataset) > _SHEET:
            print(f"the first {_SHEET} of {len(dataset)} episodes; --episode N shows any other")
    else:
        if not 0 <= said.episode < len(dataset):
            raise EpisodesError(f"{said.dataset} has episodes 0 to {len(dataset) - 1}, not {said.episode}")
        out = said.out or Path(f"{dataset.root.resolve().name}_{said.episode:06d}.png")
        seen = trace(dataset, said.episode)
        findings = quality.inspect(seen, thresholds(said.quality), load(Safety, said.safety).joints)
        name = f"episode {said.episode}: {', '.join(dataset.rows[said.episode].tasks)}"
        pictures.episode(name, seen, _moments(dataset, said.episode, said.columns), findings, out)
    print(out)
    return 0


def _merge(said: argparse.Namespace) -> int:
    from episodes.merge import merge

    try:
        without = {int(number) for number in said.without.split(",") if said.without}
    except ValueError as error:
        raise ConfigError(f"--without {said.without}: episode numbers with commas, such as 12,17") from error
    if len(said.sources) < 2 and not without:
        raise EpisodesError("merge: name at least two datasets, then the new folder; or one and --without")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task("episodes", total=None)
        count = merge(
            said.sources, said.out, lambda done, total: bar.update(job, completed=done, total=total), without
        )
    print(f"{said.out}: {count} episodes")
    return 0


def _replay(said: argparse.Namespace) -> int:
    import os

    from config.embodiment import Embodiment
    from config.robot import Robot
    from vipra_ros.process import signals_raise
    from vipra_ros.recording.replay import Replayer, load_actions

    if not 0.1 <= said.speed <= 1:
        raise ConfigError(
            f"--speed {said.speed:g}: 0.1 to 1, demonstrations are not played faster than recorded"
        )
    dataset, robot = Dataset(said.dataset), load(Robot, said.robot)
    embodiment = load(Embodiment, robot.embodiment)
    actions = load_actions(dataset, said.episode, embodiment)
    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    length = len(actions) / dataset.fps / said.speed
    print(f"episode {said.episode}: {length:.1f} s. Ctrl-C lets the arms go; they decelerate and hold.")
    try:
        with signals_raise(), Replayer(robot, embodiment) as replayer:
            done = replayer.run(actions, dataset.fps * said.speed, lambda _: None)
    except KeyboardInterrupt:
        print("stopped")
        return 130
    print(
        f"replayed {done.seconds:.1f} s; the arms followed within {done.error_rms_rad:.3f} rad rms, "
        f"{done.error_max_rad:.3f} rad at most"
    )
    return 0


def _generate(said: argparse.Namespace) -> int:
    from config.robot import Robot
    from config.task import Task
    from vipra_ros.process import signals_raise
    from vipra_ros.recording.generate import Wanted, generate

    if said.episodes < 1 or said.workers < 1 or said.first_seed < 0:
        raise ConfigError("--episodes and --workers are at least 1, --first-seed at least 0")
    if said.seconds is not None and said.seconds < 1:
        raise ConfigError(f"--seconds {said.seconds:g}: at least 1")
    task = load(Task, said.task)
    name = said.robot or task.simulated_robot or f"sim_{task.workcell}"
    robot = load(Robot, name)
    if not robot.simulation or robot.workcell != task.workcell:
        raise ConfigError(f"{name}: {task.name} needs a simulated robot in workcell {task.workcell}")
    if said.keep_flagged and not said.real_path:
        raise ConfigError("--keep-flagged: only with --real-path, nothing is flagged without the recorder")
    wanted = Wanted(
        task, robot, said.episodes, said.first_seed, seconds=said.seconds, keep_flagged=said.keep_flagged
    )
    try:
        with signals_raise():
            if said.real_path:
                from vipra_ros.teleop.expert import demonstrate

                made = demonstrate(wanted, name, said.task, said.dataset, print)
            else:
                with Progress(console=Console(stderr=True), transient=True) as bar:
                    job = bar.add_task("episodes", total=said.episodes)
                    cache = Path.home() / ".cache" / "vipra_ros"
                    made = generate(
                        wanted, said.dataset, cache, said.workers, lambda n: bar.update(job, completed=n)
                    )
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on: {said.dataset}")
        return 130
    print(f"{said.dataset}: {made} episodes made, {said.episodes} in all; look at it: vipra dataset view")
    return 0
