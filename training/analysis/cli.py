"""`vipra analyze codes|transfer|smoothness|information`: a figure and a JSON each."""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from config.dataset import Mixture
from training.analysis.arrays import AnalysisError

if TYPE_CHECKING:  # loaded when a command runs
    from matplotlib.figure import Figure

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="See what trained models have learned. Each command writes NAME.png and NAME.json to --out "
    "(docs/analysis.md says how to read them).",
)

Out = Annotated[Path, typer.Option("--out", help="folder of the figure and the JSON")]
Data = Annotated[
    str | None,
    typer.Option("--data", help="dataset folder that `vipra data check` reads, or a mixture's YAML"),
]
Model = Annotated[Path, typer.Option("--model", help="latent action model: folder from `vipra train latent`")]
Episodes = Annotated[int | None, typer.Option(min=1, help="use the first so many of each dataset")]
Stride = Annotated[int | None, typer.Option(min=1, help="frames of one step (default: the dataset's)")]
HeldOut = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="only the episodes that training with this validation_share left out"),
]
ClipFrames = Annotated[int, typer.Option(min=2, help="frames the encoder sees at once, as in its training")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option()]
Grippers = Annotated[
    list[int] | None,
    typer.Option("--gripper", help="action dimension (from 0) that is a gripper; default: those so named"),
]


@app.command()
def codes(
    out: Out,
    model: Annotated[Path | None, typer.Option(help="latent action model folder")] = None,
    data: Data = None,
    labels: Annotated[Path | None, typer.Option(help="instead: folder that `vipra label` wrote")] = None,
    direction: Annotated[bool, typer.Option(help="compare directions of motion (reads the frames)")] = True,
    clip_frames: ClipFrames = 8,
    stride: Stride = None,
    held_out: HeldOut = None,
    episodes: Episodes = None,
    device: Device = "auto",
) -> None:
    """Which codes are used at which position, and how that differs between directions (figure 4).

    vipra analyze codes --model checkpoints/latent --data VIDEOS --out analysis
    """
    from training.analysis import codes as measure
    from training.analysis import figures, transitions
    from training.analysis import labels as labelled

    if (labels is None) == (model is None) or (model is None) != (data is None):
        raise AnalysisError("give --model and --data, or --labels alone")
    with _bar("reading") as tick:
        if labels:
            found = labelled.read(labels, episodes, direction, tick)
            used, size, motion = found.codes, found.codebook_size, found.motion
            about = {"labels": str(labels)}
        else:
            network, about = _latent(model, device)
            mixture = _mixture(data, stride, held_out)
            steps = transitions.read(
                network, mixture, clip_frames, None, motion=direction, limit=episodes, tick=tick
            )
            used, size, motion = steps.codes, network.config.codebook_size, steps.motion
            about |= {"data": data, "skipped": steps.skipped}
    numbers = measure.summary(used, size)
    groups = {}
    if motion is not None:
        names = measure.directions(motion)
        groups = measure.differences(used, size, names)
        numbers["directions"] = {name: int((names == name).sum()) for name in measure.DIRECTIONS}
    _write(out, "codes", {**about, **numbers, "differences": groups}, figures.codes(numbers, groups))
    shown = [f"{g['rms'] / g['shuffled_rms']:.1f} x chance for {t}" for t, g in groups.items() if "rms" in g]
    typer.echo(
        f"{numbers['codes_used']} of {size} codes used in {len(used)} steps, "
        f"{numbers['entropy_bits']:.2f} bits a code; usage differs by direction: "
        f"{', '.join(shown) or 'not compared'}"
    )


@app.command()
def transfer(
    out: Out,
    model: Model,
    data: Data,
    frames: Annotated[int, typer.Option(min=2, help="of a clip (figure 5: 5)")] = 5,
    stride: Stride = None,
    held_out: HeldOut = None,
    episodes: Episodes = 64,
    rows: Annotated[int, typer.Option(min=1, help="pairs on the contact sheet")] = 3,
    device: Device = "auto",
) -> None:
    """Latent actions of one clip decoded from another's first frame (figure 5), and whether that moves the
    source's way.

    vipra analyze transfer --model checkpoints/latent --data VIDEOS --stride 3 --out analysis
    """
    from training.analysis import figures
    from training.analysis import transfer as measure

    network, about = _latent(model, device)
    with _bar("looking for motion") as tick:
        clips = measure.moving_clips(
            _mixture(data, stride, held_out), network.config.image_size, frames, episodes, tick
        )
    numbers, rolled, targets = measure.transfer(network, clips)
    lines = []
    against = (clips.motion * clips.motion[targets]).sum(1)
    for i in np.argsort(against)[:rows]:  # the clearest pairs
        lines += [
            (f"{clips.names[i][-14:]}\nsource", clips.frames[i]),
            (f"{clips.names[targets[i]][-14:]}\ntarget", clips.frames[targets[i]]),
            ("source's latents\nfrom target's first", rolled[i]),
        ]
    moved, chance, own = (numbers[k]["mean_cosine"] for k in ("transferred", "other_source", "own"))
    said = f"cosine with the source's motion {moved:+.2f} (chance {chance:+.2f}, own clip {own:+.2f})"
    _write(out, "transfer", {**about, "data": data, **numbers}, figures.transfer(lines, said))
    typer.echo(f"{numbers['clips']} clips of {frames} frames: {said}")


@app.command()
def smoothness(
    out: Out,
    data: Data = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="[NAME=]FOLDER", help="checkpoint to replay on --data; repeat"),
    ] = None,
    recorded: Annotated[
        list[str] | None,
        typer.Option(
            "--actions",
            metavar="[NAME=]PATH",
            help="actions as they were: .npy (T, D) or (episodes, T, D), or a dataset folder; repeat",
        ),
    ] = None,
    execute: Annotated[
        list[int] | None, typer.Option(help="actions of each chunk that run; repeat (default: half, all)")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="actions a second, where only --actions is given")
    ] = None,
    deltas: Annotated[
        bool, typer.Option("--deltas", help="actions are changes of the pose: sum them")
    ] = False,
    gripper: Grippers = None,
    held_out: HeldOut = None,
    episodes: Episodes = 4,
    task: Annotated[str | None, typer.Option(help="instead of the episodes' instructions")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the policy's noise")] = 0,
    device: Device = "auto",
) -> None:
    """Jerk, spikes and spectral arc length of policies replayed on a dataset (figures 6 and 8).

    vipra analyze smoothness --data DEMOS --policy flow=checkpoints/mine --policy discrete=checkpoints/mine_ar
    --out analysis
    """
    from training.analysis import compare, figures

    if policy and not data:
        raise AnalysisError("--policy needs --data: the episodes whose pictures it is shown")
    if not data and not recorded:
        raise AnalysisError("give --data with the demonstrations, --actions, or both")
    with _bar("replaying") as tick:
        found = compare.collect(
            _mixture(data, None, held_out) if data else None,
            [_named(p) for p in policy or ()],
            [_named(p) for p in recorded or ()],
            compare.Options(
                tuple(execute or ()), rate, deltas, gripper, episodes, task, seed, _device(device)
            ),
            tick,
        )
    numbers = compare.measure(found)
    traces = {name: sequences[0] for name, sequences in found.positions.items()}
    figure = figures.smoothness(traces, numbers, found.names, found.rate_hz)
    about = {"data": data, "rate_hz": found.rate_hz, "names": found.names, "hashes": found.hashes}
    about |= {"deltas": deltas, "seed": seed, "skipped": found.skipped}
    _write(out, "smoothness", {**about, "measured": numbers}, figure)
    for name, m in numbers.items():
        typer.echo(
            f"{name}: jerk {m['jerk_rms']:.3g}, {m['spikes_per_100_actions']:.1f} spikes in 100 actions, "
            f"spectral arc length {m['spectral_arc_length']:.2f}"
        )


@app.command()
def information(
    out: Out,
    model: Annotated[
        list[str],
        typer.Option("--model", metavar="[NAME=]FOLDER", help="latent action model; repeat to compare"),
    ],
    data: Data,
    actions: Annotated[
        Literal["absolute", "deltas"],
        typer.Option(help="what the dataset's actions are: poses (their change counts), or changes"),
    ] = "absolute",
    gripper: Grippers = None,
    clip_frames: ClipFrames = 8,
    stride: Stride = None,
    held_out: HeldOut = None,
    episodes: Episodes = None,
    seeds: Annotated[int, typer.Option(min=1, help="repeats of the estimators")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="of the neural estimators (MVP-LAM: 8000)")] = 1000,
    width: Annotated[int, typer.Option(min=1, help="of their layers (MVP-LAM: 1024)")] = 128,
    depth: Annotated[int, typer.Option(min=1, help="layers (MVP-LAM: 4)")] = 2,
    device: Device = "auto",
) -> None:
    """How much latent actions know of the actions: mutual information and linear probe (MVP-LAM, appendix B).

    vipra analyze information --model checkpoints/latent --data DEMOS --actions deltas --out analysis
    """
    from training.analysis import codes as usage
    from training.analysis import figures, transitions
    from training.analysis import information as estimate
    from training.analysis.probe import probe_nmse

    network = estimate.Network(width, depth, steps)
    found = {}
    for name, folder in map(_named, model):
        latent, about = _latent(folder, device)
        with _bar(f"encoding with {name}") as tick:
            mixture, known = _mixture(data, stride, held_out), None if gripper is None else tuple(gripper)
            read = transitions.read(latent, mixture, clip_frames, actions, known, limit=episodes, tick=tick)
        trio = read.latents, read.actions, read.episodes
        nmse, shuffled = probe_nmse(*trio)
        bits = {}
        with _bar(f"estimating for {name}") as tick:
            for estimator in ("ksg", "barber_agakov", "mine"):
                runs = []
                for seed in range(seeds):
                    if estimator == "ksg":
                        runs.append(estimate.ksg(*trio[:2], seed=seed))
                    else:
                        runs.append(getattr(estimate, estimator)(*trio, network, seed))
                    tick(len(bits) * seeds + seed + 1, 3 * seeds)
                true, apart = (np.array([getattr(r, k) for r in runs]) for k in ("bits", "shuffled_bits"))
                bits[estimator] = {
                    "mean": float(true.mean()),
                    "std": float(true.std()),
                    "shuffled_mean": float(apart.mean()),
                    "shuffled_std": float(apart.std()),
                }
        summary = usage.summary(read.codes, latent.config.codebook_size)
        found[name] = {
            **about,
            "samples": len(read.codes),
            "episodes": int(read.episodes.max()) + 1,
            "skipped": read.skipped,
            "bits": bits,
            "probe_nmse": nmse,
            "shuffled_nmse": shuffled,
            "inverse_nmse": probe_nmse(read.actions, read.latents, read.episodes)[0],
            **{k: summary[k] for k in ("codes_used", "step_entropy_bits", "step_entropy_limit_bits")},
        }
    options = {"actions": actions, "seeds": seeds, "network": dataclasses.asdict(network)}
    _write(out, "information", {"data": data, **options, "models": found}, figures.information(found))
    for name, m in found.items():
        shown = ", ".join(f"{e} {v['mean']:.2f} ({v['shuffled_mean']:+.2f})" for e, v in m["bits"].items())
        typer.echo(
            f"{name}: probe NMSE {m['probe_nmse']:.3f} (shuffled {m['shuffled_nmse']:.3f}); "
            f"bits (shuffled): {shown}"
        )


# what the commands share


def _named(given: str | Path) -> tuple[str, Path]:
    """NAME=PATH, or a path whose last part is the name."""
    name, found, path = str(given).partition("=")
    return (name, Path(path)) if found else (Path(given).stem, Path(given))


def _mixture(data: str, stride: int | None, held_out: float | None) -> Mixture:
    """What `--data` names; all of its episodes unless `held_out` is given."""
    from training.data.cli import mixture

    found = mixture(data)
    configs = tuple(c if stride is None else c.model_copy(update={"stride": stride}) for c in found.datasets)
    return found.model_copy(update={"datasets": configs, "validation_share": held_out or 0.0})


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise AnalysisError("--device cuda: torch sees no GPU here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _latent(path: Path, device: str):
    """(model, {model, hash}) of a folder. Raises CheckpointError."""
    from models.latent_action import folder

    model, digest = folder.load(path, _device(device))
    return model, {"model": str(path), "hash": digest}


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def _write(out: Path, name: str, numbers: dict, figure: "Figure") -> None:
    """NAME.png, then NAME.json: where the JSON is, both are whole."""
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / f"{name}.png", dpi=120)
    part = out / f"{name}.json.part"
    part.write_text(json.dumps(numbers, indent=1, ensure_ascii=False))
    os.replace(part, out / f"{name}.json")


def main(argv: list[str]) -> int:
    """Exit status of `vipra analyze ARGV`. Raises AnalysisError, DataError, ConfigError, CheckpointError."""
    try:
        app(argv, prog_name="vipra analyze")
    except SystemExit as done:
        return done.code or 0
    return 0
