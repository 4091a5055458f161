"""The `vipra` command. A verb's imports happen when it is called.

So the same command works on a GPU box without ROS and on a robot PC without torch.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="ViPRA policies on Franka arms: serve, bring up, try out, check.",
)
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_FORWARD)
def serve(context: typer.Context):
    """Serve a policy: vipra serve --policy NAME --bind tcp://... (options: vipra serve --help)."""
    from policy_server.server import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def convert(context: typer.Context):
    """Turn released weights into our checkpoint folders (vipra convert --help names the files)."""
    from models.convert.cli import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def imagine(context: typer.Context):
    """Let a pretrained checkpoint predict the frame 14 steps ahead, beside the real one."""
    from models.imagine import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def data(context: typer.Context):
    """Check and preview datasets: vipra data check|preview."""
    from training.data.cli import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def train(context: typer.Context):
    """Train a stage: vipra train tokenizer|latent|pretrain|finetune."""
    from training.cli import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def label(context: typer.Context):
    """Label videos with latent actions and image tokens for pretraining."""
    from training.label import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def analyze(context: typer.Context):
    """Look into trained models: vipra analyze codes|transfer|smoothness|information."""
    from training.analysis.cli import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def evaluate(context: typer.Context):
    """Trials of a policy with a report, or two reports compared: vipra evaluate TASK --policy ..."""
    from vipra_ros.evaluate import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def runs(context: typer.Context):
    """List and compare training runs."""
    from training.runs import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def gello(context: typer.Context):
    """Lead the arms with GELLO: vipra gello calibrate|read|start|pause|stop."""
    from vipra_ros.teleop.cli import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def record(context: typer.Context):
    """Record demonstrations: vipra record FOLDER --task "stack the cups" (keys: vipra record --help)."""
    from vipra_ros.recording.cli import main as run

    raise typer.Exit(run(context.args))


@app.command(context_settings=_FORWARD)
def dataset(context: typer.Context):
    """Demonstrations: vipra dataset check|stats|view|merge|replay, or simulated ones: generate."""
    from vipra_ros.dataset_cli import main as run

    raise typer.Exit(run(context.args))


@app.command()
def up(
    kind: Annotated[
        Literal["bimanual", "single", "teleop"],
        typer.Argument(help="two arms or one under a policy, or arms that follow GELLO"),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME:=VALUE]...", help="as for ros2 launch, e.g. robot:=sim_bimanual; see --list"
        ),
    ] = None,
    start: Annotated[
        bool, typer.Option("--start", help="let the policy (or GELLO) move the arms once all is ready")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="print every setting and exit")] = False,
):
    """Start, watch and stop a robot's processes, as ros2 launch would. Ctrl-C stops everything."""
    from vipra_ros import bringup

    if list_:
        for name, default, description, choices in bringup.launch_arguments(kind):
            shown = f" [{'|'.join(filter(None, choices))}]" if choices else ""
            typer.echo(f"{name + ':=' + default:26} {description}{shown}")
        return
    given = {}
    for setting in settings or ():
        name, found, value = setting.partition(":=")
        if not found:
            raise typer.BadParameter(f"{setting!r} is not NAME:=VALUE")
        given[name] = value
    from vipra_ros.up import run

    raise typer.Exit(run(kind, given, start))


@app.command()
def demo(
    duration: Annotated[
        float, typer.Option(min=2, help="seconds of control, on the executor's clock")
    ] = 60.0,
    rate: Annotated[float, typer.Option(min=0.5, max=22, help="executed actions per second")] = 22.0,
    replan_after: Annotated[Literal["7", "14"], typer.Option(help="actions of each chunk that run")] = "7",
    mode: Annotated[Literal["asynchronous", "synchronous"], typer.Option()] = "asynchronous",
    anchor: Annotated[
        Literal["observation", "append"], typer.Option(help="asynchronous: where a chunk's time starts")
    ] = "observation",
    preset: Annotated[
        Literal["3.5hz", "7hz", "22hz"] | None,
        typer.Option(help="a protocol of the paper; overrides rate, replan-after, mode and anchor"),
    ] = None,
    inject_latency_ms: Annotated[float, typer.Option(min=0, max=5000, help="added to every inference")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="folder of the report; default runs/demo/<time>")] = None,
    policy: Annotated[
        str | None, typer.Option(help="file in config/policies; default: the shipped one for the anchor")
    ] = None,
):
    """Run the whole system on this machine with two simulated arms, and write a report."""
    from vipra_ros.demo import Settings, run

    settings = Settings(
        duration, rate, int(replan_after), mode, anchor, inject_latency_ms=inject_latency_ms, seed=seed
    )
    raise typer.Exit(run(settings.following(preset, policy), out))


@app.command()
def doctor(
    robot: Annotated[str, typer.Option(help="check what this robot needs")] = "sim_bimanual",
    server: Annotated[str, typer.Option(help="also check this policy server's address")] = "",
    role: Annotated[Literal["robot", "server", "all"], typer.Option(help="what this machine does")] = "all",
):
    """Check this machine: each thing ok, or the fix."""
    from vipra_ros.doctor import run

    raise typer.Exit(run(robot, server, role))


@app.command()
def keys(
    name: Annotated[str, typer.Argument(help="whose: `server`, or a name for the robot")],
    out: Annotated[Path, typer.Option(help="folder for the two key files")] = Path("keys"),
):
    """Make a CURVE key pair. The server's folder holds its secret key and the public keys of its robots."""
    from policy_server.keys import generate

    for path in generate(out, name):
        typer.echo(path)


@app.command(name="init-checkpoint")
def init_checkpoint(
    size: Annotated[
        str,
        typer.Argument(
            help="a size of models/config.py: vipra_tiny, vipra_sim, vipra_sim_small, vipra_100m, vipra_7b"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="checkpoint folder to write")],
    embodiment: Annotated[str, typer.Option(help="file in config/embodiments")] = "franka_bimanual",
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json; default: a small one trained on the prompt")
    ] = None,
    representation: Annotated[
        Literal["absolute", "relative"], typer.Option(help="of joint actions")
    ] = "absolute",
    device: Annotated[str, typer.Option(help="where the weights are made: cpu, cuda")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of the weights")] = "float32",
    seed: Annotated[int, typer.Option(min=0)] = 0,
):
    """Write a checkpoint of random weights: the right shapes, speed and memory, no skill."""
    import torch

    from config.embodiment import Embodiment
    from config.loading import ConfigError, find, load
    from models.checkpoint import init_checkpoint as write
    from models.config import SIZES
    from models.normalization import unfitted
    from models.sequence import PROMPT
    from models.tokenizer import Tokenizer

    if size not in SIZES:
        raise ConfigError(f"{size}: known sizes are {', '.join(SIZES)}")
    robot = load(Embodiment, embodiment)
    words = (
        Tokenizer.from_file(tokenizer)
        if tokenizer
        else Tokenizer.train([PROMPT, "<vision>", "</vision> <action>"], 400)
    )
    kinds = tuple(dimension.kind for dimension in robot.dimensions)
    digest = write(
        SIZES[size].with_embodiment(robot.action_dim, robot.horizon, representation=representation),
        out,
        words,
        unfitted(robot.names, kinds, representation),
        find("embodiments", embodiment).read_text(),
        device,
        getattr(torch, dtype),
        seed,
    )
    typer.echo(f"{out}: random weights of {size} for {robot.name}, hash {digest[:12]}")


def _call(service: str, timeout_s: float) -> None:
    import os

    os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    from vipra_ros.monitor import Monitor

    with Monitor() as monitor:
        typer.echo(f"{service}: {monitor.call(service, timeout_s)}")


@app.command()
def start():
    """Let the policy move the arms: /policy/start."""
    _call("/policy/start", 15.0)


@app.command()
def stop():
    """Stop the arms and latch: /arms/stop. Not a safety function: the emergency stop is the hardware's."""
    _call("/arms/stop", 5.0)


@app.command()
def recover():
    """Clear a stop or fault whose cause is gone: /arms/recover. Start again with `vipra start`."""
    _call("/arms/recover", 30.0)


@app.command()
def home():
    """Move every arm to its home position: /arms/home."""
    _call("/arms/home", 60.0)


@app.command("open")
def open_hands():
    """Open every hand; what they hold falls: /arms/open_hands. Only while nobody commands the arms."""
    _call("/arms/open_hands", 5.0)


def main() -> None:
    """Console entry point: expected errors end in one line and status 1."""
    try:
        app(prog_name="vipra")
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        sys.exit(f"vipra: {_missing(error)}")
    except Exception as error:
        if not _expected(error):
            raise
        sys.exit(f"vipra: {error}")


def _expected(error: Exception) -> bool:
    """Whether the message says all there is to say, as in our own errors; others deserve a traceback."""
    ours = ("config", "episodes", "models", "policy_server", "simulation", "training", "vipra_ros")
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ours


_EXTRAS = {"rclpy": "robot", "franky": "robot", "torch": "server", "mujoco": "sim", "franky_sim": "sim"}


def _missing(error: ModuleNotFoundError) -> str:
    """Which extra brings the module that is missing."""
    top = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(top)
    fix = (
        f"pip install 'vipra_ros[{extra}]'"
        if extra
        else "reinstall vipra_ros with the extras this machine needs"
    )
    return f"{error.name} is not installed here: {fix}"


if __name__ == "__main__":
    main()
