import pytest
import torch
from torch import nn

from models.flow import Target, flow_loss, integrate, sample_target, schedule


def test_time_is_distributed_as_beta_with_mass_at_noise():
    actions = torch.zeros(100_000, 1, 1)
    target = sample_target(actions, generator=torch.Generator().manual_seed(0))
    assert target.s.min() >= 0 and target.s.max() <= 0.999
    # b ~ Beta(1.5, 1): P(b <= x) = x^1.5; s = 0.999 (1 - b)
    for x in (0.25, 0.5, 0.75):
        share = (1 - target.s / 0.999 <= x).float().mean().item()
        assert share == pytest.approx(x**1.5, abs=0.01)


def test_path_runs_from_noise_to_action_and_velocity_is_its_slope():
    actions = torch.randn(64, 3, 2)
    target = sample_target(actions)
    s = target.s[:, None, None]
    torch.testing.assert_close(target.x + (1 - s) * target.velocity, actions, atol=1e-5, rtol=0)
    literal = sample_target(actions, "paper_literal")
    s = literal.s[:, None, None]
    torch.testing.assert_close(literal.x + s * literal.velocity, actions, atol=1e-5, rtol=0)


def test_loss_leaves_repeat_padded_actions_out():
    prediction, velocity = torch.ones(1, 2, 3), torch.tensor([[[1.0] * 3, [9.0] * 3]])
    target = Target(torch.zeros(1, 2, 3), torch.zeros(1), velocity, torch.ones(1, 1, 1))
    assert flow_loss(prediction, target).item() == pytest.approx(32.0)
    assert flow_loss(prediction, target, torch.tensor([[True, False]])).item() == 0.0


def test_samplers_follow_a_known_field():
    # du/ds = 2 s u: u(1) = e u(0)
    def field(u, s):
        return 2 * s * u

    u = torch.ones(1, 1, 1)
    euler = integrate(field, u, 200).item()
    heun = integrate(field, u, 20, "heun").item()
    assert euler == pytest.approx(2.71828, abs=4e-2)
    assert heun == pytest.approx(2.71828, abs=5e-3)
    by_hand = 1.0
    for k in range(10):
        by_hand += 0.1 * 2 * (k / 10) * by_hand
    assert integrate(field, u).item() == pytest.approx(by_hand, rel=1e-6)


def test_first_slope_given_saves_one_evaluation_and_changes_nothing():
    times = []

    def field(u, s):
        times.append(s)
        return 0.3 * u + s

    u = torch.randn(2, 14, 3)
    whole = integrate(field, u)
    assert times == [s for s, _ in schedule(10)] == pytest.approx([k / 10 for k in range(10)])
    times.clear()
    assert torch.equal(integrate(field, u, first=0.3 * u), whole)
    assert len(times) == 9


def test_integration_is_in_fp32_for_bf16_networks():
    def field(u, s):
        return torch.full_like(u, 1e-3, dtype=torch.bfloat16)

    out = integrate(field, torch.full((1, 1, 1), 8.0), 10)
    assert out.dtype == torch.float32
    assert out.item() == pytest.approx(8.001, abs=1e-5)  # bf16 would stay at 8


def test_heun_is_refused_for_the_literal_objective():
    with pytest.raises(ValueError, match="use euler"):
        integrate(lambda u, s: u, torch.zeros(1, 1, 1), sampler="heun", objective="paper_literal")


class Field(nn.Module):
    """A small network g(u, s) for one-dimensional data."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        )

    def forward(self, u, s):
        s = s[:, None, None] if torch.is_tensor(s) else torch.full_like(u, s)
        waves = [torch.sin(3.1416 * s), torch.cos(3.1416 * s)]
        return self.layers(torch.cat([u, s, *waves, s * u], -1))


def two_modes(n: int) -> torch.Tensor:
    """Half N(-1, .1), half N(2, .2)."""
    low = torch.rand(n, 1, 1) < 0.5
    return torch.where(low, -1 + 0.1 * torch.randn(n, 1, 1), 2 + 0.2 * torch.randn(n, 1, 1))


def trained(objective: str) -> Field:
    torch.manual_seed(0)
    field = Field()
    optimizer = torch.optim.Adam(field.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        target = sample_target(two_modes(512), objective)
        loss = flow_loss(field(target.x, target.s), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return field


def modes(samples: torch.Tensor) -> tuple[float, float, float, float]:
    """Share and mean of the low mode, mean of the high one, share between the modes."""
    low = samples < 0.5
    between = (samples > -0.5) & (samples < 1.2)
    return (
        low.float().mean().item(),
        samples[low].mean().item(),
        samples[~low].mean().item(),
        between.float().mean().item(),
    )


@torch.no_grad()
def sample(field: Field, **choices) -> torch.Tensor:
    return integrate(field, torch.randn(4000, 1, 1), **choices)


def test_objective_and_samplers_recover_two_modes():
    field = trained("corrected")
    for choices in ({"steps": 10}, {"steps": 10, "sampler": "heun"}):
        share, low, high, between = modes(sample(field, **choices))
        assert share == pytest.approx(0.5, abs=0.06)
        assert low == pytest.approx(-1, abs=0.15) and high == pytest.approx(2, abs=0.15)
        assert between < 0.08


def test_literal_objective_collapses_as_printed_and_recovers_backwards():
    field = trained("paper_literal")

    @torch.no_grad()
    def as_printed() -> torch.Tensor:
        u = torch.randn(4000, 1, 1)
        for k in range(10):
            u = u + 0.1 * field(u, k / 10)
        return u

    share, low, high, between = modes(sample(field, steps=20, objective="paper_literal"))
    assert share == pytest.approx(0.5, abs=0.1)
    assert low == pytest.approx(-1, abs=0.25) and high == pytest.approx(2, abs=0.25)
    assert between < 0.12
    printed = as_printed()
    assert printed.std() < 0.5 * two_modes(4000).std()
