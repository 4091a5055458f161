"""A latent action model on disk: config.json, safetensors shards, manifest.json. Never pickle.

`save` and `load` are inverses; the quantiser's statistics, which only training needs, are left out.
"""

import json
from pathlib import Path

import torch

from models import folder as folders
from models.config import ModelConfigError
from models.folder import CheckpointError, Progress, Weights
from models.latent_action.config import LatentActionConfig
from models.latent_action.model import LatentActionModel

FORMAT = 1


def write(
    folder: Path | str,
    config: LatentActionConfig,
    weights: Weights,
    texts: dict[str, str] | None = None,
    resume: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Write a folder from tensors made one at a time (`models.folder.write`). Returns its hash."""
    config_text = json.dumps({"format": FORMAT, "latent_action": config.to_dict()}, indent=1)
    texts = {"config.json": config_text, **(texts or {})}
    return folders.write(folder, {"model": weights}, texts, resume=resume, progress=progress)


def save(folder: Path | str, model: LatentActionModel) -> str:
    """Write `model` in fp32, replacing a folder that is there. Returns its hash. Raises CheckpointError."""
    tensors = dict(model.named_parameters())
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return write(folder, model.config, Weights(shapes, tensors.__getitem__, torch.float32))


def read_config(folder: Path | str) -> LatentActionConfig:
    """Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} does not exist: train a model with `vipra train latent`, or convert the released one"
        )
    try:
        data = json.loads(folders.read_text(folder, "config.json"))
        if not isinstance(data, dict) or set(data) != {"format", "latent_action"}:
            raise ModelConfigError("config.json is not a latent action model's (format, latent_action)")
        if data["format"] != FORMAT:
            raise ModelConfigError(f"format is {data['format']}, this version reads {FORMAT}")
        return LatentActionConfig.from_dict(data["latent_action"])
    except (json.JSONDecodeError, ModelConfigError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


def load(folder: Path | str, device="cpu", verify: bool = True) -> tuple[LatentActionModel, str]:
    """The model in fp32 on `device`, in eval mode, and its folder's hash. Raises CheckpointError.

    verify: compare every file with its SHA-256.
    """
    folder, config = Path(folder), read_config(folder)
    files = folders.read_manifest(folder, verify)
    with torch.device("meta"):
        model = LatentActionModel(config)
    model = model.to_empty(device=device)
    model.quantizer.moments.zero_()
    folders.fill(model, [folder / name for name in sorted(files) if name.endswith(".safetensors")])
    return model.eval(), folders.read_hash(folder)
