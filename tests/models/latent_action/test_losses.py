"""Perceptual terms; their networks have random weights here, which is enough for gradients and masks."""

from functools import partial

import pytest
import torch
from torchvision.models import vgg

from models.latent_action.losses import (
    flow_loss,
    load_lpips,
    load_raft,
    optical_flow,
    perceptual_loss,
    pixel_loss,
)
from models.latent_action.model import LatentActionModel
from models.latent_action.vit import WeightsError
from tests.models.latent_action.sizes import small


@pytest.fixture(scope="module")
def raft():
    """RAFT with one of its twelve refinements."""
    torch.manual_seed(0)
    network = load_raft(None, "raft_small")
    assert not any(p.requires_grad for p in network.parameters())
    return partial(network, num_flow_updates=1)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(vgg.make_layers(vgg.cfgs["D"], batch_norm=False).state_dict(prefix="features."), path)
    return path


def video(frames: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_pixel_loss_leaves_masked_transitions_out():
    target = video()
    frames = target.clone()
    frames[:, 2] += 0.5
    valid = torch.tensor([[True, True, False]])
    assert pixel_loss(frames, target, valid) == 0
    torch.testing.assert_close(pixel_loss(frames, target, None), torch.tensor(0.5 / 3))
    torch.testing.assert_close(pixel_loss(frames, target, None, "l2"), torch.tensor(0.25 / 3))
    assert pixel_loss(frames, target, torch.zeros(1, 3, dtype=torch.bool)) == 0


def test_flow_gradients_reach_the_decoder_and_raft_stays_frozen(raft):
    torch.manual_seed(0)
    model = LatentActionModel(small())
    out = model(video(4))
    flow_loss(raft, out.frames, out.target, None).backward()
    assert model.decoder.head.linear.weight.grad.abs().sum() > 0
    assert model.encoder.project.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in raft.func.parameters())


def test_flow_of_identical_clips_costs_nothing(raft):
    assert flow_loss(raft, video(), video(), None) == 0
    assert flow_loss(raft, video(seed=1), video(), None) > 0
    assert flow_loss(raft, video(1, seed=1), video(1), None) == 0  # one transition has no pair


def test_flow_is_half_the_sum_of_both_directions_over_pairs_of_real_frames(raft):
    frames, target = video(3, seed=1), video(3)
    by_pair = []
    for i in range(2):
        forward = optical_flow(raft, frames[:, i], frames[:, i + 1])
        forward = forward - optical_flow(raft, target[:, i], target[:, i + 1])
        backward = optical_flow(raft, frames[:, i + 1], frames[:, i])
        backward = backward - optical_flow(raft, target[:, i + 1], target[:, i])
        by_pair.append((forward.abs().mean() + backward.abs().mean()) / 2)
    torch.testing.assert_close(flow_loss(raft, frames, target, None), sum(by_pair) / 2)
    valid = torch.tensor([[True, True, False]])
    torch.testing.assert_close(flow_loss(raft, frames, target, valid), by_pair[0])


@torch.no_grad()
def test_small_or_odd_pictures_are_resized_for_raft_and_flow_is_in_their_pixels(raft):
    a, b = torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)
    wide = (
        torch.nn.functional.interpolate(a, size=(130, 70)),
        torch.nn.functional.interpolate(b, size=(130, 70)),
    )
    assert optical_flow(raft, *wide).shape[2:] == (136, 128)
    # shrunk by two, the same motion is half as many pixels
    half = [torch.nn.functional.avg_pool2d(x, 2) for x in (a, b)]
    back = [torch.nn.functional.interpolate(x, size=(128, 128), mode="bilinear") for x in half]
    torch.testing.assert_close(optical_flow(raft, *half), optical_flow(raft, *back) / 2)


def test_lpips_is_zero_for_equal_frames_and_differentiable(vgg_file):
    network = load_lpips(vgg_file)
    frames = video(2, seed=1).requires_grad_()
    assert perceptual_loss(network, video(2), video(2), None) == 0
    value = perceptual_loss(network, frames, video(2), torch.tensor([[True, False]]))
    value.backward()
    assert value > 0 and frames.grad[:, 0].abs().sum() > 0 and frames.grad[:, 1].abs().sum() == 0
    source = torch.load(vgg_file, weights_only=True)
    assert torch.equal(network.net.slice1[0].weight, source["features.0.weight"])
    assert torch.equal(network.net.slice5[-2].weight, source["features.28.weight"])


def test_wrong_weights_are_refused(raft, vgg_file, tmp_path):
    with pytest.raises(WeightsError, match="not the right file"):
        load_raft(vgg_file, "raft_small")
    torch.save(
        raft.func.state_dict() | {"update_block.flow_head.conv1.bias": torch.ones(3)}, tmp_path / "x.pth"
    )
    with pytest.raises(WeightsError, match=r"bias is \[3\], not"):
        load_raft(tmp_path / "x.pth", "raft_small")
