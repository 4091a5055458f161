"""Stage 0 learns to draw what it saw, and what it exports keeps its codes in half the bytes."""

import dataclasses

import cv2
import lpips
import numpy as np
import pytest
import torch

from config.dataset import DatasetConfig
from config.embodiment import Crop
from config.training import LatentRecipe, TokenizerRecipe
from episodes import demonstration, layout
from episodes.writer import Writer
from models import checkpoint
from models.config import SIZES, VQGANConfig
from models.vqgan import VQGAN
from training import distributed, gate, latent_stage, loop, start, tokenizer, truth
from training.data.sampling import held_out
from training.run import Run

VQ = VQGANConfig(16, (8, 16), 1, 8, 32, norm_groups=4)
SMALL = dataclasses.replace(
    SIZES["vipra_tiny"], name="small", hidden=32, mlp_hidden=32, layers=1, heads=2, vision_vocab=64, vqgan=VQ
)


@pytest.fixture
def ranks():
    yield distributed.start("cpu")
    distributed.stop()


def write_pictures(folder, episodes: int = 6, frames: int = 20) -> np.ndarray:
    """Episodes of a bright square that is somewhere on a dark ground, as folders of PNG files."""
    rng = np.random.default_rng(0)
    drawn = np.full((episodes, frames, 16, 16, 3), 30, np.uint8)
    for e in range(episodes):
        (folder / f"episode_{e}").mkdir(parents=True)
        for t, (x, y) in enumerate(rng.integers(12, size=(frames, 2))):
            drawn[e, t, y : y + 4, x : x + 4] = 220
            cv2.imwrite(str(folder / f"episode_{e}" / f"{t:04d}.png"), drawn[e, t])
    return drawn


def test_training_beats_the_mean_picture_and_the_export_keeps_its_codes(ranks, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "small", SMALL)
    monkeypatch.setattr(start, "SIZES", SIZES)
    frames = write_pictures(tmp_path / "data").reshape(-1, 16, 16, 3)
    plan = TokenizerRecipe(
        stage="tokenizer",
        model="small",
        data={"datasets": [{"path": str(tmp_path / "data"), "rate_hz": 5}], "validation_share": 0.2},
        steps=80,
        global_batch=8,
        micro_batch=8,
        optimizer={"learning_rate": 4e-3, "betas": (0.9, 0.99)},
        schedule={"kind": "cosine", "warmup": 8},
        validation={"every": 1000, "samples": 32},
        checkpoint_every=1000,
    )
    run = Run(tmp_path / "run", plan)
    stage = tokenizer.build(plan, ranks, run)
    assert loop.train(stage, plan, run, ranks, stage.samples())
    found = run.last()
    assert found["validation/l1"] < 0.85 * np.abs(frames - frames.mean(0)).mean()
    assert found["validation/codes_used"] > 4
    assert list((tmp_path / "run" / "images").glob("reconstruction-*.png"))

    stage.export(tmp_path / "out", run, ranks)
    run.close()
    exported = start.open_start(tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    assert loaded.config.action_heads == "none" and loaded.normalizer is None
    x = loaded.vqgan.to_input(torch.from_numpy(frames[:32]))
    assert torch.equal(loaded.vqgan.encode(x), exported.vqgan().encode(x))
    assert all(torch.equal(p, p.bfloat16().float()) for p in loaded.vqgan.parameters())


def test_unreadable_pictures_are_passed_over_in_validation_too(ranks, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "small", SMALL)
    monkeypatch.setattr(start, "SIZES", SIZES)
    write_pictures(tmp_path / "data", 8, 2)
    names = sorted(p.name for p in (tmp_path / "data").iterdir())
    out = held_out(names, 0.5)
    for broken in (names[out.argmax()], names[(~out).argmax()]):
        for picture in (tmp_path / "data" / broken).iterdir():
            picture.write_bytes(b"cut off")
    data = {"datasets": [{"path": str(tmp_path / "data"), "rate_hz": 5}], "validation_share": 0.5}
    fields = {
        "steps": 1,
        "global_batch": 2,
        "micro_batch": 2,
        "optimizer": {"learning_rate": 1e-3},
        "data": data,
        "validation": {"every": 1, "samples": 12},
    }
    plans = [
        (tokenizer, TokenizerRecipe(stage="tokenizer", model="small", **fields), "l1"),
        (latent_stage, LatentRecipe(stage="latent", model="laq_tiny", **fields), "reconstruction_l1"),
    ]
    for module, plan, measured in plans:
        run = Run(tmp_path / plan.stage, plan)
        stage = module.build(plan, ranks, run)
        assert any(stage.held[n]["errors"] for n in range(plan.validation.samples))
        assert np.isfinite(stage.validate(0, run, ranks, plan)[measured])
        run.close()


def test_codes_restart_alike_however_a_batch_is_cut(ranks):
    frames = np.random.default_rng(0).integers(256, size=(8, 1, 16, 16, 3)).astype(np.uint8)
    batch = {"frames": torch.from_numpy(frames), "dataset": torch.zeros(8, dtype=torch.long)}
    restarted = []
    for micro_batch in (8, 2):
        plan = TokenizerRecipe(
            stage="tokenizer", model="small", steps=4, global_batch=8, micro_batch=micro_batch,
            optimizer={"learning_rate": 1e-3}, restart_every=1, validation={"every": 9},
        )  # fmt: skip
        torch.manual_seed(0)
        stage = tokenizer.TokenizerStage(plan, VQGAN(VQ), torch.ones(1, 16, 16))
        for part in (loop.rows(batch, at, at + micro_batch) for at in range(0, 8, micro_batch)):
            stage.module(part, 1)
        assert stage.after_step(1, ranks)["codes_restarted"] > 0
        restarted.append(stage.vqgan.quantize.embedding.weight.detach())
    torch.testing.assert_close(*restarted)


def test_lpips_adds_its_weight_and_teaches_the_decoder():
    """VGG of random weights, which is enough for that."""
    torch.manual_seed(0)
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    module = tokenizer.Reconstructor(VQGAN(VQ), torch.ones(1, 16, 16), network, 0.5)
    batch = {"frames": torch.randint(256, (2, 1, 16, 16, 3)), "dataset": torch.zeros(2, dtype=torch.long)}
    out = module(batch, 1)
    assert out["lpips"] > 0
    torch.testing.assert_close(out["loss"], out["l1"] + out["quantisation"] + 0.5 * out["lpips"])
    out["lpips"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.vqgan.decoder.parameters())
    assert not [name for name, _ in module.named_parameters() if "lpips" in name]


def test_the_gate_reads_places_and_colours_off_what_holds_them(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    features = demonstration.features(["a"], 16, 16)
    features[truth.PLACES] = layout.vector([f"{c}_cup_{axis}" for c in ("red", "blue") for axis in "xyz"])
    with Writer.create(tmp_path / "made", 15, features, "toy") as writer:
        for _ in range(10):
            for _ in range(30):
                x, u = rng.permutation(4)[:2] * 4  # two squares, never one over the other
                y, v = rng.integers(12, size=2)
                frame = np.full((16, 16, 3), 30, np.uint8)
                frame[y : y + 4, x : x + 4] = (220, 30, 30)
                frame[v : v + 4, u : u + 4] = (30, 30, 220)
                row = {truth.PLACES: np.float32([x, y, 0, u, v, 0]) / 400, demonstration.CAMERA: frame}
                row |= {k: np.zeros(1, features[k]["dtype"]) for k in features if k not in row}
                writer.add(row, "move")
            writer.save()
    made = DatasetConfig(path=str(tmp_path / "made"))
    assert truth.generated([DatasetConfig(path=str(tmp_path)), made]) == made

    def columns(picture: np.ndarray) -> np.ndarray:
        return np.concatenate([picture.sum(axis, dtype=float) for axis in (1, 2)], 1)

    inputs = {
        "colour": lambda f: np.concatenate([columns(f[..., c] > 125) for c in (0, 2)], 1),
        "grey": lambda f: columns(f.max(-1) > 125),
        "noise": lambda f: rng.normal(size=(len(f), 2)),
    }
    found = truth.gate(made, inputs, lambda keys: held_out(keys, 0.3))
    assert max(found["colour"].off_mm.values()) < truth.LIMIT_MM
    assert min(found["colour"].told_apart.values()) > 0.98
    for name in ("grey", "noise", "mean"):
        assert min(found[name].off_mm.values()) > 7
        assert max(found[name].told_apart.values()) < 0.75

    shown = []
    half = made.model_copy(
        update={"crop": Crop(left=0, top=0, width=0.5, height=1), "max_episodes": 4, "views": ("front",)}
    )
    truth.gate(half, {"mean": lambda f: shown.append(f.shape) or f.mean((1, 2))}, lambda k: held_out(k, 0.3))
    assert shown == [(6, 16, 8, 3)] * 4
    monkeypatch.setattr(gate, "PLACES", truth.PLACES)
    assert gate.read(half, 16, 0.3).test.tolist().count(True) == 6
