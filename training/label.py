"""`vipra label`: latent actions and frame tokens of every video frame, for pretraining (stage 2).

    labels/manifest.json        models' hashes, horizon, datasets, keys of all their episodes and the
                                mixture's validation_share; what was skipped; every shard's SHA-256
    labels/shard-00-000000.parquet      a row a frame, episodes whole and in order

Columns: key (dataset/episode), instruction, frame, stride, codes (VQGAN tokens, uint16), latents (z_t
.. z_{t+H-1}, H x 16 uint8), valid (H, False where the clip has ended). Shards are shared over ranks
and written whole; a finished one is never touched again, so running the command again goes on, to the
same bytes.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from config.dataset import DatasetConfig, Mixture
from config.loading import load
from config.training import VALIDATION_SHARE
from models.latent_action import folder as latent_folder
from models.latent_action.model import LatentActionModel, encode_labels, to_clip
from models.vqgan import VQGAN
from training import distributed
from training.data.augment import prepare
from training.data.episode import DataError, Episode
from training.data.open import open_dataset
from training.data.windows import check_usable, pick_view
from training.distributed import Ranks
from training.run import TrainingError
from training.start import open_start

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("instruction", pa.string()),
        ("frame", pa.int32()),
        ("stride", pa.int32()),
        ("codes", pa.list_(pa.uint16())),
        ("latents", pa.list_(pa.uint8())),
        ("valid", pa.list_(pa.bool_())),
    ]
)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def windows(length: int, stride: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames o_{t-1} .. o_{t+H} of every t, ends repeated [T, H + 2]; transitions inside the clip [T, H]
    bool.
    """
    wanted = np.arange(length)[:, None] + stride * np.arange(-1, horizon + 1)
    inside = (wanted >= 0) & (wanted < length)
    return np.clip(wanted, 0, length - 1), inside[:, 1:-1] & inside[:, 2:]


@torch.no_grad()
def label_episode(
    episode: Episode, view: str, stride: int, horizon: int, batch: int, model: LatentActionModel, vqgan: VQGAN
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes uint16 [T, tokens], latents uint8 [T, H, 16], valid bool [T, H])."""
    frames = episode.frames(view, range(episode.length))
    device = next(vqgan.parameters()).device
    pictures = torch.from_numpy(prepare(frames, vqgan.config.image_size))
    codes = [vqgan.encode(vqgan.to_input(part.to(device))).cpu() for part in pictures.split(batch)]
    side = model.config.image_size
    small = torch.from_numpy(prepare(frames, side))
    index, valid = windows(episode.length, stride, horizon)
    latents = []
    for at in range(0, episode.length, batch):
        part = index[at : at + batch]
        wanted, places = np.unique(part, return_inverse=True)
        clip = to_clip(small[wanted].to(device), side)
        found = encode_labels(model, clip, torch.from_numpy(places.reshape(part.shape)).to(device))
        latents.append(found[:, -horizon:].cpu())
    return torch.cat(codes).numpy().astype(np.uint16), torch.cat(latents).numpy().astype(np.uint8), valid


def write_shard(path: Path, rows: dict[str, list], about: dict) -> None:
    """A Parquet file beside its place, then renamed. `about` goes into its metadata."""
    table = pa.table(rows, schema=SCHEMA).replace_schema_metadata({"vipra": json.dumps(about)})
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial, compression="zstd")
    partial.rename(path)


def label(
    mixture: Mixture,
    latent: Path,
    tokenizer: Path,
    out: Path,
    horizon: int,
    episodes_per_shard: int,
    batch: int,
    ranks: Ranks,
    say,
) -> None:
    """Label every episode; see the module. Raises TrainingError, DataError, CheckpointError."""
    model, latent_hash = latent_folder.load(latent, ranks.device)
    start = open_start(tokenizer)
    vqgan = start.vqgan(ranks.device)
    about = {
        "format": 1,
        "latent_model": latent_hash,
        "tokenizer": start.hash,
        "horizon": horizon,
        "latent_codes": model.config.codebook_size,
        "latent_tokens": model.config.codes,
        "episodes_per_shard": episodes_per_shard,
        "batch": batch,
        "datasets": [config.model_dump(mode="json") for config in mixture.datasets],
    }
    readers = [open_dataset(config) for config in mixture.datasets]
    shards = [
        (dataset, first)
        for dataset, reader in enumerate(readers)
        for first in range(0, len(reader), episodes_per_shard)
    ]
    out.mkdir(parents=True, exist_ok=True)
    begun = out / "begun.json"
    ranks.barrier()
    if begun.is_file() and (before := json.loads(begun.read_text())) != about:
        key = next(key for key in about if before.get(key) != about[key])
        raise TrainingError(f"{out} was begun with another {key}: choose another --out, or delete it")
    ranks.barrier()
    if ranks.first:
        begun.write_text(json.dumps(about, indent=1))
    for number in range(ranks.rank, len(shards), ranks.size):
        dataset, first = shards[number]
        path = out / f"shard-{dataset:02d}-{first // episodes_per_shard:06d}.parquet"
        if path.is_file():
            continue
        config, reader = mixture.datasets[dataset], readers[dataset]
        rows: dict[str, list] = {name: [] for name in SCHEMA.names}
        skipped = []
        for index in range(first, min(first + episodes_per_shard, len(reader))):
            try:
                episode = reader.episode(index)
                check_usable(episode, config)
                view = pick_view(episode, config.views)
                parts = label_episode(episode, view, config.stride, horizon, batch, model, vqgan)
            except DataError as error:
                if mixture.on_error == "raise":
                    raise
                skipped.append([f"{dataset}/{reader.key(index)}", str(error)])
                continue
            for t, (codes, latents, valid) in enumerate(zip(*parts, strict=True)):
                row = (f"{dataset}/{episode.key}", episode.instruction, t, config.stride, codes)
                for name, value in zip(SCHEMA.names, (*row, latents.ravel(), valid), strict=True):
                    rows[name].append(value)
        write_shard(path, rows, {"skipped": skipped})
        say(f"{path.name}: {len(rows['key'])} frames, {len(skipped)} episodes skipped")
    ranks.barrier()
    if ranks.first:
        keys = [[reader.key(i) for i in range(len(reader))] for reader in readers]
        finish(out, {**about, "keys": keys, "validation_share": mixture.validation_share})


def finish(out: Path, about: dict) -> None:
    """Seal a complete folder with manifest.json."""
    shards, skipped, frames = {}, [], 0
    for path in sorted(out.glob("shard-*.parquet")):
        file = pq.ParquetFile(path)
        frames += file.metadata.num_rows
        skipped += json.loads(file.schema_arrow.metadata[b"vipra"])["skipped"]
        with path.open("rb") as data:
            shards[path.name] = hashlib.file_digest(data, "sha256").hexdigest()
    manifest = {**about, "frames": frames, "skipped": skipped, "shards": shards}
    partial = out / "manifest.partial"
    partial.write_text(json.dumps(manifest, indent=1))
    partial.rename(out / "manifest.json")


@app.command()
def command(
    latent: Annotated[Path, typer.Option(help="latent action model: folder from `vipra train latent`")],
    tokenizer: Annotated[Path, typer.Option(help="checkpoint folder whose frame tokenizer the policy uses")],
    out: Annotated[Path, typer.Option(help="folder of the labels")],
    data: Annotated[
        list[str] | None, typer.Option(help="dataset folder, any kind `vipra data check` reads; repeatable")
    ] = None,
    mixture: Annotated[
        str | None, typer.Option(help="instead of --data: file in config/datasets, or a path")
    ] = None,
    horizon: Annotated[int, typer.Option(min=1, help="H, latent actions a frame (paper: 14)")] = 14,
    episodes_per_shard: Annotated[int, typer.Option(min=1, help="what a killed rank may lose")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="windows computed at once")] = 16,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
) -> None:
    """Latent actions (H = 14, from 16-frame windows) and image tokens of every frame, for `vipra train
    pretrain`.

    vipra label --data VIDEOS --latent checkpoints/latent --tokenizer checkpoints/tokenizer --out labels

    Run it again after an interruption: it goes on, to the same bytes. Many GPUs: torchrun
    --nproc-per-node 8 --no-python -- vipra label ...
    """
    if (data is None) == (mixture is None):
        raise TrainingError("give --data FOLDER or --mixture FILE")
    chosen = (
        Mixture(datasets=tuple(DatasetConfig(path=path) for path in data), validation_share=VALIDATION_SHARE)
        if data
        else load(Mixture, mixture)
    )
    ranks = distributed.start(device)
    try:
        label(chosen, latent, tokenizer, out, horizon, episodes_per_shard, batch, ranks, typer.echo)
    finally:
        distributed.stop()


def main(argv: list[str]) -> int:
    """Exit status of `vipra label ARGV`."""
    try:
        app(argv, prog_name="vipra label")
    except SystemExit as done:
        return done.code or 0
    return 0
