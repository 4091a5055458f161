import dataclasses

import pytest
import torch

from models.config import ModelConfigError
from models.folder import CheckpointError
from models.latent_action import folder
from models.latent_action.blocks import PositionBias
from models.latent_action.config import SIZES, LatentActionConfig
from models.latent_action.model import ClipError, LatentActionModel, encode_labels, to_clip
from tests.models.latent_action.sizes import small


def model(seed: int = 0, **choices) -> LatentActionModel:
    """Random weights; what starts at zero (conditioning, heads) is drawn too, so that it cannot hide."""
    torch.manual_seed(seed)
    built = LatentActionModel(small(**choices))
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "modulation" in name or "head.linear" in name:
                parameter.normal_(std=0.2)
    return built.eval()


def clip(frames: int = 5, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, frames, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_a_future_frame_or_latent_changes_no_earlier_prediction(residual):
    m, frames = model(residual=residual), clip()
    codes = torch.randint(0, 8, (2, 5, 16))
    before = m.predict(frames, codes)
    for t in range(5):
        other_frames, other_codes = frames.clone(), codes.clone()
        other_frames[:, t] = 1 - other_frames[:, t]
        other_codes[:, t] = (other_codes[:, t] + 1) % 8
        for after in (m.predict(other_frames, codes), m.predict(frames, other_codes)):
            assert torch.equal(after[:, :t], before[:, :t])
            changed = (after - before).abs().amax((0, 2, 3, 4)) > 1e-4
            assert changed[t:].all(), f"frame {t} must matter for every prediction from {t} on: {changed}"


@torch.no_grad()
def test_a_latent_action_depends_on_frames_before_and_after_it():
    m, frames = model(), clip()
    before = m.encoder(frames)[0]
    for t in (0, 4):
        other = frames.clone()
        other[:, t] = 1 - other[:, t]
        assert ((m.encoder(other)[0] - before).abs().amax((0, 2, 3)) > 1e-5).all()


@torch.no_grad()
def test_lapas_decoder_sees_one_frame_and_one_latent_action():
    m, frames = model(decoder="cross", deltas=True, code_grid=2), clip()
    codes = torch.randint(0, 8, (2, 5, 4))
    before = m.predict(frames, codes)
    for change in ("frame", "code"):
        other_frames, other_codes = frames.clone(), codes.clone()
        if change == "frame":
            other_frames[:, 2] = 1 - other_frames[:, 2]
        else:
            other_codes[:, 2] = (other_codes[:, 2] + 1) % 8
        moved = (m.predict(other_frames, other_codes) - before).abs().amax((0, 2, 3, 4)) > 1e-4
        assert moved.tolist() == [False, False, True, False, False]
    assert m.codes(frames[:, :2]).shape == (2, 1, 4)


def test_training_gradients_reach_every_parameter():
    for choices in ({}, {"decoder": "cross", "deltas": True, "code_grid": 2}):
        m = model(**choices).train()
        out = m(clip(3))
        assert out.frames.shape == out.target.shape == (2, 2, 3, 32, 32)
        (out.frames - out.target).abs().mean().backward()
        without = [name for name, p in m.named_parameters() if p.grad is None or not p.grad.any()]
        assert not without


def test_labels_of_a_16_frame_window_are_15_transitions_of_16_codes():
    m = model().train()
    window = clip(16, 1)[0]
    codes = encode_labels(m, window)
    assert codes.shape == (15, 16) and codes.dtype == torch.int64
    assert torch.equal(codes, encode_labels(m, window[None])[0])
    assert m.training  # left as it was
    assert m.quantizer.usage.sum() == 0
    assert codes.min() >= 0 and codes.max() < 8 and len(codes.unique()) > 1


def test_labels_of_overlapping_windows_look_at_every_frame_once():
    m, frames = model(), clip(6, 1)[0]
    windows = torch.tensor([[0, 0, 1, 2], [1, 2, 3, 4], [3, 4, 5, 5]])
    looked = []
    m.encoder.vit.register_forward_hook(lambda _, inputs, __: looked.append(len(inputs[0])))
    codes = encode_labels(m, frames, windows)
    assert looked == [6]
    assert torch.equal(codes, encode_labels(m, frames[windows]))


@torch.no_grad()
def test_rollout_feeds_predictions_back():
    m, frames = model(), clip(2)
    codes = torch.randint(0, 8, (2, 4, 16))
    out = m.rollout(frames, codes)
    assert out.shape == (2, 3, 3, 32, 32)
    first = m.predict(frames, codes[:, :2])[:, -1:].clamp(0, 1)
    torch.testing.assert_close(out[:, :1], first)
    second = m.predict(torch.cat([frames, first], 1), codes[:, :3])[:, -1:].clamp(0, 1)
    torch.testing.assert_close(out[:, 1:2], second)


def test_position_bias_of_offsets_equals_that_of_pairs():
    torch.manual_seed(0)
    bias = PositionBias(16, 3)
    axis = (torch.arange(4) + 0.5) / 4
    place = torch.cartesian_prod(axis, axis)
    offset = place[:, None] - place
    pairs = bias.net(offset.sign() * offset.abs().log1p()).permute(2, 0, 1)
    torch.testing.assert_close(bias(4), pairs)


def test_a_feature_target_is_the_frozen_vits():
    m = model(target="features").train()
    frames = clip(3)
    out = m(frames)
    with torch.no_grad():
        expected = m.encoder.vit(frames[:, 1:].flatten(0, 1)).unflatten(0, (2, 2))
    torch.testing.assert_close(out.target, expected)
    assert out.frames.shape == (2, 2, 64, 32)
    out.frames.square().mean().backward()
    assert all(p.grad is None for p in m.encoder.vit.parameters())
    with pytest.raises(ClipError, match="predicts features"):
        m.rollout(frames[:, :1], out.codes)


def test_views_are_crossed_with_each_others_latents():
    m = model()
    views = torch.stack([clip(3), clip(3).flip(-1)], 1)
    out = m(views, cross=True)
    z = m.quantizer.lookup(out.codes).unflatten(0, (2, 2))
    torch.testing.assert_close(
        out.crossed.unflatten(0, (2, 2))[:, 0], m.decoder(views[:, 0, :-1], z[:, 1]), atol=1e-5, rtol=1e-5
    )
    assert m(views[:, :1], cross=True).crossed is None  # single views: nothing to swap
    assert m(views[:, 0], cross=True).crossed is None


def test_a_saved_model_loads_as_it_was(tmp_path):
    m = model()
    value = folder.save(tmp_path / "m", m)
    again, loaded = folder.load(tmp_path / "m")
    assert loaded == value and again.config == m.config and not again.training
    assert torch.equal(again.codes(clip()), m.codes(clip()))
    assert again.quantizer.usage.sum() == 0
    assert folder.read_config(tmp_path / "m") == m.config


def test_damaged_folders_are_refused(tmp_path):
    folder.save(tmp_path / "m", model())
    with pytest.raises(CheckpointError, match="vipra train latent"):
        folder.load(tmp_path / "absent")
    config = tmp_path / "m" / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"width": 32', '"width": 33'))
    with pytest.raises(CheckpointError):
        folder.load(tmp_path / "m")
    config.write_text(whole.replace("latent_action", "model"))
    with pytest.raises(CheckpointError, match="not a latent action model"):
        folder.load(tmp_path / "m")


def test_pictures_become_clips_in_the_unit_range():
    frames = torch.randint(0, 256, (2, 3, 20, 40, 3), dtype=torch.uint8)
    x = to_clip(frames, 32)
    assert x.shape == (2, 3, 3, 32, 32) and x.min() >= 0 and x.max() <= 1
    same = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    torch.testing.assert_close(to_clip(same, 32), same.permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize("shape", [(2, 1, 3, 32, 32), (2, 3, 3, 32, 30), (3, 3, 32, 32)])
def test_clips_of_another_shape_are_refused(shape):
    with pytest.raises(ClipError, match="expected"):
        model()(torch.zeros(shape))


@pytest.mark.parametrize(
    "change",
    [
        {"patch": 5},
        {"code_grid": 3},
        {"head_dim": 7},
        {"vit_heads": 5},
        {"dropout": 1.0},
        {"decoder": "x"},
        {"target": "features", "residual": True},
        {"deltas": 1},
        {"codebook_size": 0},
    ],
)
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ModelConfigError, match=next(iter(change))):
        small(**change)


def test_the_paper_size_has_table_3s_numbers():
    config = SIZES["laq_base"]
    assert (config.width, config.heads, config.head_dim) == (768, 16, 64)
    assert (config.encoder_layers, config.decoder_layers, config.codebook_size) == (6, 8, 8)
    assert (config.grid, config.codes, config.strides, config.code_dim) == (16, 16, (2, 2), 32)
    assert SIZES["lapa_base"].codes == 4 and SIZES["lapa_base"].strides == (2, 2, 2)
    with torch.device("meta"):
        big = LatentActionModel(config)
    assert 290e6 < sum(p.numel() for p in big.parameters()) < 300e6
    assert LatentActionConfig.from_dict(config.to_dict()) == config
    assert dataclasses.replace(config, name="x") != config
