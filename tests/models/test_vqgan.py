import copy

import numpy as np
import pytest
import torch

from models.config import SIZES, VQGANConfig
from models.vqgan import VQGAN
from tests.models.golden import folder, vqgan_state

SMALL = VQGANConfig(32, (16, 32), 1, 8, 64, norm_groups=8)


@pytest.fixture(scope="module")
def upstream():
    path = folder("vqgan")
    config, weights = vqgan_state(path / "vqgan_params.pkl")
    model = VQGAN(config)
    model.load_state_dict(weights)
    images = torch.from_numpy(np.load(path / "inputs.npz")["images_uint8"])
    return model.eval(), images, np.load(path / "expected.npz")


@torch.no_grad()
def test_codes_equal_upstreams_exactly(upstream):
    model, images, expected = upstream
    x = model.to_input(images)
    latents = model.latents(x).permute(0, 2, 3, 1)
    torch.testing.assert_close(latents, torch.from_numpy(expected["encoder_out"]), atol=2e-5, rtol=0)
    assert np.array_equal(model.encode(x).view(2, 16, 16).numpy(), expected["codes"])


@torch.no_grad()
def test_an_encoder_in_bf16_changes_few_codes_and_one_that_is_only_channels_last_none(upstream):
    model, images, expected = upstream
    for dtype, low, high in ((torch.float32, 0, 0), (torch.bfloat16, 0.001, 0.05)):
        other = copy.deepcopy(model)
        other.set_encoder(dtype)
        assert other.encoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
        assert other.quantize.embedding.weight.dtype == torch.float32
        codes = other.encode(other.to_input(images)).view(2, 16, 16).numpy()
        assert low <= (codes != expected["codes"]).mean() <= high


@torch.no_grad()
def test_reconstruction_equals_upstreams(upstream):
    model, _, expected = upstream
    codes = torch.from_numpy(expected["codes"]).long().flatten(1)
    torch.testing.assert_close(
        model.lookup(codes).permute(0, 2, 3, 1), torch.from_numpy(expected["quantized"]), atol=1e-6, rtol=0
    )
    image = model.decode(codes).clamp(-1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(image, torch.from_numpy(expected["reconstruction"]), atol=2e-5, rtol=0)


def test_official_size_has_the_277_tensors_and_the_16x16_grid_of_lwms():
    with torch.device("meta"):
        model = VQGAN(SIZES["vipra_7b"].vqgan)
    assert len(model.state_dict()) == 277
    assert SIZES["vipra_7b"].vqgan.grid == 16
    assert model.quantize.embedding.weight.shape == (8192, 64)


def test_decoding_inverts_the_shape_of_encoding():
    model = VQGAN(SMALL)
    frames = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    x = model.to_input(frames)
    assert x.min() >= -1 and x.max() <= 1
    codes = model.encode(x)
    assert codes.shape == (3, 256) and codes.dtype == torch.int64
    assert model.decode(codes).shape == x.shape


def test_nearest_code_is_the_codebook_vector_at_least_distance():
    torch.manual_seed(0)
    model = VQGAN(SMALL)
    latents = torch.randn(2, 8, 16, 16) / 64
    flat = latents.flatten(2).transpose(1, 2)
    distance = torch.cdist(flat.double(), model.quantize.embedding.weight.double())
    assert torch.equal(model.nearest(latents), distance.argmin(-1))


def test_training_lowers_the_reconstruction_error_through_the_quantiser():
    torch.manual_seed(0)
    model = VQGAN(SMALL)
    rows = torch.arange(32)[:, None, None].expand(32, 32, 3) * 8
    x = model.to_input(torch.stack([rows, rows.flip(0)]).to(torch.uint8))
    model.restart_codes(model.latents(x), model.encode(x), torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    errors = []
    for step in range(40):
        out = model(x)
        error = (out.reconstruction - x).abs().mean()
        optimizer.zero_grad()
        (error + out.loss).backward()
        optimizer.step()
        errors.append(error.item())
        if step % 10 == 9:
            model.restart_codes(out.latents, out.codes)
    assert errors[-1] < 0.5 * errors[0]
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0


def test_restarted_codes_are_seen_latents_and_used_ones_stay():
    model = VQGAN(SMALL)
    latents = torch.randn(1, 8, 16, 16)
    codes = torch.zeros(1, 256, dtype=torch.long)
    before = model.quantize.embedding.weight.detach().clone()
    assert model.restart_codes(latents, codes) == 63
    after = model.quantize.embedding.weight.detach()
    assert torch.equal(after[0], before[0])
    seen = latents.flatten(2).transpose(1, 2)[0]
    assert torch.cdist(after[1:].double(), seen.double()).amin(1).max() < 1e-6
