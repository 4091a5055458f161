"""ViPRA's streaming files: LWM's backbone, latent-action table and head, and, finetuned, the flow heads.

`vipra_params` (pretrained) has no action heads. What the official finetuning script writes,
`streaming_train_state`, has them, inside a train state whose optimiser is ignored.
"""

import dataclasses

from models.config import ModelConfig, VQGANConfig
from models.convert import ConvertError
from models.convert.lwm import Plan, Recipe, Source, check, linear, recipes, same, sizes
from models.convert.streaming import Stream

ENCODER = "transformer/action_encoder"
PRETRAINED_POSITIONS = 1536  # max_sequence_length of the official pretraining script; finetuning: 768


def action_dim(source: Source) -> int | None:
    """D of a finetuned file, None for a pretrained one."""
    name = "action_head/kernel"
    return source.shape(name)[-1] if name in source.names else None


def plan(stream: Stream, vqgan: VQGANConfig, heads: int | None = None, horizon: int | None = None) -> Plan:
    """A pretrained or finetuned file; RoPE in bf16, as it was trained. Raises ConvertError.

    horizon: actions in a chunk, not in the file (official: 14).
    """
    source = Source(stream)
    if "transformer/late/embedding" not in source.names:
        raise ConvertError(
            f"{stream.path} has no latent actions (transformer/late), so it is an LWM file: "
            "use `vipra convert lwm`"
        )
    d = action_dim(source)
    config = dataclasses.replace(
        sizes(source, vqgan, heads),
        rope_precision="bf16",
        latent_codes=source.shape("transformer/late/embedding")[0] - 1,
        **({} if d is None else {"action_heads": "flow", "action_dim": d}),
        **({} if horizon is None else {"horizon": horizon}),
    )
    if d is None:
        config = dataclasses.replace(config, max_positions=PRETRAINED_POSITIONS)
    return check(source, config, recipes(config) | head_recipes(config), ())


def head_recipes(config: ModelConfig) -> dict[str, Recipe]:
    out = {
        "latent_embedding.weight": Recipe(("transformer/late/embedding",), same),
        "latent_head.layers.0.weight": Recipe(("latent_actions_head/kernel",), linear),
    }
    if config.action_heads == "flow":
        places = {f"action_encoder.linear_{i}": f"{ENCODER}/linear_{i}" for i in (1, 2, 3)}
        for ours, theirs in (places | {"action_head": "action_head"}).items():
            out[f"{ours}.weight"] = Recipe((f"{theirs}/kernel",), linear)
            out[f"{ours}.bias"] = Recipe((f"{theirs}/bias",), same)
    return out
