"""`vipra data check` and `vipra data preview`."""

import argparse
import json
import os
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from config.dataset import DatasetConfig, Mixture
from config.loading import load
from training.data.check import Report, check, contact_sheet
from training.data.episode import DataError
from training.data.open import open_dataset

EPILOG = """\
A dataset is a folder (LeRobotDataset v3.0, RLDS/TFDS shards, LIBERO HDF5, Something-Something v2, videos or
folders of frames: told from its files) or a YAML file, or its name in config/datasets, with several of them:

  datasets:
    - {path: ~/data/bridge, weight: 2, views: [image_0]}
    - {path: ~/data/ssv2, split: trainval, stride: 2}

  vipra data check ~/data/bridge
  vipra data check my_mixture.yaml --json report.json
  vipra data preview ~/data/bridge --out bridge.png
"""
_SHOWN = 12  # broken files listed in the table


def main(argv: list[str] | None = None) -> int:
    """0 if all is well, 1 if an episode is unreadable. Raises DataError, ConfigError."""
    parser = argparse.ArgumentParser(
        prog="vipra data",
        description="Look at datasets before training on them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser(
        "check", help="counts, lengths, rates, resolutions, broken files, NaN, constant dimensions"
    )
    one.add_argument("dataset", metavar="FOLDER|SPEC")
    one.add_argument(
        "--every-frame", action="store_true", help="decode every picture, not the first and last"
    )
    one.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    two = verbs.add_parser("preview", help="a contact sheet: moments of random episodes")
    two.add_argument("dataset", metavar="FOLDER|SPEC")
    two.add_argument(
        "--out", type=Path, default=Path("preview.png"), help="picture to write (default: %(default)s)"
    )
    two.add_argument("--episodes", type=int, default=8, help="rows (default: %(default)s)")
    two.add_argument("--frames", type=int, default=8, help="columns (default: %(default)s)")
    two.add_argument("--size", type=int, default=128, help="px of a frame (default: %(default)s)")
    two.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    configs = mixture(arguments.dataset).datasets
    return _check(configs, arguments) if arguments.verb == "check" else _preview(configs, arguments)


def mixture(dataset: str) -> Mixture:
    """What a command line names: a folder, a YAML file, or a name in config/datasets."""
    if Path(dataset).expanduser().is_dir():
        return Mixture(datasets=(DatasetConfig(path=dataset),))
    if os.sep in dataset and not dataset.endswith((".yaml", ".yml")):
        raise DataError(f"{dataset}: no such folder")
    return load(Mixture, dataset)


def _check(configs: tuple[DatasetConfig, ...], arguments: argparse.Namespace) -> int:
    console = Console()
    reports = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for config in configs:
            bar = progress.add_task(Path(config.path).name, total=None)
            tick = lambda done, total, bar=bar: progress.update(bar, completed=done, total=total)  # noqa: E731
            reports.append(check(config, arguments.every_frame, tick))
    for report in reports:
        console.print(_table(report))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        part = arguments.json.with_suffix(".part")
        part.write_text(json.dumps([r.to_json() for r in reports], indent=2, ensure_ascii=False))
        os.replace(part, arguments.json)
    return int(any(report.broken for report in reports))


def _table(report: Report) -> Table:
    table = Table(title=report.path, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("episodes", f"{report.episodes} readable, {len(report.broken)} broken")
    if report.lengths:
        low, middle, high = report.lengths
        table.add_row("frames", f"{report.frames} ({low} to {high} an episode, median {middle})")
        table.add_row("time", f"{report.seconds / 3600:.2f} h")
    if report.too_short:
        table.add_row("[yellow]too short", f"{report.too_short} episodes, skipped in training")
    table.add_row("rate", ", ".join(f"{rate}/s: {n}" for rate, n in report.rates_hz.items()))
    for view, sizes in report.resolutions.items():
        table.add_row(f"view {view}", ", ".join(f"{size}: {n}" for size, n in sizes.items()))
    table.add_row("instructions", f"{report.instructions} different, {report.uninstructed} episodes without")
    for kind, found in (("state", report.state_dimensions), ("actions", report.action_dimensions)):
        table.add_row(kind, " and ".join(f"{d} dimensions" for d in found) or "none")
    names = report.action_names or [str(i) for i in range(len(report.action_min or ()))]
    for name, low, high in zip(names, report.action_min or (), report.action_max or (), strict=False):
        table.add_row(f"  {name}", f"{low:.4g} to {high:.4g}" + (" [yellow]constant" if low == high else ""))
    for name, message in report.broken[:_SHOWN]:
        table.add_row("[red]broken", f"{name}: {message}")
    if len(report.broken) > _SHOWN:
        table.add_row("[red]broken", f"... and {len(report.broken) - _SHOWN} more (--json lists them)")
    return table


def _preview(configs: tuple[DatasetConfig, ...], arguments: argparse.Namespace) -> int:
    console = Console()
    status = 0
    for number, config in enumerate(configs):
        sheet, errors = contact_sheet(
            open_dataset(config), config, arguments.episodes, arguments.frames, arguments.size, arguments.seed
        )
        out = arguments.out
        if len(configs) > 1:
            out = out.with_stem(f"{out.stem}_{number}_{Path(config.path).name}")
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out)
        console.print(f"{out}: {config.path}")
        for name, message in errors:
            console.print(f"[red]unreadable[/] {name}: {message}")
        status |= bool(errors)
    return int(status)
