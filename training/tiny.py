"""Every stage at tiny size, in sequence, from simulated demonstrations to a policy that serves.

    python -m training.tiny --out runs/train-tiny        (make train-tiny)

Simulated episodes (training.simulated), and other videos beside them -> tokenizer and latent actions (at the
same time) -> labels -> pretraining -> finetuning, each by the command a user would type. OUT then has
`summary.json` and `details.json` (measured on held-out simulated episodes), `pictures/` and `policy/` (the
checkpoint). Run it again after an interruption: what is finished stays, what was cut off goes on.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml

from config.dataset import DatasetConfig, Mixture
from config.loading import root
from config.training import VALIDATION_SHARE
from models.latent_action import folder as latent_folder
from models.latent_action.model import LatentActionModel, to_clip
from training import plots
from training.analysis.codes import codes_used
from training.analysis.probe import probe_nmse
from training.analysis.transitions import each_episode, read
from training.data.augment import prepare
from training.run import TrainingError, summary

BRIDGE = root().parent / "shared" / "data" / "bridge_v2_sample"
KINDS = ("both", "both", "both", "both", "circles")
STRIDE = 9  # frames at 15 Hz: the pictures change by more than .02 on average
SLOW = 3  # of the labels: 14 steps are 2.8 s
CLIP = 6  # frames, as latent_tiny
MOVED = 0.05  # a pixel that changes by more
BUDGET = {  # the recipes, cut to what two CPU cores do in under twenty minutes
    "tokenizer": ("steps=360", "validation.samples=64"),
    "latent": ("steps=550", "validation.samples=32"),
    "pretrain": ("steps=150", "global_batch=8", "micro_batch=8", "validation.samples=32", "log_every=10"),
    "finetune": (
        *("steps=250", "global_batch=16", "micro_batch=16", "samples=8", "schedule.warmup=30"),
        *("ema=0.98", "validation.samples=64", "log_every=10"),
    ),
}
LABELLED = 56  # of the episodes: a label takes as long as twenty frames of training
NAMES = {"tokenizer": "tokenizer", "latent": "latent", "pretrain": "pretrained", "finetune": "policy"}
LOSSES = {
    "tokenizer": ("l1", "quantisation"),
    "latent": ("pixel",),
    "pretrain": ("vision", "latent"),
    "finetune": ("loss", "validation/loss"),
}
PICTURES = {  # name in OUT/pictures -> the newest of these
    "tokens": "runs/tokenizer/images/reconstruction-*.png",
    "latent_actions": "runs/latent/images/reconstruction-*.png",
    "imagined": "runs/pretrain/images/now_future_imagined-*.png",
    "action_error": "runs/finetune/images/action_error-*.png",
    "open_loop": "runs/finetune/images/open_loop-*.png",
    "transfer": "analysis/transfer.png",
}


def done(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def together(commands: list[list[str]]) -> None:
    """Run commands of this project at once, sharing the cores. Raises TrainingError when one fails."""
    threads = str(max((os.cpu_count() or 1) // max(len(commands), 1), 1))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    running = [subprocess.Popen([sys.executable, "-m", *c], env=environment) for c in commands]
    try:
        failed = [c for c, process in zip(commands, running, strict=True) if process.wait()]
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if failed:
        raise TrainingError(f"{' '.join(failed[0])} did not finish: run this again to go on")


def datasets(demos: Path, videos: list[Path], strides: tuple[int, ...]) -> list[dict]:
    found = [{"path": str(demos), "stride": stride} for stride in strides]
    return found + [{"path": str(video), "weight": 0.25 * len(strides)} for video in videos]


@torch.no_grad()
def reconstruction(model: LatentActionModel, demos: Path) -> dict[str, float]:
    """L1 on the pixels that change by more than MOVED, of held-out episodes at STRIDE: the model's, and
    that of copying the last frame.
    """
    mixture = Mixture(
        datasets=(DatasetConfig(path=str(demos), stride=STRIDE),), validation_share=VALIDATION_SHARE
    )
    sums, moving, change = np.zeros(2), 0.0, []
    for _, _, episode in each_episode(mixture):
        at = np.arange(0, episode.length, STRIDE)
        frames = prepare(episode.frames(episode.views[0], at), model.config.image_size)
        clip = to_clip(torch.from_numpy(frames)[None], model.config.image_size)
        truth, last, drawn = clip[:, 1:], clip[:, :-1], model(clip).frames.clamp(0, 1)
        moved = ((truth - last).abs().amax(2, keepdim=True) > MOVED).float()
        sums += [float(((x - truth).abs().mean(2, keepdim=True) * moved).sum()) for x in (drawn, last)]
        moving += float(moved.sum())
        change.append(float((truth - last).abs().mean()))
    return {
        "reconstruction_l1": sums[0] / moving,
        "copy_last_l1": sums[1] / moving,
        "mean_change": float(np.mean(change)),
        "held_out_episodes": len(change),
    }


def measure_latent(out: Path) -> dict[str, float]:
    """Of the latent action model: reconstruction and codes on held-out episodes; the probe over all
    episodes, tested on those it was not fitted to.
    """
    model, _ = latent_folder.load(out / NAMES["latent"], "cpu")
    demos = (DatasetConfig(path=str(out / "demonstrations"), stride=STRIDE),)
    held = read(model, Mixture(datasets=demos, validation_share=VALIDATION_SHARE), CLIP, actions=None)
    steps = read(model, Mixture(datasets=demos), CLIP)
    nmse, shuffled = probe_nmse(steps.latents, steps.actions, steps.episodes)
    found = reconstruction(model, out / "demonstrations")
    return {"codes_used": codes_used(held.codes), **found, "probe_nmse": nmse, "shuffled_nmse": shuffled}


def measured(out: Path) -> tuple[dict[str, dict[str, float]], dict[str, dict]]:
    """(what summary.json holds, what else was measured)."""
    latent = measure_latent(out)
    more = {"latent": {key: latent.pop(key) for key in ("mean_change", "held_out_episodes")}}
    before, after = summary(out / "runs" / "pretrain")
    first, last = summary(out / "runs" / "finetune")
    runs = {"tokenizer": summary(out / "runs" / "tokenizer")[1], "pretrain": after, "finetune": last}
    for stage, values in runs.items():
        held = {key: v for key, v in values.items() if key.startswith("validation/")}
        more[stage] = {key.removeprefix("validation/"): v for key, v in held.items()}
    gate = out / "runs" / "tokenizer" / "gate.json"
    more["gate"] = json.loads(gate.read_text()) if gate.is_file() else {}
    transfer = json.loads((out / "analysis" / "transfer.json").read_text())
    wanted = ("clips", "steps", "transferred", "own", "target", "other_source")
    more["transfer"] = {key: transfer[key] for key in wanted}
    return {
        "latent": latent,
        "pretrain": {
            "image_loss_first": before["vision"],
            "image_loss_last": after["vision"],
            "latent_loss_first": before["latent"],
            "latent_loss_last": after["latent"],
        },
        "finetune": {
            "fm_loss_first": first["loss"],
            "fm_loss_last": last["loss"],
            "open_loop_mse": last["validation/action_mse"],
            "mean_action_mse": last["validation/mean_action_mse"],
        },
    }, more


def pictures(out: Path) -> None:
    """OUT/pictures: the last of each kind, and the losses of every stage."""
    folder = out / "pictures"
    folder.mkdir(exist_ok=True)
    for name, pattern in PICTURES.items():
        if found := sorted(out.glob(pattern)):
            shutil.copyfile(found[-1], folder / f"{name}.png")
    curves = {}
    for stage, names in LOSSES.items():
        entries = [json.loads(line) for line in (out / "runs" / stage / "metrics.jsonl").open()]
        curves[stage] = {n: [(e["step"], e[n]) for e in entries if n in e] for n in names}
    plots.losses(curves).savefig(folder / "losses.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--robot", default="sim_bimanual", help="file in config/robots, or a path")
    parser.add_argument("--embodiment", default="franka_bimanual", help="file in config/embodiments")
    parser.add_argument("--out", type=Path, default=Path("runs/train-tiny"), help="folder of everything")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--frames", type=int, default=60, help="of an episode")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="motions, in turn (training.simulated)")
    parser.add_argument(
        "--video",
        type=Path,
        action="append",
        help="further videos for stages 0 to 2 (default: Bridge's sample)",
    )
    parser.add_argument(
        "--label-episodes", type=int, default=LABELLED, help="label the first n generated episodes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="e.g. finetune.steps=50"
    )
    args = parser.parse_args()
    for text in args.set:
        if text.partition(".")[0] not in NAMES or "=" not in text:
            parser.error(f"--set {text}: STAGE.KEY=VALUE is wanted, with a stage of {', '.join(NAMES)}")
    out, demos = args.out, args.out / "demonstrations"
    videos = args.video if args.video is not None else [BRIDGE] * BRIDGE.is_dir()

    # a process of its own: MuJoCo's renderer and torch do not share one
    size = ["--episodes", str(args.episodes), "--steps", str(args.frames), "--seed", str(args.seed)]
    make = ["training.simulated", "--robot", args.robot, *size, "--kinds", *args.kinds, "--out", str(demos)]
    seconds = {}

    def timed(what: str, commands: list[list[str]]) -> None:
        begun = time.monotonic()
        together(commands)
        seconds[what] = round(time.monotonic() - begun, 1)

    timed("demonstrations", [make])

    def train(stage: str, *options: str, data: list[dict] | None = None) -> list[list[str]]:
        """The command of a stage, or nothing where it is finished."""
        if done(out / NAMES[stage]):
            return []
        changes = [f"seed={args.seed}"]
        if data:
            changes += [f"data={json.dumps({'datasets': data, 'validation_share': VALIDATION_SHARE})}"]
        asked = [text.partition(".")[2] for text in args.set if text.startswith(f"{stage}.")]
        changes += [*BUDGET[stage], *asked]
        given = [item for change in changes for item in ("--set", change)]
        place = ["--out", str(out / NAMES[stage]), "--run", str(out / "runs" / stage)]
        return [["vipra_ros.cli", "train", stage, f"{stage}_tiny", *place, *options, *given]]

    frames = train("tokenizer", data=datasets(demos, videos, (1,)))
    timed("tokenizer and latent", frames + train("latent", data=datasets(demos, videos, (STRIDE, SLOW))))
    tokenizer = ["--tokenizer", str(out / NAMES["tokenizer"])]
    if not done(out / "labels"):
        mixture = out / "label.yaml"
        chosen = datasets(demos, videos, (SLOW,))
        chosen[0] |= {"max_episodes": args.label_episodes}
        mixture.write_text(yaml.safe_dump({"datasets": chosen}))
        sources = ["--mixture", str(mixture), "--latent", str(out / NAMES["latent"]), *tokenizer]
        spread = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vipra_ros.cli"]
        timed("label", [[*spread, "label", *sources, "--out", str(out / "labels")]])
    timed("pretrain", train("pretrain", "--labels", str(out / "labels"), *tokenizer))
    start = ("--start", str(out / NAMES["pretrain"]), "--embodiment", args.embodiment)
    timed("finetune", train("finetune", "--data", str(demos), *start))
    look = ["--model", str(out / NAMES["latent"]), "--data", str(demos), "--stride", str(STRIDE)]
    look += ["--held-out", str(VALIDATION_SHARE), "--out", str(out / "analysis")]
    timed("transfer", [["vipra_ros.cli", "analyze", "transfer", *look]])
    found, more = measured(out)
    pictures(out)
    (out / "details.json").write_text(json.dumps({**more, "seconds": seconds}, indent=1))
    (out / "summary.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
