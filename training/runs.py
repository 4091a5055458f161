"""`vipra runs [DIR...]`: training runs, how their configurations differ, and what they reached."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from training.run import TrainingError, flat, read_config, summary

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SHOWN = ("loss", "validation/loss", "validation/action_mse", "validation/l1", "samples_per_s")


def find(folders: list[Path]) -> list[Path]:
    """Run folders at or below `folders`, oldest first. Raises TrainingError where there is none."""
    found = {path.parent for folder in folders for path in folder.glob("**/config.yaml")}
    runs = sorted((path for path in found if (path / "environment.json").is_file()), key=_age)
    if not runs:
        raise TrainingError(
            f"no training run below {', '.join(map(str, folders))}: train one, or name its folder"
        )
    return runs


def _age(folder: Path) -> float:
    return (folder / "environment.json").stat().st_mtime


def differing(configs: list[dict]) -> list[str]:
    """Keys whose value is not the same in all configurations."""
    flats = [flat(config) for config in configs]
    keys = dict.fromkeys(key for config in flats for key in config)
    return [key for key in keys if len({str(config.get(key)) for config in flats}) > 1]


def tables(runs: list[Path]) -> list[Table]:
    """For each stage: its runs with their newest metrics, and the keys that differ between them."""
    out = []
    stages = {run: read_config(run)["stage"] for run in runs}
    for stage in dict.fromkeys(stages.values()):
        mine = [run for run in runs if stages[run] == stage]
        configs, metrics = [read_config(run) for run in mine], [summary(run)[1] for run in mine]
        numbers = [name for name in SHOWN if any(name in m for m in metrics)]
        listed = Table("run", "step", *numbers, title=stage)
        for run, config, last in zip(mine, configs, metrics, strict=True):
            found = (f"{last[name]:.4g}" if name in last else "" for name in numbers)
            listed.add_row(str(run), f"{last.get('step', 0):.0f}/{config['steps']}", *found)
        out.append(listed)
        if keys := differing(configs):
            compared = Table("differs", *(run.name for run in mine))
            for key in keys:
                compared.add_row(key, *(str(flat(config).get(key, "")) for config in configs))
            out.append(compared)
    return out


@app.command()
def command(
    folders: Annotated[list[Path] | None, typer.Argument(help="run folders, or folders of them")] = None,
) -> None:
    """List training runs below FOLDERS (default: runs), what differs between them, and their last metrics.

    Curves: tensorboard --logdir runs
    """
    for table in tables(find(folders or [Path("runs")])):
        Console().print(table)


def main(argv: list[str]) -> int:
    """Exit status of `vipra runs ARGV`."""
    try:
        app(argv, prog_name="vipra runs")
    except SystemExit as done:
        return done.code or 0
    return 0
