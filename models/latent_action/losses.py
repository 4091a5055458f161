"""What a prediction costs: pixels, LPIPS (Zhang et al. 2018) and RAFT flow (Teed and Deng 2020).

LPIPS and RAFT are frozen networks beside the model; gradients pass through them to the decoder. Their weights
come from local files: `vgg16-397923af.pth` (torchvision's VGG16; the LPIPS package brings its own five linear
layers) and `raft_large_C_T_SKHT_V2-ff5fadd5.pth` (torchvision's RAFT).

Predictions and targets are RGB in [0, 1], [B, T, 3, s, s]; `valid` [B, T] bool leaves repeat-padded
transitions out.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.latent_action.vit import WeightsError, read_weights

RAFT_SHORTEST_SIDE = 128  # px: its correlation pyramid halves the 1/8 features three times


def masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of values [B, T] where valid [B, T]; 0 where nothing is."""
    if valid is None:
        return values.mean()
    return (values * valid).sum() / valid.sum().clamp(min=1)


def pixel_loss(frames: Tensor, target: Tensor, valid: Tensor | None, kind: str = "l1") -> Tensor:
    """Mean l1 or l2 (squared) error of frames or features, fp32."""
    error = frames.float() - target.float()
    error = error.abs() if kind == "l1" else error.square()
    return masked_mean(error.flatten(2).mean(2), valid)


def load_lpips(vgg: Path | str) -> nn.Module:
    """LPIPS over the VGG16 weights at `vgg`, frozen. Raises WeightsError."""
    import lpips

    with warnings.catch_warnings(action="ignore"):  # it calls torchvision the way of years ago
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    _fill(network.net, read_weights(vgg), vgg, lambda name: "features." + name.split(".", 1)[1])
    return network.eval().requires_grad_(False)


def load_raft(path: Path | str | None, size: str = "raft_large") -> nn.Module:
    """torchvision's RAFT of the weights at `path`, frozen. None: random weights. Raises WeightsError."""
    from torchvision.models import optical_flow

    network = getattr(optical_flow, size)(weights=None)
    if path is not None:
        _fill(network, read_weights(path), path, lambda name: name)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def _fill(network: nn.Module, source: dict[str, Tensor], path: Path | str, their_name) -> None:
    for name, tensor in network.state_dict().items():
        found = source.get(their_name(name))
        if found is None or found.shape != tensor.shape:
            what = "missing" if found is None else f"{list(found.shape)}, not {list(tensor.shape)}"
            raise WeightsError(f"{path} is not the right file: {their_name(name)} is {what}")
        tensor.copy_(found)


def perceptual_loss(network: nn.Module, frames: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """LPIPS distance, fp32."""
    shape = frames.shape[:2]
    with torch.autocast(frames.device.type, enabled=False):
        a, b = (2 * x.float().flatten(0, 1) - 1 for x in (frames, target))
        return masked_mean(network(a, b).view(shape), valid)


def optical_flow(network: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    """RAFT's last flow estimate from first to second [n, 3, h, w] in [0, 1], [n, 2, h', w'] in pixels of the
    input. Sides that are not a multiple of 8, or below 128 px, are resized for RAFT.
    """
    sides = [max(RAFT_SHORTEST_SIDE, -(-side // 8) * 8) for side in first.shape[-2:]]
    ratio = [old / new for old, new in zip(first.shape[-2:], sides, strict=True)]
    with torch.autocast(first.device.type, enabled=False):
        a, b = (2 * x.float() - 1 for x in (first, second))
        if sides != list(first.shape[-2:]):
            a, b = (F.interpolate(x, size=sides, mode="bilinear", align_corners=False) for x in (a, b))
        flow = network(a, b)[-1]
    return flow * flow.new_tensor(ratio[::-1]).view(2, 1, 1)  # channel 0 is x


def flow_loss(network: nn.Module, frames: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Half the sum of forward and backward L1 between the flows of predicted and of true pairs.

    Both frames of a predicted pair are predictions, so clips need two transitions; with one the loss is 0.
    """
    if frames.shape[1] < 2:
        return frames.new_zeros(())
    shape = (frames.shape[0], frames.shape[1] - 1)
    pairs = [(x[:, :-1].flatten(0, 1), x[:, 1:].flatten(0, 1)) for x in (frames, target)]
    total = 0.0
    for direction in (1, -1):
        (a, b), (true_a, true_b) = (pair[::direction] for pair in pairs)
        with torch.no_grad():
            truth = optical_flow(network, true_a, true_b)
        total = total + (optical_flow(network, a, b) - truth).abs().flatten(1).mean(1).view(shape)
    both = None if valid is None else valid[:, 1:] & valid[:, :-1]
    return masked_mean(total / 2, both)
