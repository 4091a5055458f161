import pytest
import torch
from torch import distributed, multiprocessing

from models.latent_action.quantizer import Quantizer


def quantizer(codes: int = 8, dim: int = 4, seed: int = 0) -> Quantizer:
    torch.manual_seed(seed)
    return Quantizer(codes, dim)


def test_gradients_reach_the_encoder_and_every_chosen_code():
    model = quantizer()
    h = torch.randn(64, 4, requires_grad=True)
    z, codes, _ = model(h)
    (z - torch.randn_like(z)).square().mean().backward()
    assert h.grad.abs().sum(1).min() > 0
    assert torch.equal(model.codebook.grad.abs().sum(1) > 0, torch.bincount(codes, minlength=8) > 0)


def test_noise_replaces_the_error_at_its_own_length():
    model = quantizer()
    h = torch.randn(256, 4)
    z, codes, chosen = model(h)
    error = (h - model.lookup(codes)).norm(dim=1)
    torch.testing.assert_close((z - h).norm(dim=1), error)
    direction = (z - h) / error[:, None]
    assert direction.mean(0).abs().max() < 0.2  # isotropic: not along the error
    assert torch.equal(chosen, torch.bincount(codes, minlength=8).float())
    distance = torch.cdist(h.double(), model.codebook.double())
    assert torch.equal(codes, distance.argmin(1))


def test_the_decoder_gets_the_code_itself_in_eval_mode_and_nothing_is_counted():
    model = quantizer().eval()
    z, codes, chosen = model(torch.randn(16, 4))
    assert torch.equal(z, model.codebook[codes]) and chosen.sum() == 16
    assert model.usage.sum() == 0


def test_refresh_moves_rare_codes_into_cells_of_used_ones_and_keeps_those():
    model = quantizer()
    with torch.no_grad():
        model.codebook[2:] += 100  # never the nearest
    h = torch.cat([model.codebook[:2].detach() + 0.1 * torch.randn(50, 2, 4)]).flatten(0, 1)
    model(h)
    before = model.codebook.detach().clone()
    assert model.refresh(0.015, torch.Generator().manual_seed(0)) == 6
    after = model.codebook.detach()
    assert torch.equal(after[:2], before[:2])
    assert torch.cdist(after[2:], before[:2]).amin(1).max() < 0.6
    cells = torch.cdist(after[2:], before[:2]).argmin(1)
    assert torch.bincount(cells).tolist() == [3, 3]  # the used codes take turns
    assert len(torch.unique(after, dim=0)) == 8
    assert model.moments.abs().sum() == 0


def test_refresh_without_a_rare_code_changes_nothing():
    model = quantizer(codes=2)
    model(torch.cat([model.codebook.detach()] * 5))
    before = model.codebook.detach().clone()
    assert model.refresh(0.015) == 0 and torch.equal(model.codebook, before)
    assert model.refresh(0.015) == 0  # nothing was counted since: no used code to start from


@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_a_planted_collapse_recovers(spread):
    """Every output chooses one code; two refreshes later at least 6 of 8 are in use."""
    model = quantizer(dim=32)
    with torch.no_grad():
        model.codebook[1:] *= 50
    h = spread * torch.randn(512, 32) + 0.5
    assert len(model(h)[1].unique()) == 1
    for step in range(2):
        model.refresh(0.015, torch.Generator().manual_seed(step))
        model(h)
    share = torch.bincount(model(h)[1], minlength=8) / len(h)
    assert (share > 0.015).sum() >= 6, share


def _rank(rank: int, store: str, out: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = quantizer()
    torch.manual_seed(rank)
    # rank 0 sees only code 0, rank 1 only code 1: together two are used
    _, _, chosen = model(model.codebook.detach()[rank] + 0.01 * torch.randn(40, 4))
    moved = model.refresh(0.015, torch.Generator().manual_seed(rank))
    torch.save((chosen, moved, model.codebook.detach()), f"{out}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks_count_together_and_hold_one_codebook_after_a_refresh(tmp_path):
    # forked: a fresh interpreter would spend its time importing torch
    multiprocessing.start_processes(
        _rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="fork"
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first[0].tolist() == second[0].tolist() == [40, 40, 0, 0, 0, 0, 0, 0]
    assert first[1] == second[1] == 6
    assert torch.equal(first[2], second[2])
