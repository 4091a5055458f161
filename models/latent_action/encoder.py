"""Inverse dynamics I(z_t | o_{0:L}): a clip's frames -> the continuous latent action of each transition.

Not causal: z_t may use frames before and after its transition.
"""

from torch import Tensor, nn

from models.latent_action.blocks import PositionBias, SpatioTemporalBlock, temporal_rotation
from models.latent_action.config import LatentActionConfig
from models.latent_action.vit import Vit


class Encoder(nn.Module):
    def __init__(self, config: LatentActionConfig):
        super().__init__()
        self.config = config
        self.vit = Vit(config)
        self.bias = PositionBias(config.width, config.heads)
        self.blocks = nn.ModuleList(
            SpatioTemporalBlock(
                config.width, config.heads, config.head_dim, config.dropout, causal=False, conditioned=False
            )
            for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.project = nn.Linear(config.width, config.code_dim)
        convolutions = [
            nn.Conv3d(config.code_dim, config.code_dim, 3, stride=(1, s, s), padding=1)
            for s in config.strides
        ]
        layers = [layer for conv in convolutions for layer in (conv, nn.LeakyReLU(0.1))]
        self.downsample = nn.Sequential(*layers[:-1])
        if config.target == "features":  # a target that moves would collapse
            self.vit.requires_grad_(False)

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """RGB in [0, 1] [B, T, 3, s, s] -> latent actions before quantisation [B, T - 1, codes, code_dim],
        and the ViT's features [B, T, grid * grid, width].
        """
        features = self.vit(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])
        return self.actions(features), features

    def actions(self, features: Tensor) -> Tensor:
        """Of the ViT's features of a clip [B, T, grid * grid, width]."""
        config = self.config
        bias = self.bias(config.grid)
        rotation = temporal_rotation(features.shape[1], config.head_dim, features.device)
        x = features
        for block in self.blocks:
            x = block(x, config.grid, bias, rotation)
        x = self.norm(x)
        x = x[:, 1:] - x[:, :-1] if config.deltas else x[:, 1:]
        x = self.project(x).unflatten(2, (config.grid, config.grid)).permute(0, 4, 1, 2, 3)
        x = self.downsample(x)  # [B, code_dim, T - 1, code_grid, code_grid]
        return x.permute(0, 2, 3, 4, 1).flatten(2, 3)
