"""Released files in, a checkpoint folder out; the same command again goes on where it was interrupted."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from config.embodiment import Embodiment
from config.loading import find, load
from models import folder as folders
from models.checkpoint import check_parts, compact, texts, write
from models.config import SIZES
from models.convert import ConvertError, lwm, sentencepiece, statistics, vipra, vqgan
from models.convert.lwm import Plan
from models.convert.streaming import Stream
from models.folder import FORMAT, Weights

HELP = """\
released files:
  lwm    Hugging Face LargeWorldModel/LWM-Chat-1M-Jax: params, vqgan, tokenizer.model
         -> starts `vipra train pretrain`; latent-action table and head begin random
  vipra  Hugging Face vipra-project/vipra-7b-pretrained: vipra_params, and the same vqgan and tokenizer.model
         -> `vipra imagine`, `vipra train finetune`; it has no action heads, so `vipra serve` refuses it
         and outputs/EXPERIMENT/streaming_train_state as the official finetuning script writes it
         -> `vipra serve`; needs --embodiment and --statistics
  vqgan  the file vqgan of either -> a frame tokenizer for `vipra train ... --tokenizer`
  laq    Hugging Face vipra-project/vipra-laq, the PyTorch file -> `vipra label`, `vipra analyze`

  hf download LargeWorldModel/LWM-Chat-1M-Jax --local-dir lwm
  vipra convert lwm lwm checkpoints/lwm
"""
SOURCES = {  # names under which the weights are released, in a folder given instead of a file
    "lwm": ("params", "streaming_params"),
    "vipra": ("vipra_params", "streaming_train_state", "streaming_params", "params"),
}


@contextlib.contextmanager
def bar() -> Iterator[folders.Progress]:
    """A progress bar on stderr, for `models.folder.write` and others."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield advance


def find_file(given: Path | None, source: Path, names: tuple[str, ...], option: str) -> Path:
    """`given`, else the one of `names` in the folder of `source`. Raises ConvertError."""
    if given is not None and not given.is_dir():
        found = [given] if given.is_file() else []
    else:
        folder = given or (source if source.is_dir() else source.parent)
        found = [folder / name for name in names if (folder / name).is_file()]
    if len(found) != 1:
        what = "no file" if not found else f"{len(found)} candidates"
        raise ConvertError(
            f"{given or source}: {what} ({', '.join(names)}): name the file {option}".replace("  ", " ")
        )
    return found[0]


def describe(path: Path, progress: folders.Progress | None) -> dict:
    """Size and SHA-256 of a released file."""
    size, done, sha = path.stat().st_size, 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
            done += len(block)
            if progress:
                progress(f"checking {path.name}", done, size)
    return {"bytes": size, "sha256": sha.hexdigest()}


def convert(
    verb: str,
    source: Path,
    out: Path,
    vqgan_file: Path | None = None,
    tokenizer_file: Path | None = None,
    embodiment: str | None = None,
    statistics_file: Path | None = None,
    gripper: str = "opening",
    heads: int | None = None,
    image_size: int = 256,
    rope: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    shard_bytes: int = folders.SHARD_BYTES,
    progress: folders.Progress | None = None,
) -> tuple[str, Plan]:
    """verb lwm or vipra: write the checkpoint `out`, return its hash and what was done. Raises ConvertError,
    CheckpointError, ModelConfigError, ConfigError.
    """
    folders.require_replaceable(out)
    params = find_file(source, source, SOURCES[verb], "itself")
    vqgan_file = find_file(vqgan_file, source, ("vqgan",), "with --vqgan")
    tokenizer_file = find_file(
        tokenizer_file, source, ("tokenizer.model", "tokenizer.json"), "with --tokenizer"
    )
    frames, frame_weights = vqgan.read(vqgan_file, image_size)
    words = sentencepiece.read(tokenizer_file)
    robot = load(Embodiment, embodiment) if embodiment else None
    with Stream(params) as stream:
        if verb == "lwm":
            plan = lwm.plan(stream, frames, heads)
        else:
            plan = vipra.plan(stream, frames, heads, robot and robot.horizon)
        if rope:
            plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, rope_precision=rope))
        normalizer, text = _robot_parts(plan, robot, embodiment, statistics_file, gripper)
        check_parts(plan.config, words, normalizer, text, None)
        files = {path.name: describe(path, progress) for path in (params, vqgan_file, tokenizer_file)}
        origin = {
            "verb": verb,
            "files": files,
            "random": {"seed": seed, "tensors": plan.fresh} if plan.fresh else None,
            "ignored": plan.ignored,
        }
        weights = plan.weights(seed, dtype)
        parts = texts(words, normalizer, text) | {"source.json": json.dumps(origin, indent=1)}
        identity = json.dumps([origin, plan.config.to_dict(), str(weights.dtype), shard_bytes, FORMAT])
        digest = write(
            out, plan.config, weights, compact(frame_weights), parts, shard_bytes, identity, progress
        )
    return digest, plan


def _robot_parts(plan: Plan, robot: Embodiment | None, name, statistics_file, gripper: str):
    """Normalizer and embodiment text of a policy that acts, None for both otherwise."""
    if plan.config.action_heads == "none":
        if robot or statistics_file:
            raise ConvertError(
                f"{plan.source.stream.path} has no action heads: leave --embodiment and --statistics out"
            )
        return None, None
    if not (robot and statistics_file):
        raise ConvertError(
            f"{plan.source.stream.path} is finetuned for {plan.config.action_dim} action dimensions: name "
            "the robot with --embodiment and its action_stats.json with --statistics"
        )
    if robot.action_dim != plan.config.action_dim:
        raise ConvertError(
            f"embodiment {robot.name} has {robot.action_dim} dimensions, "
            f"{plan.source.stream.path} was finetuned for {plan.config.action_dim}"
        )
    normalizer = statistics.read(statistics_file, robot, gripper)
    kinds = tuple(dimension.kind for dimension in robot.dimensions)
    if (normalizer.names, normalizer.kinds) != (robot.names, kinds):
        raise ConvertError(f"{statistics_file} is for {normalizer.names}, {robot.name} has {robot.names}")
    return normalizer, find("embodiments", name).read_text()


def convert_vqgan(
    source: Path,
    out: Path,
    tokenizer_file: Path | None = None,
    image_size: int = 256,
    progress: folders.Progress | None = None,
) -> str:
    """A frame tokenizer and vocabulary without a policy, for training from scratch. Returns the hash."""
    path = find_file(source, source, ("vqgan",), "itself")
    tokenizer_file = find_file(
        tokenizer_file, source, ("tokenizer.model", "tokenizer.json"), "with --tokenizer"
    )
    frames, tensors = vqgan.read(path, image_size)
    words = sentencepiece.read(tokenizer_file)
    config = dataclasses.replace(
        SIZES["vipra_7b"], vqgan=frames, vision_vocab=frames.codebook_size + 256, action_heads="none"
    )
    origin = {"verb": "vqgan", "files": {p.name: describe(p, progress) for p in (path, tokenizer_file)}}
    parts = {
        "config.json": json.dumps({"format": FORMAT, "model": config.to_dict()}, indent=1),
        "source.json": json.dumps(origin, indent=1),
        **texts(words, None, None),
    }
    weights: Weights = compact(tensors)
    return folders.write(out, {"vqgan.safetensors": weights}, parts, progress=progress)


def main(argv: list[str] | None = None) -> int:
    """`vipra convert`, `python -m models.convert.cli`."""
    parser = argparse.ArgumentParser(
        prog="vipra convert",
        description=__doc__,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="lwm|vipra|vqgan|laq")
    for verb, text in (
        ("lwm", "LWM-Chat-1M-Jax, the model that pretraining starts from"),
        ("vipra", "ViPRA pretrained, or finetuned by the official script"),
        ("vqgan", "the frame tokenizer alone"),
    ):
        sub = verbs.add_parser(
            verb,
            help=text,
            description=text,
            epilog=HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("source", type=Path, help="the downloaded folder, or the file with the weights")
        sub.add_argument("out", type=Path, help="checkpoint folder to write; a checkpoint there is replaced")
        sub.add_argument(
            "--tokenizer",
            type=Path,
            metavar="FILE",
            help="LLaMA's tokenizer.model (or a tokenizer.json), where it is not beside the source",
        )
        sub.add_argument("--image-size", type=int, default=256, help="px, of the VQGAN (default: 256)")
        if verb == "vqgan":
            continue
        sub.add_argument("--vqgan", type=Path, metavar="FILE", help="where it is not beside the source")
        sub.add_argument("--heads", type=int, help="attention heads (default: hidden size / 128)")
        sub.add_argument(
            "--rope",
            choices=("fp32", "bf16"),
            help="precision of rotary angles; default as trained: LWM fp32, ViPRA bf16",
        )
        sub.add_argument(
            "--dtype", choices=("bfloat16", "float32"), help="of the weights written (default: the file's)"
        )
        sub.add_argument(
            "--shard-mb",
            type=int,
            default=folders.SHARD_BYTES >> 20,
            help="largest file to write, MiB; an interrupted run loses at most one (default: %(default)s)",
        )
        sub.add_argument("--seed", type=int, default=0, help="of tensors that the file lacks")
    sub = verbs.choices["vipra"]
    sub.add_argument(
        "--embodiment", metavar="NAME|FILE", help="finetuned: the robot, as in config/embodiments"
    )
    sub.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help='finetuned: action_stats.json ({"mean": [D], "std": [D]}) of the official script, '
        "or a normalization.json of ours",
    )
    sub.add_argument(
        "--gripper",
        choices=("opening", "signed"),
        default="opening",
        help="finetuned: recorded gripper; opening: 0 closed to 1 open, signed: -1 closed to 1 open",
    )
    verbs.add_parser(
        "laq", add_help=False, help="the latent action model (options: vipra convert laq --help)"
    )
    options, rest = parser.parse_known_args(argv)
    if options.verb == "laq":
        from models.convert.laq import main as run

        return run(rest)
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if options.verb == "vqgan":
        with bar() as progress:
            digest = convert_vqgan(
                options.source, options.out, options.tokenizer, options.image_size, progress
            )
        print(f"{options.out}: frame tokenizer, hash {digest[:12]}")
        return 0
    if options.shard_mb < 1:
        parser.error("--shard-mb must be at least 1")
    with bar() as progress:
        digest, plan = convert(
            options.verb,
            options.source,
            options.out,
            options.vqgan,
            options.tokenizer,
            getattr(options, "embodiment", None),
            getattr(options, "statistics", None),
            getattr(options, "gripper", "opening"),
            options.heads,
            options.image_size,
            options.rope,
            options.dtype and getattr(torch, options.dtype),
            options.seed,
            options.shard_mb << 20,
            progress,
        )
    _report(options.out, digest, plan)
    return 0


def _report(out: Path, digest: str, plan: Plan) -> None:
    config = plan.config
    for top, count in plan.ignored.items():
        print(f"ignored, not weights: {top} ({count} arrays)")
    for name in plan.fresh:
        print(f"not in the file, begins random: {name}")
    print(f"{out}: {config.name}, {config.layers} layers, RoPE {config.rope_precision}, hash {digest[:12]}")
    if config.action_heads == "none":
        print("no action heads: `vipra serve` needs it finetuned first (vipra train finetune)")


if __name__ == "__main__":
    raise SystemExit(main())
