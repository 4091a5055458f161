"""Stage 1's step: its terms, its schedule, and a short training on real frames (BridgeData V2)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from config.dataset import DatasetConfig
from config.training import LatentObjective
from models.latent_action.config import LatentActionConfig
from models.latent_action.losses import load_raft
from models.latent_action.model import LatentActionModel, to_clip
from tests.training.replicated import SMALL
from training import latent
from training.data.open import open_dataset
from training.latent import Terms

BRIDGE = Path(__file__).resolve().parents[3] / "shared" / "data" / "bridge_v2_sample"


@pytest.fixture(scope="module")
def bridge():
    """Clips of every episode with two views, [n, 2, 8, 3, 64, 64]."""
    if not BRIDGE.is_dir():
        pytest.skip(f"no Bridge sample at {BRIDGE}")
    reader = open_dataset(DatasetConfig(path=str(BRIDGE)))
    episodes = [reader.episode(i) for i in range(len(reader))]
    clips = [
        torch.stack([to_clip(torch.from_numpy(e.frames(view, np.arange(8))), 64) for view in e.views[:2]])
        for e in episodes
        if len(e.views) >= 2
    ]
    assert len(clips) >= 4
    return torch.stack(clips)


def model(config: LatentActionConfig = SMALL) -> LatentActionModel:
    torch.manual_seed(0)
    return LatentActionModel(config)


def test_the_refresh_fires_when_table_3_says():
    due = [step for step in range(0, 20_001) if latent.refresh_due(step, LatentObjective().refresh)]
    expected = [*range(10, 101, 10), *range(200, 1001, 100), *range(2000, 10_001, 1000)]
    assert due == expected
    official = ((1000, 100), (10_000, 1000), (40_000, 2000), (90_000, 3000), (120_000, 5000))
    due = [step for step in range(1, 200_001) if latent.refresh_due(step, official)]
    assert due[:11] == [*range(100, 1001, 100), 2000] and due[-1] == 120_000


def test_the_flow_weight_starts_after_its_step_and_ramps():
    objective = LatentObjective()
    assert [latent.flow_weight(objective, step) for step in (0, 60_000)] == [0, 0]
    assert latent.flow_weight(objective, 65_000) == pytest.approx(0.05)
    assert latent.flow_weight(objective, 70_000) == latent.flow_weight(objective, 10**6) == 0.1


def test_the_flow_term_is_off_before_its_start_step():
    calls = []

    class Raft(torch.nn.Module):
        def forward(self, a, b):
            calls.append(a.shape)
            return [a[:, :2] - b[:, :2]]

    m, clip = model(), torch.rand(1, 3, 3, 64, 64)
    objective = LatentObjective(flow_start=5, flow_ramp=0)
    _, before = latent.loss(m, clip, 5, objective, Terms(raft=Raft()))
    assert "flow" not in before and not calls
    total, after = latent.loss(m, clip, 6, objective, Terms(raft=Raft()))
    assert len(calls) == 4 and after["flow"] > 0
    torch.testing.assert_close(total.detach(), after["pixel"] + 0.1 * after["flow"])
    total.backward()
    assert m.decoder.head.linear.weight.grad.abs().sum() > 0


def test_terms_without_weights_are_off_and_said_to_be(tmp_path):
    terms, notes = latent.build_terms(LatentObjective())
    assert terms == Terms() and len(notes) == 2
    assert "LPIPS" in notes[0] and "RAFT" in notes[1]
    assert latent.build_terms(LatentObjective(lpips_weight=0, flow_weight=0)) == (Terms(), [])
    torch.save(load_raft(None, "raft_small").state_dict(), tmp_path / "raft.pth")
    objective = LatentObjective(flow_network="raft_small", lpips_weight=0)
    terms, notes = latent.build_terms(objective, raft=tmp_path / "raft.pth")
    assert terms.raft is not None and not notes
    terms, notes = latent.build_terms(objective, "features", raft=tmp_path / "raft.pth")
    assert terms.raft is None and "predicts features" in notes[0]


def test_repeat_padded_frames_cost_nothing():
    m, objective = model(), LatentObjective()
    clip = torch.rand(1, 4, 3, 64, 64)
    valid = torch.tensor([[True, True, True, False]])
    _, metrics = latent.loss(m, clip, 1, objective, Terms(), valid)
    torch.manual_seed(1)
    _, everything = latent.loss(m, clip, 1, objective, Terms())
    torch.manual_seed(1)
    out = m(clip)
    error = (out.frames - clip[:, 1:]).abs().flatten(2).mean(2)[0]
    torch.testing.assert_close(everything["pixel"], error.mean().detach())
    torch.manual_seed(1)
    _, metrics = latent.loss(m, clip, 1, objective, Terms(), valid)
    torch.testing.assert_close(metrics["pixel"], error[:2].mean().detach())


def test_the_vit_has_its_own_rate_and_vectors_do_not_decay():
    m = model()
    groups = latent.parameter_groups(m, 1e-4, 0.1, weight_decay=0.01)
    by_id = {id(p): group for group in groups for p in group["params"]}
    assert len(by_id) == len(list(m.parameters()))
    named = {name: by_id[id(p)] for name, p in m.named_parameters()}
    assert named["encoder.vit.patch_embed.weight"]["lr"] == pytest.approx(1e-5)
    assert named["encoder.project.weight"]["lr"] == 1e-4
    assert named["encoder.project.weight"]["weight_decay"] == 0.01
    for name in ("quantizer.codebook", "encoder.project.bias", "encoder.norm.weight"):
        assert named[name]["weight_decay"] == 0
    frozen = model(dataclasses.replace(SMALL, target="features", residual=False))
    rates = {group["lr"] for group in latent.parameter_groups(frozen, 1e-4)}
    assert rates == {1e-4}


def train(m: LatentActionModel, clips: torch.Tensor, objective: LatentObjective, steps: int, batch: int):
    optimizer = torch.optim.AdamW(latent.parameter_groups(m, 1e-3, 1.0), betas=(0.9, 0.99))
    generator, history = torch.Generator().manual_seed(0), []
    for step in range(1, steps + 1):
        rows = torch.randint(len(clips), (batch,), generator=generator)
        total, metrics = latent.loss(m, clips[rows], step, objective, Terms())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 4.0)
        optimizer.step()
        if latent.refresh_due(step, objective.refresh):
            latent.refresh(m, step, objective)
        history.append(metrics)
    return history


def test_codebook_usage_stays_above_6_of_8_on_real_video(bridge):
    m = model()
    train(m, bridge[:, 0, :6], LatentObjective(), steps=65, batch=4)
    m.eval()
    share = torch.bincount(m.codes(bridge[:, 0]).flatten(), minlength=8).float()
    assert ((share / share.sum()) > 0.005).sum() > 6, share


def test_mvp_lam_trains_both_terms_on_synchronised_views(bridge):
    m, objective = model(dataclasses.replace(SMALL, residual=False)), LatentObjective(cross_weight=1.0)
    history = train(m, bridge, objective, steps=20, batch=2)
    assert history[-1]["cross"] < 0.6 * history[0]["cross"]
    assert history[-1]["pixel"] < 0.6 * history[0]["pixel"]
    torch.testing.assert_close(history[0]["loss"], history[0]["pixel"] + history[0]["cross"])


def test_views_of_different_moments_and_single_views_train_on_the_self_term_alone(bridge):
    m, objective = model(), LatentObjective(cross_weight=1.0)
    paired = torch.tensor([True, False])
    torch.manual_seed(0)
    _, some = latent.loss(m, bridge[:2], 1, objective, Terms(), paired=paired)
    torch.manual_seed(0)
    _, none = latent.loss(m, bridge[:2], 1, objective, Terms(), paired=paired & False)
    assert some["cross"] > 0 and none["cross"] == 0
    _, single = latent.loss(m, bridge[:2, :1], 1, objective, Terms())
    assert "cross" not in single and single["loss"] == single["pixel"]


def test_lapas_two_frame_quantiser_trains(bridge):
    m = model(dataclasses.replace(SMALL, code_grid=2, deltas=True, decoder="cross", residual=False))
    objective = LatentObjective(pixel_loss="l2", lpips_weight=0, flow_weight=0)
    pairs = bridge[:, 0, ::7]  # o_t and o_{t+7}
    history = train(m, pairs, objective, steps=20, batch=4)
    assert m.codes(pairs).shape == (len(pairs), 1, 4)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
