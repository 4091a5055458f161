"""The latent action model: encoder, quantiser and decoder together.

Clips are RGB in [0, 1], [B, T, 3, s, s] (`to_clip` makes them), or [B, V, T, 3, s, s] of V synchronised
views. Latent action t belongs to the transition from frame t to frame t + 1.

    out = model(clip)                    # training: predictions of frames 1..T-1 through noisy latents
    codes = encode_labels(model, frames, windows)   # the codes, [B, W - 1, N]
    frames = model.rollout(clip[:, :1], codes)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.latent_action.config import LatentActionConfig
from models.latent_action.decoder import CrossDecoder, Decoder
from models.latent_action.encoder import Encoder
from models.latent_action.quantizer import Quantizer


class ClipError(ValueError):
    """A clip has the wrong shape; the message names the shape and what is needed."""


@dataclass
class Prediction:
    """Views are rows: B * V of them."""

    frames: Tensor  # [B * V, T - 1, 3, s, s], or features [B * V, T - 1, grid * grid, width]
    target: Tensor  # the same shape: frames 1..T-1 or their features
    codes: Tensor  # [B * V, T - 1, N] int64
    chosen: Tensor  # [K], how often each code was chosen, over all ranks
    crossed: Tensor | None  # as frames, each view decoded with another view's latent actions


class LatentActionModel(nn.Module):
    def __init__(self, config: LatentActionConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = Quantizer(config.codebook_size, config.code_dim)
        self.decoder = (Decoder if config.decoder == "causal" else CrossDecoder)(config)

    def _check(self, clip: Tensor, shortest: int) -> None:
        size = self.config.image_size
        if clip.ndim != 5 or clip.shape[2:] != (3, size, size) or clip.shape[1] < shortest:
            raise ClipError(
                f"clip is {list(clip.shape)}, expected [batch, at least {shortest} frames, 3, {size}, {size}]"
            )

    def forward(self, clip: Tensor, cross: bool = False) -> Prediction:
        """cross: also decode every view with the latent actions of the next (MVP-LAM); needs V >= 2."""
        views = clip.shape[1] if clip.ndim == 6 else 1
        clip = clip.flatten(0, 1) if clip.ndim == 6 else clip
        self._check(clip, 2)
        h, features = self.encoder(clip)
        z, codes, chosen = self.quantizer(h)
        frames = self.decoder(clip[:, :-1], z)
        crossed = None
        if cross and views > 1:
            other = z.unflatten(0, (-1, views)).roll(1, 1).flatten(0, 1)
            crossed = self.decoder(clip[:, :-1], other)
        target = clip if self.config.target == "pixels" else features.detach()
        return Prediction(frames, target[:, 1:], codes, chosen, crossed)

    @torch.no_grad()
    def codes(self, clip: Tensor) -> Tensor:
        """[B, T, 3, s, s] -> codes [B, T - 1, N] int64, row-major over the code grid."""
        self._check(clip, 2)
        return self.quantizer.nearest(self.encoder(clip)[0])

    @torch.no_grad()
    def window_codes(self, frames: Tensor, windows: Tensor) -> Tensor:
        """Codes [B, W - 1, N] of clips that overlap: frames [T, 3, s, s], which of them each clip holds
        [B, W]. The ViT sees every frame once.
        """
        self._check(frames[None], 1)
        features = self.encoder.vit(frames)
        return self.quantizer.nearest(self.encoder.actions(features[windows]))

    @torch.no_grad()
    def predict(self, frames: Tensor, codes: Tensor) -> Tensor:
        """True frames [B, T, 3, s, s] and codes [B, T, N] -> each frame's successor, [B, T, 3, s, s]."""
        self._check(frames, 1)
        return self.decoder(frames, self.quantizer.lookup(codes))

    @torch.no_grad()
    def rollout(self, frames: Tensor, codes: Tensor) -> Tensor:
        """Start frames [B, t, 3, s, s] and codes [B, t - 1 + n, N] -> n frames [B, n, 3, s, s], each from
        the ones before it. Codes of another clip transfer its motion (figure 5). Pixels only.
        """
        if self.config.target != "pixels":
            raise ClipError("rollout: this model predicts features, train one with target: pixels")
        start, history = frames.shape[1], frames
        for t in range(start, codes.shape[1] + 1):
            following = self.predict(history, codes[:, :t])[:, -1:].clamp(0, 1)
            history = torch.cat([history, following.to(history.dtype)], 1)
        return history[:, start:]


def to_clip(frames: Tensor, size: int) -> Tensor:
    """uint8 RGB [..., h, w, 3] -> [..., 3, size, size] in [0, 1], squashed as in training."""
    x = frames.flatten(0, -4).permute(0, 3, 1, 2).float() / 255
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1)
    return x.unflatten(0, frames.shape[:-3])


@torch.no_grad()
def encode_labels(model: LatentActionModel, frames: Tensor, windows: Tensor | None = None) -> Tensor:
    """Codes for stage 2: frames [T, 3, s, s] or [B, T, 3, s, s] -> [T - 1, N] or [B, T - 1, N] int64;
    with windows [B, W], indices into frames [T, 3, s, s], [B, W - 1, N].

    A window o_{t-1}..o_{t+14} of 16 frames (ends repeated where the episode ends) gives 15 transitions; the
    last 14 are z_t..z_{t+13}. The model is used in eval mode, without noise or dropout, and left as it was.
    """
    training = model.training
    model.eval()
    try:
        if windows is not None:
            return model.window_codes(frames, windows)
        return model.codes(frames) if frames.ndim == 5 else model.codes(frames[None])[0]
    finally:
        model.train(training)
