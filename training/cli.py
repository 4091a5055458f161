"""`vipra train tokenizer|latent|pretrain|finetune`: from a folder of data to a checkpoint."""

from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import typer

from config.loading import ConfigError
from config.training import Recipe, load_recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train a stage. A RECIPE is a file in config/training or a path; `--set key=value` changes it; the "
    "same command with --run FOLDER continues an interrupted run. Many GPUs: torchrun --nproc-per-node 8 "
    "--no-python -- vipra train ... (docs/cluster.md).",
)


@app.callback()
def stages() -> None:
    """A group, however many commands it has."""


RecipeName = Annotated[str, typer.Argument(help="file in config/training (e.g. finetune_tiny), or a path")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="dataset folder, of any kind that `vipra data check` reads, or a mixture: a file in "
        "config/datasets, or a path; repeat for several",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="folder of the result (needed for all but --dry-run)")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="change the recipe, e.g. --set optimizer.learning_rate=1e-4")
]
RunFolder = Annotated[
    Path | None,
    typer.Option("--run", help="run folder; default runs/<stage>/<time>; an existing one is continued"),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option()]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="only print memory and step time, and whether it fits; trains nothing"),
]
Memory = Annotated[
    float | None, typer.Option("--gpu-memory", help="--dry-run: plan for a GPU with this many GiB")
]
Tflops = Annotated[
    float | None, typer.Option("--gpu-tflops", help="--dry-run: its bf16 peak, e.g. 989 for an H100 or H200")
]
Gpus = Annotated[int | None, typer.Option("--gpus", help="--dry-run: how many of them")]
Wandb = Annotated[bool, typer.Option("--wandb", help="also log to Weights & Biases")]


def resolve(
    stage: str, name: str, sets: list[str] | None, data: list[str] | None, **fields: str | None
) -> Recipe:
    """The recipe with the command line's data and fields. Raises ConfigError or DataError."""
    from training.data.cli import mixture

    given = [f"{key}={value}" for key, value in fields.items() if value is not None]
    named = [mixture(dataset).model_dump(mode="json", exclude_unset=True) for dataset in data or ()]
    merged: dict = {}
    for part in named:
        for key, value in part.items():
            if key != "datasets" and merged.setdefault(key, value) != value:
                raise ConfigError(f"--data: {key} is {merged[key]} in one mixture and {value} in another")
    if named:
        merged["datasets"] = [dataset for part in named for dataset in part["datasets"]]
    return load_recipe(name, [*given, *(sets or [])], stage, merged)


def execute(recipe: Recipe, module: ModuleType, out: Path | None, options: dict) -> None:
    """Plan, or train and export. module: has plan(recipe) -> Stage and build(recipe, ranks, run) -> Stage."""
    from training import distributed, estimate, loop
    from training.run import Run, TrainingError

    if options["dry_run"]:
        planned = {key: options[key] for key in ("gpu_memory", "gpu_tflops", "gpus")}
        if not estimate.show(module.plan(recipe), recipe, **planned):
            raise typer.Exit(1)
        return
    if out is None:
        raise TrainingError("nowhere to write the result: give --out FOLDER")
    if recipe.data is None and recipe.stage != "pretrain":
        raise TrainingError("no data: give --data FOLDER, or `data:` in the recipe")
    ranks = distributed.start(options["device"])
    run = None
    try:
        stamp = ranks.gather(datetime.now().strftime("%Y-%m-%d_%H%M%S"))[0]
        folder = options["run"] or Path("runs") / recipe.stage / stamp
        run = Run(folder, recipe, ranks.rank, ranks.size, options["wandb"])
        stage = module.build(recipe, ranks, run)
        if not loop.train(stage, recipe, run, ranks, stage.samples()):
            raise typer.Exit(128 + run.stopped_by)
        digest = stage.export(out, run, ranks)
        if ranks.first:
            run.say(f"{out}: {recipe.stage} checkpoint {digest[:12]}; run folder {folder}")
    finally:
        if run:
            run.close()
        distributed.stop()


@app.command()
def tokenizer(
    recipe: RecipeName,
    out: Out = None,
    data: Data = None,
    sets: Set = None,
    run: RunFolder = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    gpu_memory: Memory = None,
    gpu_tflops: Tflops = None,
    gpus: Gpus = None,
    wandb: Wandb = False,
) -> None:
    """Stage 0: frame tokenizer (VQGAN) and vocabulary of a model that is not 7B.

    vipra train tokenizer tokenizer_tiny --data VIDEOS --out checkpoints/tokenizer

    Any dataset with frames will do; its instructions teach the vocabulary. The 7B model brings its own.
    """
    from training import tokenizer as module

    execute(resolve("tokenizer", recipe, sets, data), module, out, locals())


@app.command()
def latent(
    recipe: RecipeName,
    out: Out = None,
    data: Data = None,
    sets: Set = None,
    run: RunFolder = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    gpu_memory: Memory = None,
    gpu_tflops: Tflops = None,
    gpus: Gpus = None,
    wandb: Wandb = False,
) -> None:
    """Stage 1: latent actions from video alone.

    vipra train latent latent_tiny --data VIDEOS --out checkpoints/latent

    The result labels videos for pretraining: vipra label --help.
    """
    from training import latent_stage as module

    execute(resolve("latent", recipe, sets, data), module, out, locals())


@app.command()
def pretrain(
    recipe: RecipeName,
    out: Out = None,
    labels: Annotated[str | None, typer.Option(help="folder written by `vipra label`")] = None,
    start: Annotated[
        str | None,
        typer.Option(help="checkpoint whose backbone continues, e.g. LWM converted; left out: random"),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="checkpoint folder with the frame tokenizer, where --start is left out")
    ] = None,
    sets: Set = None,
    run: RunFolder = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    gpu_memory: Memory = None,
    gpu_tflops: Tflops = None,
    gpus: Gpus = None,
    wandb: Wandb = False,
) -> None:
    """Stage 2: future frame and latent actions, from labelled video.

    vipra train pretrain pretrain_tiny --labels LABELS --tokenizer checkpoints/tokenizer --out
    checkpoints/pretrained

    The result cannot act yet (action heads: none): `vipra imagine` shows what it expects, finetune it next.
    """
    from training import pretrain as module

    plan = resolve("pretrain", recipe, sets, None, labels=labels, start=start, tokenizer=tokenizer)
    execute(plan, module, out, locals())


@app.command()
def finetune(
    recipe: RecipeName,
    out: Out = None,
    data: Data = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="checkpoint folder that continues (the paper's Scratch: LWM converted); left out: random"
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="checkpoint folder with the frame tokenizer, where --start is left out")
    ] = None,
    embodiment: Annotated[str | None, typer.Option(help="file in config/embodiments, or a path")] = None,
    sets: Set = None,
    run: RunFolder = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    gpu_memory: Memory = None,
    gpu_tflops: Tflops = None,
    gpus: Gpus = None,
    wandb: Wandb = False,
) -> None:
    """Stage 3: a policy for your robot, from demonstrations.

    vipra train finetune finetune_tiny --data DEMOS --start checkpoints/pretrained --out checkpoints/mine

    DEMOS must have the embodiment's actions at its rate. The result is what `vipra serve` loads.
    """
    from training import finetune as module

    plan = resolve("finetune", recipe, sets, data, start=start, tokenizer=tokenizer, embodiment=embodiment)
    execute(plan, module, out, locals())


def main(argv: list[str]) -> int:
    """Exit status of `vipra train ARGV`."""
    try:
        app(argv, prog_name="vipra train")
    except SystemExit as done:
        return done.code or 0
    return 0
