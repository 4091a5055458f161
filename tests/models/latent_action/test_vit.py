"""Our DINOv2 against transformers' `Dinov2WithRegistersModel`, random weights, another patch grid."""

import pytest
import torch
from safetensors.torch import load_file

from models.latent_action.vit import Vit, WeightsError, load_vit
from tests.models.latent_action.sizes import small

CONFIG = small(vit_layers=2)


@pytest.fixture(scope="module")
def theirs():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    model = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=44,  # 11 x 11 positions, resized to 8 x 8
            patch_size=4,
            num_register_tokens=2,
            layerscale_value=0.5,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the names of the DINOv2 authors' file."""
    out = {}
    for name, tensor in state.items():
        if ".query." in name:
            parts = [state[name.replace("query", part)] for part in ("query", "key", "value")]
            name, tensor = name.replace("attention.attention.query", "attn.qkv"), torch.cat(parts)
        elif ".key." in name or ".value." in name:
            continue
        for old, new in (
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.", ""),
            ("encoder.layer.", "blocks."),
            ("attention.output.dense", "attn.proj"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
            ("layernorm.", "norm."),
        ):
            name = name.replace(old, new)
        out[name] = tensor
    return out


@torch.no_grad()
def test_patch_features_equal_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    torch.save(official(load_file(tmp_path / "model.safetensors")), tmp_path / "vit.pth")
    frames = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (frames - mean[:, None, None]) / std[:, None, None]
    expected = theirs(normal).last_hidden_state[:, 3:]
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "vit.pth"):
        vit = Vit(CONFIG)
        load_vit(vit, path)
        torch.testing.assert_close(vit(frames), expected, atol=1e-5, rtol=1e-5)


def test_files_that_do_not_fit_are_refused(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    state = official(load_file(tmp_path / "model.safetensors"))
    path = tmp_path / "vit.pth"
    for change, message in (
        ({"blocks.9.norm1.weight": torch.ones(32)}, "unknown"),
        ({"norm.weight": torch.ones(31)}, r"norm.weight is \[31\]"),
    ):
        torch.save(state | change, path)
        with pytest.raises(WeightsError, match=message):
            load_vit(Vit(CONFIG), path)
    torch.save({"teacher": state}, path)
    with pytest.raises(WeightsError, match="not a map of names to tensors"):
        load_vit(Vit(CONFIG), path)
    path.write_bytes(b"not weights")
    with pytest.raises(WeightsError):
        load_vit(Vit(CONFIG), path)
    with pytest.raises(WeightsError, match="local path"):
        load_vit(Vit(CONFIG), tmp_path / "absent.pth")
