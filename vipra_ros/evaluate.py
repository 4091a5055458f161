"""`vipra evaluate`: trials of a policy, their statistics and a report; comparison of two reports."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

from config.embodiment import Embodiment
from config.loading import ConfigError, load
from config.policy import Policy
from config.robot import PRESETS, Robot
from config.robot import PolicyClient as PolicyConfig
from config.task import Task
from config.workcell import Workcell
from simulation.tasks.trial import digest
from vipra_ros.evaluation import report as reports
from vipra_ros.evaluation.compare import compare
from vipra_ros.evaluation.ledger import (
    EvaluationError,
    Key,
    Ledger,
    Result,
    locked,
    trial_settings,
    write_atomically,
)

EXPERT = "expert"
CACHE = Path.home() / ".cache" / "vipra_ros"
_SHOWN = {"mode", "anchor", "action_rate_hz", "replan_after", "min_cycle_s", "gripper_sustained_actions"}
_NO_USE = {  # way of evaluating -> option that it does not follow, and why
    "--operator": {
        "preset": "it is the bring-up's: vipra up ... preset:=3.5hz",
        "latency_ms": "an inference takes what it takes",
        "no_video": "every trial is filmed",
    },
    "--live": {"no_video": "every trial is filmed"},
    f"--policy {EXPERT}": {"preset": "it asks no server", "latency_ms": "it asks no server"},
}
_EPILOG = """
  vipra evaluate stack_cups --policy checkpoints/mine --seeds 1000:1050 --split unseen --out runs/mine
      50 trials in simulation; interrupted, the same command goes on where it was
  vipra evaluate stack_cups --policy expert --seeds 0:50 --out runs/expert
      what the scripted expert, which sees everything, reaches
  vipra evaluate stack_cups --live --policy checkpoints/mine --seeds 1000:1050 --split unseen --out runs/live
      the same trials on the whole stack in real time; everything is started and stopped
  vipra evaluate --compare runs/mine runs/scratch --out runs/mine_against_scratch
      paired test on the same trials
  vipra evaluate stack_cups --operator --policy mine --seeds 0:24 --out runs/robot
      at the robot: the graph runs (vipra up), the policy is served, you set up and score (docs/evaluation.md)

Report: OUT/report.html, OUT/report.json, OUT/contact.png; videos and trajectories in OUT/trials.
"""


def main(argv: list[str] | None = None) -> int:
    """`vipra evaluate`; 0 when every trial counts. Raises our own errors."""
    parser = argparse.ArgumentParser(
        prog="vipra evaluate",
        description=__doc__.partition(": ")[2],
        epilog="Examples:" + _EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", nargs="?", metavar="TASK", help="file in config/tasks, or its path")
    parser.add_argument(
        "--policy",
        metavar="WHICH",
        help="checkpoint folder, file in config/policies, address of a running server (tcp://...), or expert",
    )
    parser.add_argument(
        "--seeds",
        metavar="A:B|FILE",
        help="trials A to B - 1, or those of a file in its order: one seed a line, # comments",
    )
    parser.add_argument("--split", choices=("seen", "unseen", "both"), default="seen")
    parser.add_argument("--out", type=Path, help="folder of the report; an evaluation there goes on")
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="a protocol of the paper; default: asynchronous, 7 of 14, at the demonstrations' rate",
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--lockstep",
        action="store_true",
        help="simulation that waits for the policy (the default, named): repeatable bit for bit",
    )
    way.add_argument(
        "--live",
        action="store_true",
        help="simulation in real time on the whole stack: simulator, camera, policy server and ROS 2 nodes",
    )
    way.add_argument("--operator", action="store_true", help="at the robot: you set up, start and score")
    parser.add_argument(
        "--latency-ms",
        type=float,
        help="lockstep: simulated time an inference takes (100); live: added to every inference (0)",
    )
    parser.add_argument(
        "--robot",
        help="file in config/robots; default: the task's, or sim_ (operator: franka_) and its workcell",
    )
    parser.add_argument("--time-limit", type=float, metavar="S", help="instead of the task's")
    parser.add_argument("--no-video", action="store_true", help="lockstep: no mp4 a trial")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="two reports of the same trials"
    )
    given = parser.parse_args(argv)
    if given.compare:
        return _compare(*given.compare, given.out)
    for name in ("task", "policy", "out", "seeds"):
        if getattr(given, name) is None:
            parser.error(f"{'TASK' if name == 'task' else '--' + name} is missing")
    task = load(Task, given.task)
    limit_s = limit_of(task, given.time_limit)
    how = "--operator" if given.operator else "--live" if given.live else f"--policy {given.policy}"
    for name, why in _NO_USE.get(how, {}).items():
        if getattr(given, name) is not parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} means nothing with {how}: {why}")
    if given.latency_ms is None:
        given.latency_ms = 0.0 if given.live else 100.0
    if not 0 <= given.latency_ms <= 5000:
        parser.error(f"--latency-ms {given.latency_ms:g}: 0 to 5000")
    if (given.live or given.operator) and given.policy == EXPERT:
        parser.error(f"{how}: the expert plays in lockstep simulation only")
    wanted = keys_of(given.seeds, given.split)
    if given.operator:
        from vipra_ros.evaluation.live import run_at_keyboard

        robot = given.robot or f"franka_{task.workcell}"
        return run_at_keyboard(task, given.policy, robot, wanted, limit_s, given.out)
    from vipra_ros.process import ProcessError, signals_raise

    name = given.robot or task.simulated_robot or f"sim_{task.workcell}"
    robot = load(Robot, name)
    if not robot.simulation or robot.workcell != task.workcell:
        raise ConfigError(
            f"{name} has workcell {robot.workcell}{'' if robot.simulation else ', not simulated'}: "
            f"{task.name} needs a simulated robot in workcell {task.workcell}"
        )
    order = tuple(load(Embodiment, robot.embodiment).by_arm)
    if tuple(load(Workcell, task.workcell).arms) != order:
        raise EvaluationError(
            f"workcell {task.workcell} and embodiment {robot.embodiment} list the arms in another order: the "
            f"workcell's file shall list {', '.join(order)}"
        )
    settings = trial_settings(task, limit_s, robot.safety) | {
        "policy": given.policy,
        "trials": "whole stack in real time, simulated" if given.live else "lockstep simulation",
        "robot": name,
        "robot_digest": _digest_of(robot),
    }
    if given.policy != EXPERT and (served := _policy_digest(given.policy)):
        settings["served_digest"] = served
    with signals_raise(), locked(given.out):
        try:
            (_live if given.live else _lockstep)(task, robot, given, settings, wanted)
        except (KeyboardInterrupt, EvaluationError, ProcessError) as error:
            if isinstance(error, KeyboardInterrupt):
                _say("interrupted: the trial that ran does not count; the same command goes on")
            path = given.out / "settings.json"
            if path.is_file() and settings.items() <= read_settings(given.out).items():  # ours, not another's
                _report(task, given.out)
            raise
    _report(task, given.out)
    return 0


def _live(task: Task, robot: Robot, given: argparse.Namespace, settings: dict, wanted: list[Key]) -> None:
    from vipra_ros.evaluation import stack

    policy = policy_of(robot, given.preset, given.latency_ms)
    shown = policy.model_dump(include=_SHOWN)
    settings |= shown | {"preset": given.preset, "latency_ms": given.latency_ms}
    file = str(Path(given.task).resolve()) if Path(given.task).is_file() else given.task
    played = shown | {"inject_latency_ms": given.latency_ms}
    stack.run(
        *(task, file, given.policy, settings["robot"], played, settings, wanted),
        *(settings["time_limit_s"], given.out, _say),
    )


def _lockstep(task: Task, robot: Robot, given: argparse.Namespace, settings: dict, wanted: list[Key]) -> None:
    import simulation.render  # noqa: F401  first: it chooses the renderer before MuJoCo is imported
    from vipra_ros.evaluation import served
    from vipra_ros.evaluation.lockstep import Stage

    limit_s = settings["time_limit_s"]
    stage = Stage(robot, CACHE)
    try:
        if given.policy == EXPERT:
            settings["trials"] = "scripted expert in lockstep simulation"
            ledger = Ledger(given.out, settings)
            served.run_expert(stage, task, ledger, wanted, limit_s, not given.no_video, _say)
        else:
            policy = policy_of(robot, given.preset, given.latency_ms)
            shown = policy.model_dump(include=_SHOWN)
            settings |= shown | {"preset": given.preset, "latency_ms": given.latency_ms}
            served.run_policy(
                stage,
                task,
                given.policy,
                policy,
                given.out,
                settings,
                wanted,
                limit_s,
                not given.no_video,
                _say,
            )
    finally:
        stage.close()


def _digest_of(robot: Robot) -> str:
    """Of everything in the robot's file and its embodiment that no other setting tells."""
    body = load(Embodiment, robot.embodiment).model_dump(mode="json")
    others = {"embodiment", "workcell", "safety", "policy"}
    return digest([robot.model_dump(mode="json", exclude=others), body])


def _policy_digest(which: str) -> str:
    """Of how a checkpoint is served (noise, steps, precision), whichever it is; "" for a running server."""
    if which.startswith("tcp://"):
        return ""
    folder = Path(which).expanduser()
    policy = Policy(checkpoint=which) if (folder / "config.json").is_file() else load(Policy, which)
    return digest(policy.model_dump(mode="json", exclude={"checkpoint"}))


def _report(task: Task, out: Path) -> None:
    settings = read_settings(out)
    ledger = Ledger(out, settings)
    report = reports.write(ledger, settings, notes(task, settings, ledger.results()))
    _say(f"{reports.in_one_line(report)}; report: {out / 'report.html'}")


def policy_of(robot: Robot, preset: str | None, latency_ms: float) -> PolicyConfig:
    """How chunks are asked for and played: the preset's, or 7 of 14 at the demonstrations' rate."""
    rate = load(Embodiment, robot.embodiment).rate_hz
    changes = PRESETS.get(preset) or {"action_rate_hz": rate, "replan_after": 7, "mode": "asynchronous"}
    return robot.policy.model_copy(update={**changes, "inject_latency_ms": latency_ms})


def read_settings(folder: Path) -> dict:
    return json.loads((folder / "settings.json").read_text())


def notes(task: Task, settings: dict, results: list[Result]) -> list[str]:
    """What a reader must know to read the numbers right."""
    text = [
        "Simulated: MuJoCo contact, a rendered camera. The policy's side, the chunks' timing and the safety "
        "checks are those of the robot.",
        f"Success: {task.protocol.scoring}",
    ]
    if settings["policy"] == EXPERT:
        text[0] = "Simulated. The scripted expert knows where everything is: an upper bound, not a policy."
    if factors := [r.real_time_factor for r in results if r.real_time_factor is not None]:
        latency = [r.latency_ms for r in results if r.latency_ms is not None]
        text[0] = (
            "Simulated arms and a rendered camera, in real time; policy server, nodes, safety checks and the "
            "arms' protocol are those of the robot. Simulated seconds a second: "
            f"{median(factors):.2f}; median inference {median(latency):.0f} ms of simulated time."
        )
    return text


def _compare(a: Path, b: Path, out: Path | None) -> int:
    comparison = compare(a, b)
    _say(reports.comparison_line(comparison))
    for name, only in zip(comparison.names, (comparison.only_a, comparison.only_b), strict=True):
        _say(f"  only {name} succeeded: {', '.join(only) or 'none'}")
    for note in comparison.notes:
        _say(f"  differs: {note}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "comparison.json", json.dumps(asdict(comparison), indent=2) + "\n")
        write_atomically(out / "comparison.html", reports.comparison_page(comparison))
        _say(f"comparison: {out / 'comparison.html'}")
    return 0


def keys_of(seeds: str, split: str) -> list[Key]:
    """Trials of "A:B" or of a file, in "seen", "unseen" or "both". Raises EvaluationError."""
    first, colon, last = seeds.partition(":")
    if Path(seeds).is_file():
        numbers = _listed(Path(seeds))
    elif colon and seeds.isascii() and first.isdigit() and last.isdigit() and int(first) < int(last):
        numbers = range(int(first), int(last))
    else:
        raise EvaluationError(f"seeds {seeds!r} is not A:B with A below B, such as 0:50, and no file")
    if split not in ("seen", "unseen", "both"):
        raise EvaluationError(f"split {split!r} is not seen, unseen or both")
    splits = ("seen", "unseen") if split == "both" else (split,)
    return [Key(one, seed) for one in splits for seed in numbers]


def _listed(path: Path) -> list[int]:
    """Seeds of an operator's list, one a line, in its order. Raises EvaluationError."""
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as a list of seeds: {error}") from error
    seeds: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        if not (line.isascii() and line.isdigit()):
            raise EvaluationError(f"{path}, line {number}: {line!r} is no seed: one whole number a line")
        if int(line) in seeds:
            raise EvaluationError(f"{path}, line {number}: seed {line} is there twice")
        seeds.append(int(line))
    if not seeds:
        raise EvaluationError(f"{path} lists no seed: one whole number a line")
    return seeds


def limit_of(task: Task, given_s: float | None) -> float:
    """The task's time limit, or the one given, s. Raises EvaluationError."""
    limit_s = task.time_limit_s if given_s is None else given_s
    if not 0 < limit_s <= 600:
        raise EvaluationError(f"time limit {limit_s:g} s: must be above 0 and at most 600")
    return limit_s


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
