"""vipra_sim from nothing: scripted trials, tokens, pretraining, corrections, finetuning, comparison.

    python -m training.sim                                     (make train-sim, one GPU)
    python -m training.sim --small --ignore-gate               (make train-sim-small, two CPU cores)
    python -m training.sim --only gate                         one step; --minutes 9: at most so long each

Every step is a command a user would type, or says so. What is finished stays; a step that was cut off, by a
kill or by --minutes, goes on when this is run again (exit status 75: not finished). Steps that draw or play
(states, videos, demonstrations, corrections, choose, evaluate, live) need a renderer, the others torch: they
may run on different machines over the same folder. --corrections 0 does without a draft and its mistakes.
docs/vipra_sim.md has the commands for a rented GPU.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from config.loading import ConfigError
from config.training import VALIDATION_SHARE
from episodes.layout import EpisodesError
from training.run import TrainingError

# First seeds of trials of the seen split: none that policies are evaluated on (below 100,000).
VIDEOS, MORE_VIDEOS = 100_000, 120_000
DEMONSTRATIONS = 200_000
MISTAKES = 210_000  # of the trials a draft plays, to be corrected
EACH = 2  # corrections of a trial
SPARE = 1.2  # trials played for a demonstration: failures are left out
DEVELOPMENT = 300_000  # first of the seeds that choose a checkpoint
PAIRED = 1000  # first seed of the comparison with Scratch
HELD_OUT = 0  # first seed of the trials on the whole stack
LATENCY_MS = 100  # of simulated time for a chunk, in lockstep
NOISE = 0.0  # that chunks begin as: a fixed draw would carry every trial off to the same side
STRIDES = (2, 4)  # of stage 1, frames at 15 Hz
LABEL_STRIDE = 2  # 14 steps are 1.9 s
PROBE_STEPS = {"cpu": 3000, "cuda": 4000}  # with 400 not even the pixels' probe finds the cups
WHOLE = {"left": 0.0, "top": 0.0, "width": 1.0, "height": 1.0}  # pictures were cut when they were drawn
TRAINED = ("tokenizer", "latent", "pretrain", "finetune")  # stages with a recipe
VARIANTS = ("policy", "scratch", "attention")  # runs of stage 3 on all demonstrations
UNFINISHED = 75  # exit status, EX_TEMPFAIL
PATIENCE_S = 120.0  # for a stopped step to save


class OutOfTime(Exception):
    """A step has had its minutes; run again to go on."""


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    recipes: str  # config/training/<stage>_<recipes>.yaml
    task: str
    robot: str  # file in config/robots: trials begin at its home, with the hand in the picture
    embodiment: str  # file in config/embodiments: the part of the camera's picture that is shown
    videos: tuple[tuple[str, int, int], ...]  # trials without actions: task, first seed, how many
    demonstrations: int  # with the corrections
    corrections: int  # of where a draft of the policy went, trained on the other demonstrations
    draft: float  # its share of the steps of stage 3
    checkpoints: tuple[float, ...]  # shares of the steps of stage 3, to choose from
    development: int  # trials that choose
    paired: int  # trials against Scratch
    held_out: int  # trials on the whole stack


FULL = Scale(
    recipes="sim",
    task="stack_cups",
    robot="sim_single_low",
    embodiment="franka_single_workspace",
    videos=(("stack_cups", VIDEOS, 1400), ("pick_place", MORE_VIDEOS, 600)),
    demonstrations=200,
    corrections=80,
    draft=0.4,
    checkpoints=(0.5, 0.65, 0.8, 1.0),
    development=20,
    paired=200,
    held_out=50,
)
SMALL = Scale(
    recipes="sim_small",
    task="stack_cups_narrow",
    robot="sim_single_marks",
    embodiment="franka_single_marks",
    videos=(("stack_cups_narrow", VIDEOS, 125), ("pick_place", MORE_VIDEOS, 50)),
    demonstrations=200,
    corrections=80,
    draft=0.4,
    checkpoints=(1.0,),
    development=10,
    paired=50,
    held_out=20,
)


@dataclass(frozen=True)
class Plan:
    """What was asked for. Folders lie in `out`."""

    out: Path
    scale: Scale
    size: int | None
    workers: int
    minutes: float | None
    changes: tuple[str, ...] = ()
    ignore_gate: bool = False

    def run(self, module: str, *arguments: object) -> None:
        """A command of this project. Raises OutOfTime, TrainingError when it fails."""
        command = [sys.executable, "-m", module, *map(str, arguments)]
        print("$", " ".join(command[1:]), flush=True)
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = process.wait(self.minutes * 60 if self.minutes else None)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
            process.terminate()  # not its workers: training saves first
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)
            if isinstance(reason, KeyboardInterrupt):
                raise OutOfTime(f"{module} {arguments[0]} was stopped") from None
            raise OutOfTime(f"{module} {arguments[0]}: {self.minutes:g} minutes are over") from None
        finally:
            _end(process)
        if code:
            raise TrainingError(f"{' '.join(command[1:4])} .. ended with status {code}: see above, run again")

    def sets(self, stage: str, *more: str) -> list[str]:
        asked = [text.partition(".")[2] for text in self.changes if text.startswith(f"{stage}.")]
        return [item for change in (*more, *asked) for item in ("--set", change)]

    def data(self, *strides: int) -> str:
        sets = [{"path": str(self.out / "videos"), "stride": stride} for stride in strides]
        return f"data={json.dumps({'datasets': sets, 'validation_share': VALIDATION_SHARE})}"


def _end(process: subprocess.Popen) -> None:
    """What is left of a step's processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def done(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


# --- steps


def states(plan: Plan) -> None:
    scale = plan.scale
    for task, first, count in scale.videos:
        _play(plan, task, first, count, "videos")
    _play(plan, scale.task, DEMONSTRATIONS, round(SPARE * _plain(scale)), "demonstrations")


def _plain(scale: Scale) -> int:
    """Demonstrations from the start of a trial."""
    return scale.demonstrations - scale.corrections


def _play(plan: Plan, task: str, first: int, count: int, which: str) -> None:
    place = ["--out", plan.out / "states" / which]
    what = ["--task", task, "--first-seed", first, "--episodes", count]
    body = ["--robot", plan.scale.robot, "--workers", plan.workers]
    plan.run("training.scripted", *body, "play", *what, *place)


def videos(plan: Plan) -> None:
    _film(plan, "videos")


def demonstrations(plan: Plan) -> None:
    _film(plan, "demonstrations", "--actions", "--episodes", _plain(plan.scale))


def draft(plan: Plan) -> None:
    """A policy that makes mistakes worth correcting."""
    if plan.scale.corrections:
        steps = max(round(plan.scale.draft * checkpoints(plan)[-1]), 1)
        _act(plan, "draft", "draft", steps, "--start", plan.out / "pretrained")


def corrections(plan: Plan) -> None:
    """The draft plays, and the expert takes over where it went."""
    scale = plan.scale
    if not scale.corrections:
        return
    played = plan.out / "evaluation" / "draft"
    trials = max(round(SPARE * scale.corrections / EACH), 1)
    _evaluate(plan, plan.out / "draft", _seeds(MISTAKES, trials), played)
    what = ["correct", played, "--each", EACH, "--out", plan.out / "states" / "corrections"]
    plan.run("training.scripted", "--embodiment", scale.embodiment, "--workers", plan.workers, *what)
    _film(plan, "corrections", "--actions", "--episodes", scale.corrections)


def _film(plan: Plan, which: str, *options: object) -> None:
    size = ["--size", plan.size] if plan.size else []
    place = ["film", plan.out / "states" / which, "--out", plan.out / which]
    body = ["--robot", plan.scale.robot, "--embodiment", plan.scale.embodiment, "--workers", plan.workers]
    plan.run("training.scripted", *body, *place, *options, *size)


def train(plan: Plan, stage: str, name: str, *options: object, changes: tuple[str, ...] = ()) -> None:
    if done(plan.out / name):
        return
    place = ["--out", plan.out / name, "--run", plan.out / "runs" / stage]
    recipe = f"{stage}_{plan.scale.recipes}"
    plan.run("vipra_ros.cli", "train", stage, recipe, *place, *options, *plan.sets(stage, *changes))


def tokenizer(plan: Plan) -> None:
    train(plan, "tokenizer", "tokenizer", changes=(plan.data(1),))


def gate(plan: Plan) -> None:
    """Measure what the tokens hold, once a tokenizer. Raises TrainingError where it is too little."""
    path = plan.out / "gate.json"
    if not path.is_file():
        if not done(plan.out / "tokenizer"):
            raise TrainingError(f"{plan.out / 'tokenizer'} is missing: run --only tokenizer first")
        import torch

        from config.dataset import DatasetConfig
        from training import gate as probes
        from training.start import open_start

        device = "cuda" if torch.cuda.is_available() else "cpu"
        start = open_start(plan.out / "tokenizer")
        data = DatasetConfig(path=str(plan.out / "videos"))
        probes.run(start.vqgan(device), data, VALIDATION_SHARE, PROBE_STEPS[device], device, path)
    check_gate(path, plan.ignore_gate)


def check_gate(path: Path, ignore: bool) -> None:
    """Raises TrainingError unless the tokens hold hand and cups to within the limit, or `ignore`."""
    if not path.is_file():
        raise TrainingError(f"{path} is missing: run --only gate first")
    found = json.loads(path.read_text())
    text = ", ".join(f"{name} {off:.1f}" for name, off in found["tokens_mm"].items())
    if found["passed"]:
        print(f"gate passed: mm off, read from tokens: {text}")
        return
    pixels = ", ".join(f"{name} {off:.1f}" for name, off in found["pixels_mm"].items())
    limit = found["limit_mm"]
    problem = f"gate: tokens hold places to {text} mm, the limit is {limit:g} mm (from pixels: {pixels})"
    if not ignore:
        raise TrainingError(
            f"{problem}: train the tokenizer longer (delete tokenizer/, runs/tokenizer/ and gate.json), or "
            "give --ignore-gate"
        )
    print(f"GATE FAILED, going on as asked: {problem}", flush=True)


def latent(plan: Plan) -> None:
    check_gate(plan.out / "gate.json", plan.ignore_gate)
    train(plan, "latent", "latent", changes=(plan.data(*STRIDES),))


def labels(plan: Plan) -> None:
    check_gate(plan.out / "gate.json", plan.ignore_gate)
    mixture = plan.out / "label.yaml"
    sets = [{"path": str(plan.out / "videos"), "stride": LABEL_STRIDE}]
    mixture.write_text(yaml.safe_dump({"datasets": sets, "validation_share": VALIDATION_SHARE}))
    models = ["--latent", plan.out / "latent", "--tokenizer", plan.out / "tokenizer"]
    if not done(plan.out / "labels"):
        plan.run("vipra_ros.cli", "label", "--mixture", mixture, *models, "--out", plan.out / "labels")


def pretrain(plan: Plan) -> None:
    check_gate(plan.out / "gate.json", plan.ignore_gate)
    sources = ["--labels", plan.out / "labels", "--tokenizer", plan.out / "tokenizer"]
    train(plan, "pretrain", "pretrained", *sources)


def finetune(plan: Plan) -> None:
    _choices(plan, "policy", "--start", plan.out / "pretrained")


def scratch(plan: Plan) -> None:
    """The same demonstrations, steps and augmentation, without stages 1 and 2."""
    _choices(plan, "scratch", "--tokenizer", plan.out / "tokenizer")


def attention(plan: Plan) -> None:
    """Ablation: what a chunk's actions see of each other, causal where the policy's is bidirectional."""
    _choices(plan, "attention", "--start", plan.out / "pretrained")


def other_attention(plan: Plan) -> str:
    """The ablation's `chunk_attention`."""
    causal = _recipe(plan).chunk_attention == "causal"
    return "bidirectional" if causal else "causal"


def _choices(plan: Plan, name: str, *options: object) -> None:
    """One run, exported at several steps."""
    for steps in checkpoints(plan):
        _act(plan, name, f"choices/{name}-{steps:06d}", steps, *options)


def _act(plan: Plan, run: str, name: str, steps: int, *options: object) -> None:
    """Stage 3 up to `steps`, exported to `name`; a draft knows no corrections."""
    check_gate(plan.out / "gate.json", plan.ignore_gate)
    if done(plan.out / name):
        return
    corrected = plan.scale.corrections and run != "draft"
    recorded = ("demonstrations", "corrections") if corrected else ("demonstrations",)
    sets = [{"path": str(plan.out / which), "crop": WHOLE} for which in recorded]
    data = f"data={json.dumps({'datasets': sets, 'validation_share': 0.05})}"
    place = ["--out", plan.out / name, "--run", plan.out / "runs" / run]
    changes = plan.sets("finetune", data)
    if run == "attention":
        changes += ["--set", f"chunk_attention={other_attention(plan)}"]
    recipe = f"finetune_{plan.scale.recipes}"
    plan.run(
        "vipra_ros.cli", "train", "finetune", recipe, *place, *options, *changes, "--set", f"steps={steps}"
    )


def checkpoints(plan: Plan) -> list[int]:
    """Steps of stage 3 after which a checkpoint is exported."""
    total = _recipe(plan).steps
    return sorted({max(round(share * total), 1) for share in plan.scale.checkpoints})


def _recipe(plan: Plan):
    """Of stage 3, as asked for."""
    from config.training import load_recipe

    asked = [text.partition(".")[2] for text in plan.changes if text.startswith("finetune.")]
    return load_recipe(f"finetune_{plan.scale.recipes}", asked)


def choose(plan: Plan) -> None:
    """The checkpoint of each run with the most successes on the development seeds, then the most partial
    ones, then the latest.
    """
    for name in VARIANTS:
        folders = [plan.out / "choices" / f"{name}-{steps:06d}" for steps in checkpoints(plan)]
        there = [done(folder) for folder in folders]
        if done(plan.out / name) or not any(there):
            continue
        if not all(there):
            raise TrainingError(
                f"{name}: {sum(there)} of {len(there)} checkpoints are there: run its step again"
            )
        rates = []
        for folder in folders:
            report = plan.out / "development" / folder.name
            _evaluate(plan, folder, _seeds(DEVELOPMENT, plan.scale.development), report)
            rates.append(_report(report))
        best = max(range(len(folders)), key=lambda i: (rates[i]["success_rate"], rates[i]["partial_rate"], i))
        partial = plan.out / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(folders[best], partial)
        partial.rename(plan.out / name)


def evaluate(plan: Plan) -> None:
    """Paired trials in lockstep, and McNemar's test: against Scratch, and the ablation where there is one."""
    folder, others = plan.out / "evaluation", {"scratch": "comparison"}
    if done(plan.out / "attention"):
        others["attention"] = "comparison_attention"
    for name in ("policy", *others):
        _evaluate(plan, plan.out / name, _seeds(PAIRED, plan.scale.paired), folder / name)
    for name, out in others.items():
        compared = ["--compare", folder / "policy", folder / name]
        plan.run("vipra_ros.cli", "evaluate", *compared, "--out", folder / out)


def live(plan: Plan) -> None:
    """The policy on the whole stack, in real time: camera, server, ROS 2, arms; with videos."""
    seeds = _seeds(HELD_OUT, plan.scale.held_out)
    _trials(plan, plan.out / "policy", seeds, plan.out / "evaluation" / "live", "--live")


def _seeds(first: int, count: int) -> str:
    return f"{first}:{first + count}"


def _evaluate(plan: Plan, policy: Path, seeds: str, out: Path) -> None:
    _trials(plan, policy, seeds, out, "--latency-ms", LATENCY_MS, "--no-video")


def _trials(plan: Plan, policy: Path, seeds: str, out: Path, *how: object) -> None:
    out.mkdir(parents=True, exist_ok=True)
    served = out / "served.yaml"
    threads = max((os.cpu_count() or 1) // 2, 1)  # the other half simulates
    how_served = {"checkpoint": str(policy), "dtype": "float32", "threads": threads, "noise_scale": NOISE}
    served.write_text(yaml.safe_dump(how_served))
    what = ["--policy", served, "--robot", plan.scale.robot, "--seeds", seeds, "--out", out]
    plan.run("vipra_ros.cli", "evaluate", plan.scale.task, *what, *how)


def _report(folder: Path) -> dict:
    path = folder / "report.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def summarise(plan: Plan) -> None:
    """summary.json and curves.png of what there is so far."""
    from training import sim_summary

    print(json.dumps(sim_summary.write(plan.out), indent=1))


STEPS: dict[str, Callable[[Plan], None]] = {
    "states": states,
    "videos": videos,
    "tokenizer": tokenizer,
    "gate": gate,
    "latent": latent,
    "labels": labels,
    "pretrain": pretrain,
    "demonstrations": demonstrations,
    "draft": draft,
    "corrections": corrections,
    "finetune": finetune,
    "scratch": scratch,
    "attention": attention,
    "choose": choose,
    "evaluate": evaluate,
    "live": live,
    "summary": summarise,
}


def shared(videos: tuple[tuple[str, int, int], ...], count: int) -> tuple[tuple[str, int, int], ...]:
    """About `count` videos in the same proportion."""
    total = sum(n for _, _, n in videos)
    return tuple((task, first, round(count * n / total)) for task, first, n in videos)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="vipra_sim_small: what two CPU cores can train")
    parser.add_argument(
        "--out", type=Path, help="folder of everything; default: runs/train-sim, runs/train-sim-small"
    )
    parser.add_argument("--only", nargs="+", choices=STEPS, help="these steps; default: all, in this order")
    parser.add_argument("--minutes", type=float, help="most time for one command of a step")
    parser.add_argument("--ignore-gate", action="store_true", help="go on with tokens that fail the gate")
    parser.add_argument("--videos", type=int, help="trials of the actionless videos")
    parser.add_argument(
        "--demonstrations", type=int, help="with the corrections; at most 200 for the comparison"
    )
    parser.add_argument("--corrections", type=int, help="of a draft's mistakes, of the demonstrations")
    parser.add_argument(
        "--size", type=int, help="px of the pictures kept; default: the camera's, 96: small enough to carry"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that play and draw"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="e.g. finetune.steps=500"
    )
    given = parser.parse_args()
    scale = SMALL if given.small else FULL
    if given.videos is not None:
        scale = replace(scale, videos=shared(scale.videos, given.videos))
    if given.demonstrations is not None:
        scale = replace(scale, demonstrations=given.demonstrations)
    if given.corrections is not None:
        scale = replace(scale, corrections=given.corrections)
    if not 0 <= scale.corrections < scale.demonstrations:
        parser.error(
            f"--corrections {scale.corrections}: fewer than the {scale.demonstrations} demonstrations: a "
            "draft learns from the others"
        )
    for text in given.set:
        if text.partition(".")[0] not in TRAINED or "=" not in text:
            parser.error(f"--set {text}: STAGE.KEY=VALUE is wanted, with a stage of {', '.join(TRAINED)}")
    out = given.out or Path("runs", f"train-{scale.recipes.replace('_', '-')}")
    plan = Plan(
        out.resolve(), scale, given.size, given.workers, given.minutes, tuple(given.set), given.ignore_gate
    )
    plan.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in given.only or STEPS:
            print(f"== {name}", flush=True)
            STEPS[name](plan)
    except OutOfTime as reason:
        print(f"{reason}: run again to go on", file=sys.stderr)
        return UNFINISHED
    except (TrainingError, ConfigError, EpisodesError) as error:
        print(f"vipra_sim: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
