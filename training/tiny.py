"""Every stage at tiny size, in sequence, from simulated demonstrations to a policy that serves.

    python -m training.tiny --out runs/train-tiny

Simulated episodes (training.simulated) -> tokenizer -> latent actions -> labels -> pretraining ->
finetuning, with the commands a user would type. `OUT/summary.json` holds what was measured,
`OUT/policy` is the checkpoint. Run it again after an interruption: finished stages are kept.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from training import cli, label
from training.run import TrainingError, summary

STAGES = ("tokenizer", "latent", "pretrain", "finetune")


def done(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def simulate(robot: str, episodes: int, frames: int, seed: int, out: Path) -> None:
    """A process of its own: MuJoCo's renderer and torch do not share one."""
    if (out / "meta" / "info.json").is_file():
        return
    command = [sys.executable, "-m", "training.simulated", "--format", "lerobot", "--robot", robot]
    command += ["--episodes", str(episodes), "--steps", str(frames), "--seed", str(seed), "--out", str(out)]
    subprocess.run(command, check=True)


def measured(out: Path) -> dict[str, dict[str, float]]:
    """First and last numbers of every stage, from the run folders."""
    runs = {stage: summary(out / "runs" / stage) for stage in STAGES}
    latent, (before, after) = runs["latent"][1], runs["pretrain"]
    first, last = runs["finetune"]
    return {
        "latent": {
            "codes_used": latent["codes_used"],
            "reconstruction_l1": latent["validation/reconstruction_moving"],
            "copy_last_l1": latent["validation/copy_moving"],
        },
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
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--robot", default="sim_bimanual", help="file in config/robots, or a path")
    parser.add_argument("--embodiment", default="franka_bimanual", help="file in config/embodiments")
    parser.add_argument("--out", type=Path, default=Path("runs/train-tiny"), help="folder of everything")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--frames", type=int, default=60, help="of an episode")
    parser.add_argument("--video", action="append", default=[], help="further videos for stages 0 to 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="e.g. finetune.steps=50"
    )
    args = parser.parse_args()
    out, demos = args.out, args.out / "demonstrations"
    simulate(args.robot, args.episodes, args.frames, args.seed, demos)
    videos = [item for path in (str(demos), *args.video) for item in ("--data", path)]

    def train(stage: str, *options: str) -> None:
        if done(out / NAMES[stage]):
            return
        changes = [f"seed={args.seed}"]
        changes += [text.partition(".")[2] for text in args.set if text.startswith(f"{stage}.")]
        command = [stage, f"{stage}_tiny", "--out", str(out / NAMES[stage]), *options]
        command += ["--run", str(out / "runs" / stage)]
        if cli.main([*command, *(item for change in changes for item in ("--set", change))]):
            raise TrainingError(f"vipra train {' '.join(command)} failed")
        if not done(out / NAMES[stage]):
            raise SystemExit(0)  # stopped by a signal

    tokenizer = ("--tokenizer", str(out / NAMES["tokenizer"]))
    train("tokenizer", *videos)
    train("latent", *videos)
    if not done(out / "labels"):
        label.main(
            [*videos, "--latent", str(out / NAMES["latent"]), *tokenizer, "--out", str(out / "labels")]
        )
    train("pretrain", "--labels", str(out / "labels"), *tokenizer)
    start = ("--start", str(out / NAMES["pretrain"]), "--embodiment", args.embodiment)
    train("finetune", "--data", str(demos), *start)
    found = measured(out)
    (out / "summary.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


NAMES = {"tokenizer": "tokenizer", "latent": "latent", "pretrain": "pretrained", "finetune": "policy"}

if __name__ == "__main__":
    main()
