"""Converts the released latent action model (vipra-project/vipra-laq, a PyTorch file) to our folder.

The file is opened with `weights_only` and memory-mapped; tensors are copied one at a time. Every tensor of it
is either converted or named in a list of what is ignored, and why; anything else is an error.
"""

import argparse
import json
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from models import folder as folders
from models.config import ModelConfigError
from models.folder import CheckpointError, Progress, Weights
from models.latent_action import folder as latent_folder
from models.latent_action.config import LatentActionConfig
from models.latent_action.model import LatentActionModel
from models.latent_action.vit import official_name, rename, resize_positions

WRAPPERS = ("model", "module", "state_dict")  # what the trainer, DDP and Lightning save the weights under
PREFIXES = ("module.", "_orig_mod.")
DINO_HEAD_DIM = 64

IGNORED = (  # (pattern, why)
    (r"^lpips\.", "perceptual loss, training only"),
    (r"^flow_model\.", "optical flow loss, training only"),
    (r"^fusion_layer\.", "never used by the released model"),
    (r"^vq\.codebooks_used$", "usage counter, training only"),
    (r"\.context_norm\.(gamma|beta)$", "never used without a context"),
    (r"^enc_spatial_transformer\.model\.mask_token$", "DINOv2 pretraining only"),
    (r"\.beta$", "a constant zero"),
)
_ATTENTION = (
    (r"\.norm\.gamma$", ".norm.weight"),
    (r"\.to_(q|kv|out)\.", r".\1."),
)
_FEED_FORWARD = ((r"\.0\.gamma$", ".norm.weight"), (r"\.1\.weight$", ".up.weight"), (r"\.4\.", ".down."))
_RULES = (
    (r"^vq_project_in\.", "encoder.project."),
    (r"^vq_encoder\.", "encoder.downsample."),
    (r"^vq\.codebooks$", "quantizer.codebook"),
    (r"^vq_to_cond\.1\.", "decoder.condition."),
    (r"^dec_patchify\.proj\.", "decoder.patch_embed.projection."),
    (r"^dec_patchify\.norm\.", "decoder.patch_embed.norm."),
    (r"^to_pixels\.0\.", "decoder.head.linear."),
    (r"^enc_spatial_rel_pos_bias\.", "encoder.bias."),
    (r"^dec_spatial_rel_pos_bias\.", "decoder.bias."),
    (r"^enc_st_transformer\.norm_out\.gamma$", "encoder.norm.weight"),
    (r"^dec_transformer\.norm_out\.gamma$", "decoder.norm.weight"),
    (r"^enc_st_transformer\.layers\.", "encoder.blocks."),
    (r"^dec_transformer\.layers\.", "decoder.blocks."),
)
_BLOCK = (
    (r"\.0\.to_alpha_beta\.", ".conditioning.modulation."),
    (r"\.0\.ffn\.0\.", ".conditioning.up."),
    (r"\.0\.ffn\.2\.", ".conditioning.down."),
    (r"\.1\.dsconv\.", ".local."),
)


def our_name(name: str) -> str | None:
    """Our name of an upstream tensor, or None where it is ignored. Unknown names come back as they are."""
    if any(re.search(pattern, name) for pattern, _ in IGNORED):
        return None
    if name.startswith("enc_spatial_transformer.model."):
        return "encoder.vit." + official_name(name.removeprefix("enc_spatial_transformer.model."))
    if name.startswith("vq_to_cond.2."):
        return "decoder.condition_mlp" + rename(name.removeprefix("vq_to_cond.2"), _FEED_FORWARD)
    name = rename(name, _RULES)
    block = re.match(r"^(?:encoder|decoder)\.blocks\.\d+", name)
    if block is None:
        return name
    prefix, rest = block[0], name[block.end() :]
    for index, part in (("2", "spatial"), ("3", "temporal")):
        if rest.startswith(f".{index}."):
            return f"{prefix}.{part}" + rename(rest[2:], _ATTENTION)
    if rest.startswith(".4."):
        return f"{prefix}.feed_forward" + rename(rest[2:], _FEED_FORWARD)
    return prefix + rename(rest, _BLOCK)


def read(path: Path | str) -> tuple[dict[str, Tensor], list[str]]:
    """Memory-mapped tensors of a released file by upstream's names, and what else the file holds (an
    optimiser, averaged weights). Raises CheckpointError.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}: give the released file of vipra-project/vipra-laq")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors and plain containers"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable PyTorch file: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a map of names to tensors")
    wrapper = next((name for name in WRAPPERS if isinstance(data.get(name), dict)), None)
    extras = sorted(str(name) for name in data if name != wrapper) if wrapper else []
    tensors = data[wrapper] if wrapper else data
    for prefix in PREFIXES:
        if tensors and all(str(name).startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    wrong = [str(name) for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if wrong or not tensors:
        raise CheckpointError(f"{path} holds no map of names to tensors (not a tensor: {wrong[:4]})")
    return tensors, extras


def infer_config(tensors: dict[str, Tensor], image_size: int = 224) -> LatentActionConfig:
    """Sizes from the tensors' shapes; what shapes do not tell is the released model's (absolute tokens, not
    their changes; DINOv2 heads of 64). Raises CheckpointError.
    """

    def count(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    try:
        codebook_size, code_dim = tensors["vq.codebooks"].shape
        width = tensors["vq_project_in.weight"].shape[1]
        registers = tensors.get("enc_spatial_transformer.model.register_tokens")
        return LatentActionConfig(
            name="vipra_laq",
            image_size=image_size,
            patch=tensors["dec_patchify.proj.weight"].shape[-1],
            width=width,
            vit_layers=count(r"enc_spatial_transformer\.model\.blocks\.(\d+)\."),
            vit_heads=max(1, width // DINO_HEAD_DIM),
            registers=0 if registers is None else registers.shape[1],
            heads=tensors["enc_spatial_rel_pos_bias.net.4.weight"].shape[0],
            head_dim=tensors["enc_st_transformer.layers.0.2.q_scale"].shape[0],
            encoder_layers=count(r"enc_st_transformer\.layers\.(\d+)\."),
            decoder_layers=count(r"dec_transformer\.layers\.(\d+)\."),
            codebook_size=codebook_size,
            code_dim=code_dim,
            code_grid=round((tensors["vq_to_cond.1.weight"].shape[1] // code_dim) ** 0.5),
        )
    except KeyError as error:
        raise CheckpointError(
            f"not the released latent action model: tensor {error.args[0]} is missing"
        ) from error
    except (ModelConfigError, ValueError, IndexError) as error:
        raise CheckpointError(f"not the released latent action model: {error}") from error


def convert(
    source: Path | str,
    target: Path | str,
    image_size: int = 224,
    progress: Progress | None = None,
) -> tuple[str, dict[str, str]]:
    """Write `target` from the released file `source`. Returns the folder's hash and the ignored names with
    the reason for each. An interrupted conversion goes on where it stopped. Raises CheckpointError.
    """
    tensors, extras = read(source)
    config = infer_config(tensors, image_size)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LatentActionModel(config).named_parameters()}
    names = {name: our_name(name) for name in tensors}
    known = {ours: name for name, ours in names.items() if ours in shapes}
    unknown = sorted(name for name, ours in names.items() if ours is not None and ours not in shapes)
    missing = sorted(set(shapes) - set(known))
    if unknown or missing:
        raise CheckpointError(f"{source}: unknown tensors {unknown}, missing tensors (our names) {missing}")
    nonzero = [name for name in tensors if name.endswith(".beta") and tensors[name].any()]
    if nonzero:
        raise CheckpointError(f"{source}: {nonzero} should be constant zeros: another version of the model")
    ignored = {
        name: next(why for pattern, why in IGNORED if re.search(pattern, name))
        for name in tensors
        if names[name] is None
    } | {name: "not the model's weights" for name in extras}

    def tensor(name: str) -> Tensor:
        value = tensors[known[name]]
        if not value.is_floating_point() or not value.isfinite().all():
            raise CheckpointError(f"{source}: {known[name]} holds NaN, infinite or integer weights")
        if name == "encoder.vit.positions":
            value = resize_positions(value, config.grid)
        return value

    sha256 = folders.digest(Path(source))
    origin = {"file": Path(source).name, "sha256": sha256, "ignored": ignored}
    value = latent_folder.write(
        target,
        config,
        Weights(shapes, tensor, torch.float32),
        {"source.json": json.dumps(origin, indent=1)},
        resume=f"laq {sha256} {image_size}",
        progress=progress,
    )
    return value, ignored


def main(argv: list[str]) -> int:
    """`vipra convert laq`."""
    parser = argparse.ArgumentParser(
        prog="vipra convert laq",
        description="Convert the released latent action model to a folder that `vipra label` and `vipra "
        "analyze` load.",
        epilog="The file is a PyTorch checkpoint of the Hugging Face repository vipra-project/vipra-laq. It "
        "is read with weights_only: nothing in it is executed. Run the same command again to continue an "
        "interrupted conversion.",
    )
    parser.add_argument("source", type=Path, help="the released .pt file")
    parser.add_argument("target", type=Path, help="folder to write; a converted model there is replaced")
    parser.add_argument("--image-size", type=int, default=224, help="px, as trained (released: 224)")
    options = parser.parse_args(argv)
    from models.convert.cli import bar

    with bar() as progress:
        value, ignored = convert(options.source, options.target, options.image_size, progress)
    reasons: dict[str, list[str]] = {}
    for name, why in ignored.items():
        reasons.setdefault(why, []).append(name)
    for why, found in reasons.items():
        print(f"ignored, {why}: {len(found)} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})")
    print(f"{options.target}: {value}")
    return 0
