"""Generated tokens: valid, the same as recomputing everything, the same alone and in a batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import decode, sequence
from models.checkpoint import initialize
from models.decode import Sampling, choose
from models.policy import Policy
from models.sequence import Segment, Stage2
from tests.models.sizes import small

BRIDGE = [3, 4, 5]
TEXTS = [[1, 1, *range(10, 24)], [1, 1, 40, 41, 42], [1, 1, *range(60, 89)]]
COUNTS = (7, 1, 2, 9)
FULL = Stage2(future=True, steps=3, bridge=(6, 7, 8), closing=(9, 2))
VARIANTS = [
    FULL,
    Stage2(False, 3, (6, 7, 8), (9, 2)),
    Stage2(True, 0, (6,), (2,)),
    Stage2(True, 1, (6, 7), (2,)),
]


def make(**choices) -> Policy:
    config = small(action_dim=4, horizon=3, latent_tokens=4, latent_head="mlp", **choices)
    policy = Policy(config)
    initialize(policy, 0)
    with torch.no_grad():  # large enough that attention and every earlier token matter
        for parameter in policy.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return policy.eval()


def discrete() -> Policy:
    return make(action_heads="ar", action_vocab=max(COUNTS) + 1)


def frames(rows: int = 3) -> torch.Tensor:
    return torch.randint(0, 32, (rows, 2, 16), generator=torch.Generator().manual_seed(1))


def generators(seeds) -> tuple[torch.Generator, ...]:
    return tuple(torch.Generator().manual_seed(seed) for seed in seeds)


def act(policy: Policy, rows, codes, text_slots=40, **choices) -> torch.Tensor:
    cache = decode.action_cache(policy, 4, BRIDGE, text_slots)
    texts = [policy.encode_text(TEXTS[i]) for i in rows]
    return decode.decode_actions(policy, texts, codes, cache, BRIDGE, COUNTS, **choices)


def recording(monkeypatch) -> list[torch.Tensor]:
    """The logits of every choice, [B, ids] each."""
    seen, original = [], decode.choose
    monkeypatch.setattr(
        decode, "choose", lambda logits, *rest: (seen.append(logits), original(logits, *rest))[1]
    )
    return seen


def full(segment: Segment) -> Segment:
    return Segment(segment.kind, segment.ids, torch.ones_like(segment.ids, dtype=torch.bool))


def test_cached_actions_equal_recomputing_every_token(monkeypatch):
    policy, codes = discrete(), frames()
    seen = recording(monkeypatch)
    ids = act(policy, range(3), codes)
    steps = torch.tensor(BRIDGE)
    with torch.no_grad():
        grown = torch.zeros_like(ids)  # later codes cannot be seen, so what stands there does not matter
        for h in range(3):
            for d, count in enumerate(COUNTS):
                segments = sequence.action_segments(policy.config, codes, steps, grown)
                logits = policy.token_logits(TEXTS, segments)[2][:, h * 5 + d]
                torch.testing.assert_close(seen[h * 4 + d], logits, atol=1e-5, rtol=1e-5)
                grown[:, h, d] = logits[:, :count].argmax(-1)
    assert torch.equal(ids, grown)
    assert len(torch.unique(ids[:, :, 0])) > 1 and not torch.equal(ids[0], ids[1])


@pytest.mark.parametrize("vision_positions", ["none", "grid"])
@pytest.mark.parametrize("choice", VARIANTS, ids=["full", "sp2", "la", "ac"])
def test_cached_imagination_equals_recomputing_every_token(monkeypatch, choice, vision_positions):
    policy, codes = make(vision_positions=vision_positions), frames()
    seen = recording(monkeypatch)
    counted = []
    found = decode.imagine(policy, TEXTS, codes, choice, on_code=lambda: counted.append(1))
    config = policy.config
    empty = torch.zeros(3, config.frame_tokens, dtype=torch.long)
    future = empty if found.future is None else found.future
    latents = torch.zeros(3, 3, 4, dtype=torch.long) if found.latents is None else found.latents
    segments = sequence.stage2_segments(config, choice, torch.cat([codes, future[:, None]], 1), latents)
    with torch.no_grad():
        logits = policy.token_logits(TEXTS, [full(s) for s in segments])
    wanted = []
    if choice.future:
        wanted += logits[1][:, :-1].unbind(1)  # without end-of-vision, which is not chosen
        assert torch.equal(logits[1][:, :-1, :32].argmax(-1), found.future)
    if choice.steps:
        steps = logits[-2].unflatten(1, (choice.steps, 5))[:, :, :-1]
        wanted += steps.flatten(1, 2).unbind(1)
        assert torch.equal(steps[..., :8].argmax(-1), found.latents)
        assert found.latents.shape == (3, choice.steps, 4)
    for cached, recomputed in zip(seen, wanted, strict=True):
        torch.testing.assert_close(cached, recomputed, atol=1e-5, rtol=1e-5)
    assert len(counted) == decode.stage2_tokens(config, choice)[1] == len(wanted)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.3, 1.0, 50.0]),
    st.integers(0, 15),
    st.integers(0, 2**30),
)
def test_a_choice_is_always_a_valid_id(count, rows, temperature, top_k, seed):
    logits = 20 * torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(temperature, top_k, generators(range(rows)))
    ids = choose(logits, count, sampling)
    assert ids.shape == (rows,) and ids.min() >= 0 and ids.max() < count
    if temperature and top_k:
        better = (logits[:, :count] > logits.gather(1, ids[:, None])).sum(1)
        assert better.max() < top_k
    if temperature == 0:
        assert torch.equal(ids, logits[:, :count].argmax(-1))


def test_drawn_codes_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0]]).expand(4000, -1)
    ids = choose(logits, 3, Sampling(0.5, 0, (torch.Generator().manual_seed(0),) * 4000))
    shares = torch.bincount(ids, minlength=3) / 4000
    torch.testing.assert_close(shares, torch.softmax(logits[0, :3] / 0.5, 0), atol=0.03, rtol=0)


def test_every_dimension_of_every_action_stays_in_its_bins():
    policy, codes = discrete(), frames()
    ids = act(policy, range(3), codes, sampling=Sampling(30.0, 0, generators(range(3))))
    assert ids.shape == (3, 3, 4)
    assert bool((ids >= 0).all()) and bool((ids < torch.tensor(COUNTS)).all())
    assert bool((ids[..., 1] == 0).all())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_a_batch_equals_that_row_alone(temperature):
    policy, codes = discrete(), frames()
    batch = act(policy, range(3), codes, sampling=Sampling(temperature, 0, generators([5, 6, 7])))
    for i in range(3):
        alone = Sampling(temperature, 0, generators([5 + i]))
        assert torch.equal(act(policy, [i], codes[i : i + 1], sampling=alone), batch[i : i + 1])
    tight = act(policy, [1], codes[1:2], len(TEXTS[1]), sampling=Sampling(temperature, 0, generators([6])))
    assert torch.equal(tight, batch[1:2])


def test_a_served_policy_decodes_the_same_actions():
    policy, codes = discrete(), frames(1)
    served = Policy(policy.config, serving=True).eval()
    served.load_state_dict({k: v for k, v in policy.state_dict().items() if k in served.state_dict()})
    assert served.latent_head is None and served.backbone.text_head is None
    assert torch.equal(act(served, [0], codes), act(policy, [0], codes))


def test_impossible_requests_are_refused():
    policy, codes = discrete(), frames(1)
    with pytest.raises(ValueError, match="31 tokens does not fit 16 slots"):
        act(policy, [2], codes, text_slots=16)
    with pytest.raises(ValueError, match="2 generators for 1 rows"):
        act(policy, [0], codes, sampling=Sampling(1.0, 0, generators([1, 2])))
    for choices, message in (((-1.0,), "temperature"), ((0.0, -1), "top_k"), ((1.0,), "one generator a row")):
        with pytest.raises(ValueError, match=message):
            Sampling(*choices)


def test_a_policy_loaded_for_serving_cannot_imagine():
    served = Policy(small(action_heads="none"), serving=True)
    with pytest.raises(ValueError, match="has no token heads: load with serving=False"):
        decode.imagine(served, TEXTS, frames(), FULL)
