"""`vipra imagine`: a pretrained checkpoint predicts the frame H steps ahead, and the latent actions.

How one sees that pretraining has taught it anything: the predicted frame is saved beside the real one, and
its distance to the real one is printed beside that of the present frame, which a useful prediction has to
beat.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from config.embodiment import Embodiment
from config.loading import parse
from models import checkpoint, decode, sequence
from models.checkpoint import Checkpoint
from models.decode import Imagined, Sampling
from models.vqgan import VQGAN

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
HEADS = {
    "none": "It was pretrained on video and cannot act yet (`vipra train finetune` teaches it to);"
    " imagining needs only its vision and latent-action heads.",
    "flow": "It was finetuned to act, which does not train its vision and latent-action heads:"
    " the checkpoint that it was finetuned from imagines better.",
}
HEADS["ar"] = HEADS["flow"]


class ImagineError(ValueError):
    """The footage or the options do not fit; the message names the value, the limit and the fix."""


@dataclass(frozen=True)
class Scene:
    """Frames [h, w, 3] uint8 RGB at the checkpoint's image size, and their times in s of the footage."""

    before: np.ndarray  # o_{t-1}
    now: np.ndarray  # o_t
    real: np.ndarray | None  # o_{t+H}; None where the footage ends before
    time_s: float
    real_s: float


def read_video(path: Path, times: list[float]) -> tuple[list[np.ndarray | None], float]:
    """The frames [h, w, 3] RGB nearest to increasing `times` (s), None after the end; and the length in s.

    The length is known only where the video had to be read to its end, else infinite. Raises ImagineError.
    """
    if not path.is_file():
        raise ImagineError(f"--video {path}: no such file")
    video = cv2.VideoCapture(str(path))
    if not video.isOpened():
        raise ImagineError(f"--video {path}: no video that OpenCV can decode")
    period = 1 / (video.get(cv2.CAP_PROP_FPS) or 30.0)
    frames, last = [], -period
    try:
        while len(frames) < len(times):
            if not video.grab():
                missing = len(times) - len(frames)
                return frames + [None] * missing, last + period
            last = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
            while len(frames) < len(times) and last >= times[len(frames)] - period / 2:
                good, bgr = video.retrieve()
                if not good:
                    raise ImagineError(f"--video {path}: damaged at {last:.3f} s")
                frames.append(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB))
    finally:
        video.release()
    return frames, math.inf


def read_folder(folder: Path, indices: list[int]) -> tuple[list[np.ndarray | None], int]:
    """Pictures [h, w, 3] RGB of a folder by place in name order, None after the end; and their number."""
    paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in PICTURES)
    if not paths:
        raise ImagineError(f"--frames {folder}: no folder with {' '.join(PICTURES)} files")

    def read(path: Path) -> np.ndarray:
        bgr = cv2.imread(str(path))
        if bgr is None:
            raise ImagineError(f"{path}: not a picture that OpenCV can read")
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)

    return [read(paths[i]) if i < len(paths) else None for i in indices], len(paths)


def read_scene(arguments: argparse.Namespace, loaded: Checkpoint) -> Scene:
    """The three frames the options ask for. Raises ImagineError where the footage is too short."""
    config, embodiment = loaded.config, None
    if loaded.embodiment is not None:
        embodiment = parse(Embodiment, yaml.safe_load(loaded.embodiment), "embodiment.yaml")
    step = arguments.step_seconds or (1 / embodiment.rate_hz if embodiment else arguments.history_seconds)
    if step is None and arguments.video:
        raise ImagineError(
            "--history-seconds is needed: this checkpoint carries no embodiment that says how far apart its"
            " frames are (BridgeData 0.2, Fractal 0.333, Something-Something 0.083)"
        )
    step = step or 1.0
    history = arguments.history_seconds or (embodiment.history_seconds if embodiment else step)
    ahead = config.horizon * step
    if arguments.video:
        at = history if arguments.at is None else arguments.at
        frames, length = read_video(arguments.video, [at - history, at, at + ahead])
        unit, span = "s", history
    else:
        span = max(1, round(history / step))
        at = span if arguments.at is None else round(arguments.at)
        frames, length = read_folder(arguments.frames, [max(at - span, 0), at, at + config.horizon])
        unit, ahead = "frames", config.horizon
    if at < span - 1e-9:
        raise ImagineError(f"--at {at:g}: o_(t-1) lies {span:g} {unit} earlier; use --at {span:g} or more")
    if frames[1] is None:
        raise ImagineError(f"--at {at:g}: the footage has {length:g} {unit}")
    size = config.vqgan.image_size

    def fit(rgb: np.ndarray) -> np.ndarray:
        if embodiment and embodiment.crop:
            rgb = rgb[embodiment.crop.of(*rgb.shape[:2])]
        return cv2.resize(rgb, (size, size), interpolation=cv2.INTER_AREA)

    before, now, real = (None if rgb is None else fit(rgb) for rgb in frames)
    return Scene(before, now, real, float(at), float(at + ahead))


@torch.inference_mode()
def encode(vqgan: VQGAN, frames: list[np.ndarray]) -> torch.Tensor:
    """Frames [h, w, 3] uint8 -> codes [n, N]."""
    device = vqgan.quantize.embedding.weight.device
    return vqgan.encode(vqgan.to_input(torch.from_numpy(np.stack(frames)).to(device)))


@torch.inference_mode()
def picture(vqgan: VQGAN, codes: torch.Tensor) -> np.ndarray:
    """Codes [N] -> frame [h, w, 3] uint8."""
    pixels = (vqgan.decode(codes[None])[0].permute(1, 2, 0) + 1) * 127.5
    return pixels.clamp(0, 255).round().to(torch.uint8).cpu().numpy()


def l1(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two frames, of 255."""
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def compare(
    scene: Scene, now: torch.Tensor, real: torch.Tensor, predicted: torch.Tensor, vqgan: VQGAN
) -> dict:
    """How near the real o_{t+H} are the prediction, the present frame and the tokenizer's own picture.

    now, real, predicted: codes [N].
    """
    codes = len(real)
    return {
        "codes": codes,
        "codes_right": int((predicted == real).sum()),
        "codes_right_copying": int((now == real).sum()),
        "l1": l1(picture(vqgan, predicted), scene.real),
        "l1_copying": l1(scene.now, scene.real),
        "l1_tokenizer": l1(picture(vqgan, real), scene.real),
    }


def side_by_side(panels: list[tuple[str, np.ndarray]], title: str, side: int = 256) -> np.ndarray:
    """Frames [h, w, 3] enlarged to `side` px, each over its caption, all under a title."""
    strip = 24

    def text(words: str, width: int) -> np.ndarray:
        band = np.full((strip, width, 3), 255, np.uint8)
        plain = words.encode("ascii", "replace").decode()
        return cv2.putText(band, plain, (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)

    columns = [
        np.concatenate([cv2.resize(rgb, (side, side), interpolation=cv2.INTER_NEAREST), text(caption, side)])
        for caption, rgb in panels
    ]
    row = np.concatenate(columns, 1)
    return np.concatenate([text(title, row.shape[1]), row])


def write_png(path: Path, rgb: np.ndarray) -> None:
    if not cv2.imwrite(str(path), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)):
        raise ImagineError(f"{path}: cannot be written")


def report(numbers: dict) -> Table:
    table = Table("", "codes right", "L1 to the real frame (of 255)")
    codes = numbers["codes"]
    table.add_row("predicted", f"{numbers['codes_right']}/{codes}", f"{numbers['l1']:.2f}")
    table.add_row(
        "copying the present", f"{numbers['codes_right_copying']}/{codes}", f"{numbers['l1_copying']:.2f}"
    )
    table.add_row("the tokenizer's best", f"{codes}/{codes}", f"{numbers['l1_tokenizer']:.2f}")
    return table


def save(
    folder: Path, scene: Scene, loaded: Checkpoint, imagined: Imagined, numbers: dict | None, request: dict
) -> None:
    """Write the pictures and `latents.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    if imagined.future is not None:
        predicted = picture(loaded.vqgan, imagined.future[0])
        panels = [("o_t (given)", scene.now), (f"o_(t+{loaded.config.horizon}) predicted", predicted)]
        if scene.real is not None:
            panels.append((f"o_(t+{loaded.config.horizon}) real", scene.real))
        write_png(folder / "predicted.png", predicted)
        write_png(folder / "side_by_side.png", side_by_side(panels, request["task"]))
    latents = None if imagined.latents is None else imagined.latents[0].tolist()
    data = {"checkpoint": loaded.hash, **request, "latents": latents, "comparison": numbers}
    (folder / "latents.json").write_text(json.dumps(data, indent=1))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="vipra imagine",
        description="Let a pretrained checkpoint predict, from two frames and a task, the frame H steps ahead"
        " and the latent actions that lead there. Writes predicted.png, side_by_side.png (present, predicted,"
        " real) and latents.json, and prints how near that comes, beside copying the present frame.",
        epilog="A video:   vipra imagine checkpoints/mine --video cups.mp4 --at 3.2 --history-seconds 0.2"
        ' --task "stack the cups" --out imagined\n'
        "Pictures:  vipra imagine checkpoints/mine --frames episode_7/ --at 12"
        ' --task "stack the cups" --out imagined',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "checkpoint", type=Path, help="folder, as `vipra train pretrain` or `vipra convert` write"
    )
    footage = made.add_mutually_exclusive_group(required=True)
    footage.add_argument("--video", type=Path, metavar="FILE", help="footage as a video")
    footage.add_argument(
        "--frames", type=Path, metavar="FOLDER", help="footage as pictures in name order, one step apart"
    )
    made.add_argument("--task", required=True, help="instruction, in words")
    made.add_argument(
        "--at",
        type=float,
        help="time of o_t: seconds of a video, index from 0 of a picture (default: earliest)",
    )
    made.add_argument(
        "--history-seconds",
        type=float,
        metavar="S",
        help="how long o_(t-1) lies before o_t (default: the checkpoint's; pictures: one step)",
    )
    made.add_argument(
        "--step-seconds",
        type=float,
        metavar="S",
        help="time of one of the H steps (default: the checkpoint's rate, else --history-seconds)",
    )
    made.add_argument(
        "--variant",
        choices=sequence.STAGE2_VARIANTS,
        default="full",
        help="what the checkpoint was pretrained to predict (default: %(default)s)",
    )
    made.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest code (default), 1 draws"
    )
    made.add_argument("--top-k", type=int, default=0, help="draw from the K likeliest codes (default: all)")
    made.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    found = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", choices=("cpu", "cuda"), default=found, help="(default here: %(default)s)")
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the pictures go")
    return made


def main(argv: list[str] | None = None) -> int:
    """`vipra imagine`. Raises ImagineError, CheckpointError."""
    arguments = parser().parse_args(argv)
    for name in ("history_seconds", "step_seconds"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ImagineError(f"--{name.replace('_', '-')} {value:g} must be positive")
    if not 0 <= arguments.temperature < math.inf or arguments.top_k < 0:
        raise ImagineError("--temperature and --top-k must not be negative")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ImagineError("--device cuda: torch sees no GPU here; use --device cpu")
    device = torch.device(arguments.device)
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        reading = bar.add_task("reading checkpoint", total=None)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        loaded = checkpoint.load(
            arguments.checkpoint,
            device,
            dtype,
            progress=lambda stage, done, total: bar.update(reading, completed=done, total=total),
        )
        config = loaded.config
        scene = read_scene(arguments, loaded)
        frames = [scene.before, scene.now] + ([] if scene.real is None else [scene.real])
        codes = encode(loaded.vqgan, frames)
        choice = sequence.stage2(loaded.tokenizer, config, arguments.variant)
        _, total = decode.stage2_tokens(config, choice)
        drawing = bar.add_task("imagining", total=total)
        generator = torch.Generator(device).manual_seed(arguments.seed)
        imagined = decode.imagine(
            loaded.policy,
            [sequence.encode_prompt(loaded.tokenizer, arguments.task)],
            codes[None, :2],
            choice,
            Sampling(arguments.temperature, arguments.top_k, (generator,)),
            on_code=lambda: bar.advance(drawing),
        )
    console.print(
        f"{config.name}, action heads {config.action_heads}. {HEADS[config.action_heads]}",
        highlight=False,
        soft_wrap=True,
    )
    numbers = None
    if imagined.future is not None and scene.real is not None:
        numbers = compare(scene, codes[1], codes[2], imagined.future[0], loaded.vqgan)
        console.print(report(numbers))
    elif imagined.future is not None:
        console.print("The footage ends before the predicted frame: nothing to compare it with.")
    request = {
        "task": arguments.task,
        "at": scene.time_s,
        "predicted_at": round(scene.real_s, 6),
        "variant": arguments.variant,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
    }
    save(arguments.out, scene, loaded, imagined, numbers, request)
    if imagined.latents is not None:
        used = len(imagined.latents.unique())
        console.print(
            f"{choice.steps} latent actions of {config.latent_tokens} codes:"
            f" {used} of {config.latent_codes} values used"
        )
    console.print(f"Written to {arguments.out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
