"""Low-rank adapters (peft) on the backbone, for finetuning on one small GPU; merged on export."""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from config.training import Lora
from models.policy import Policy

Source = Callable[[str], Tensor]


def attach(policy: Policy, choice: Lora, source: Source, seed: int, precision: str) -> Source:
    """Put adapters on `policy` (on meta), freeze the backbone, and return the source of the new names.

    The frozen backbone is held in `precision`; adapters and action heads train in float32.
    """
    from peft import LoraConfig, inject_adapter_in_model  # seconds of imports, for adapters only

    policy.backbone.requires_grad_(False)
    heads = [name for name, p in policy.named_parameters() if p.requires_grad]
    config = LoraConfig(
        r=choice.rank,
        lora_alpha=choice.alpha,
        lora_dropout=choice.dropout,
        target_modules=list(choice.targets),
    )
    inject_adapter_in_model(config, policy)
    shapes = {}
    for name, parameter in policy.named_parameters():
        trained = name in heads or ".lora_" in name
        parameter.requires_grad_(trained)
        parameter.data = parameter.data.to(torch.float32 if trained else getattr(torch, precision))
        shapes[name] = parameter.shape

    def adapter_source(name: str) -> Tensor:
        if ".lora_B." in name:  # zero: training starts at the pretrained function
            return torch.zeros(shapes[name])
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(seed + int(re.sub(r"\D", "", name) or 0))
            return torch.randn(shapes[name], generator=generator) * shapes[name][1] ** -0.5
        return source(name.replace(".base_layer.", "."))

    return adapter_source


def adapted(policy: Policy) -> bool:
    return not isinstance(policy.backbone.layers[0].qkv, nn.Linear)
