"""The converted latent action model computes what the released file means, by a separate numpy forward."""

import json
import pickle

import numpy as np
import pytest
import torch

from models.convert import laq
from models.folder import CheckpointError
from models.latent_action import folder
from tests.models.convert import laq_reference as reference


def tensors(**changes) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in (reference.weights() | changes).items()}


def released(path, payload=None, **changes):
    """A file as the official trainer writes it."""
    torch.save(
        {"model": tensors(**changes), "steps": 240_000, "val_steps": 120} if payload is None else payload,
        path,
    )
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("laq")
    seen = []
    value, ignored = laq.convert(
        released(root / "laq.pt"), root / "model", reference.SIZES["image"], lambda *step: seen.append(step)
    )
    model, loaded = folder.load(root / "model")
    assert loaded == value
    return root, model, ignored, seen


@pytest.fixture(scope="module")
def clip():
    return np.random.default_rng(1).random((4, 3, 32, 32), dtype=np.float32)


@torch.no_grad()
def test_latents_and_codes_equal_upstreams(converted, clip):
    _, model, _, _ = converted
    latents, codes = reference.encode(reference.weights(), clip)
    ours = model.encoder(torch.from_numpy(clip)[None])[0][0].double()
    torch.testing.assert_close(ours, torch.from_numpy(latents), atol=2e-5, rtol=0)
    assert np.array_equal(model.codes(torch.from_numpy(clip)[None])[0].numpy(), codes)
    assert len(np.unique(codes)) > 2 and np.abs(latents).mean() > 0.1


@torch.no_grad()
def test_decoded_frames_equal_upstreams(converted, clip):
    _, model, _, _ = converted
    codes = np.random.default_rng(2).integers(0, 8, (3, 16))
    expected = reference.decode(reference.weights(), clip[:-1], codes)
    ours = model.predict(torch.from_numpy(clip)[None, :-1], torch.from_numpy(codes)[None])[0].double()
    torch.testing.assert_close(ours, torch.from_numpy(expected), atol=2e-5, rtol=2e-5)
    assert expected.std() > 0.1


def test_sizes_come_from_the_tensors(converted):
    config = converted[1].config
    assert (config.grid, config.code_grid, config.strides) == (16, 4, (2, 2))
    assert (config.vit_layers, config.vit_heads, config.registers) == (2, 2, 4)
    assert (config.heads, config.head_dim, config.codebook_size, config.code_dim) == (3, 8, 8, 6)
    assert not config.deltas and config.decoder == "causal"


def test_every_tensor_is_converted_or_ignored_with_a_reason(converted):
    root, model, ignored, seen = converted
    names, count = set(tensors()), len(list(model.named_parameters()))
    assert count + len(ignored) == len(names) + 2  # steps and val_steps are not tensors of the model
    assert set(ignored) - names == {"steps", "val_steps"}
    assert ignored["fusion_layer.0.weight"] == "never used by the released model"
    assert json.loads((root / "model" / "source.json").read_text())["ignored"] == ignored
    assert seen[-1][1] == seen[-1][2] == sum(p.numel() * 4 for p in model.parameters())


def test_training_networks_that_ride_along_are_ignored(tmp_path):
    extra = {"lpips.lin0.model.1.weight": np.ones(3, np.float32), "flow_model.x": np.ones(2, np.float32)}
    _, ignored = laq.convert(released(tmp_path / "laq.pt", **extra), tmp_path / "out", 32)
    assert "training only" in ignored["lpips.lin0.model.1.weight"] and "flow_model.x" in ignored


@pytest.mark.parametrize("wrapper", [None, "module", "state_dict"])
def test_files_of_other_writers_load(tmp_path, wrapper):
    prefixed = {f"module.{name}": tensor for name, tensor in tensors().items()}
    path = released(tmp_path / "laq.pt", payload={wrapper: prefixed} if wrapper else prefixed)
    assert set(laq.read(path)[0]) == set(tensors())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_2.weight": np.ones(2, np.float32)}, r"unknown tensors \['decoder_2.weight'\]"),
        ({"vq_to_cond.2.0.beta": np.ones(128, np.float32)}, "should be constant zeros"),
        ({"to_pixels.0.bias": np.full(12, np.nan, np.float32)}, "to_pixels.0.bias holds NaN"),
        (
            {"to_pixels.0.bias": np.ones(13, np.float32)},
            r"decoder.head.linear.bias is \[13\], expected \[12\]",
        ),
        ({"vq.codebooks": np.ones(8, np.float32)}, "not the released latent action model"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        laq.convert(released(tmp_path / "laq.pt", **changes), tmp_path / "out", 32)
    assert not (tmp_path / "out").exists()


def test_a_missing_tensor_is_named(tmp_path):
    some = tensors()
    del some["vq_encoder.2.bias"]
    with pytest.raises(CheckpointError, match=r"encoder\.downsample\.2\.bias"):
        laq.convert(released(tmp_path / "laq.pt", payload={"model": some}), tmp_path / "out", 32)


def test_what_is_not_a_file_says_so(tmp_path):
    for path, what in ((tmp_path, "is a folder"), (tmp_path / "no.pt", "does not exist")):
        with pytest.raises(CheckpointError, match=f"{what}: give the released file"):
            laq.read(path)


def test_code_in_a_file_is_refused_and_garbage_is_an_error(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="refused"):
        laq.read(tmp_path / "evil.pt")
    (tmp_path / "garbage.pt").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(CheckpointError):
        laq.read(tmp_path / "garbage.pt")
    with pytest.raises(CheckpointError, match="vipra-laq"):
        laq.read(tmp_path / "absent.pt")
    whole = released(tmp_path / "laq.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a readable PyTorch file"):
        laq.read(tmp_path / "cut.pt")


def test_the_command_says_what_it_ignored(tmp_path, capsys):
    assert laq.main([str(released(tmp_path / "laq.pt")), str(tmp_path / "out"), "--image-size", "32"]) == 0
    text = capsys.readouterr().out
    assert "ignored, never used by the released model: 4 (fusion_layer.0.weight" in text
    assert folder.load(tmp_path / "out")[1] in text
