"""Trained weights, one whole tensor at a time, for a checkpoint folder."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from config.training import Lora


class Gathered:
    """`gathered(name)`: a parameter of `module`, gathered from all ranks, adapters merged. Other ranks
    `follow`.
    """

    def __init__(self, module: nn.Module, lora: Lora | None = None):
        self.live = dict(module.named_parameters())
        self.scale = lora.alpha / lora.rank if lora else 0.0

    def whole(self, name: str) -> Tensor:
        value = self.live[name].detach()
        return value.full_tensor() if isinstance(value, DTensor) else value

    def __call__(self, name: str) -> Tensor:
        stem = name.removesuffix(".weight")
        if f"{stem}.base_layer.weight" not in self.live:
            return self.whole(name)
        base, a, b = (
            self.whole(f"{stem}.{part}.weight").float()
            for part in ("base_layer", "lora_A.default", "lora_B.default")
        )
        return base + self.scale * (b @ a)

    def follow(self, names) -> None:
        for name in names:
            self(name)
