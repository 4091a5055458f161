import numpy as np
import pytest
import torch

from models.backbone import KVCache
from models.checkpoint import initialize
from models.flow import integrate, schedule
from models.heads import ActionEncoder, time_embedding
from models.policy import Policy
from tests.models.sizes import small

BRIDGE = [3, 4, 5]
TEXTS = [[1, 1, *range(10, 24)], [1, 1, 40, 41, 42], [1, 1, *range(60, 89)]]
CHOICES = [
    {},
    {"chunk_attention": "bidirectional"},
    {"time_embedding": "official", "activation": "gelu"},
    {"rope_precision": "bf16"},
    {"objective": "paper_literal"},
    {"vision_positions": "grid"},
]


def make(**choices) -> Policy:
    policy = Policy(small(**choices))
    initialize(policy, 0)
    with torch.no_grad():  # large enough that attention matters
        for layer in policy.backbone.layers:
            for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down):
                matrix.weight.mul_(8)
    return policy.eval()


def scene(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 32, (rows, 2, 16), generator=generator)
    return codes, torch.randn(rows, 14, 8, generator=generator)


def sample(policy: Policy, rows, codes, noise, text_slots=40, **choices) -> torch.Tensor:
    cache = policy.new_cache(4, BRIDGE, text_slots)
    return policy.sample([policy.encode_text(TEXTS[i]) for i in rows], codes, noise, cache, BRIDGE, **choices)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_cached_chunk_equals_recomputing_everything(choices):
    policy, (codes, noise) = make(**choices), scene()
    cached = sample(policy, range(3), codes, noise)
    torch.testing.assert_close(
        cached, policy.sample_recomputing(TEXTS, codes, noise, BRIDGE), atol=1e-5, rtol=1e-5
    )
    assert (cached - noise).abs().mean() > 0.02


def test_cached_heun_equals_recomputing_everything():
    policy, (codes, noise) = make(), scene()
    torch.testing.assert_close(
        sample(policy, range(3), codes, noise, sampler="heun", steps=4),
        policy.sample_recomputing(TEXTS, codes, noise, BRIDGE, 4, "heun"),
        atol=1e-5,
        rtol=1e-5,
    )


def numpy_chunk(policy: Policy, text: list[int], codes: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The ten-step sampler in float64 numpy, without our functions, padding or cache."""
    c = policy.config
    w = {name: tensor.double().numpy() for name, tensor in policy.state_dict().items()}
    vision = [*codes[0], c.end_of_frame, *codes[1], c.end_of_vision]
    places = np.tile(w.get("backbone.vision_embedding.places", np.zeros((17, 1))), (2, 1))
    prefix = np.concatenate(
        [
            w["backbone.text_embedding.weight"][text],
            w["backbone.vision_embedding.weight"][vision] + places,
            w["backbone.text_embedding.weight"][BRIDGE],
        ]
    )
    length, half = len(prefix) + c.horizon, c.head_dim // 2
    angle = np.arange(length)[:, None] / c.rope_theta ** (np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * weight

    def silu(x):
        return x / (1 + np.exp(-x))

    def turn(x):
        a, b = x[:, :half], x[:, half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def linear(x, name):
        return x @ w[f"action_encoder.{name}.weight"].T + w[f"action_encoder.{name}.bias"]

    def velocity(u, s):
        angles = 2 * np.pi * s / np.geomspace(4e-3, 4, c.hidden // 4)
        time = np.concatenate([np.sin(angles), np.cos(angles)])
        pair = np.concatenate([np.tile(time, (c.horizon, 1)), linear(u, "linear_1")], -1)
        x = np.concatenate([prefix, linear(silu(linear(pair, "linear_2")), "linear_3")])
        for i in range(c.layers):
            layer = f"backbone.layers.{i}."
            h = norm(x, w[layer + "attention_norm.weight"])
            q, k, v = np.split(h @ w[layer + "qkv.weight"].T, 3, -1)
            out = []
            for head in range(c.heads):
                part = slice(head * c.head_dim, (head + 1) * c.head_dim)
                score = turn(q[:, part]) @ turn(k[:, part]).T / np.sqrt(c.head_dim)
                score[np.triu_indices(length, 1)] = -np.inf
                score = np.exp(score - score.max(-1, keepdims=True))
                out.append(score / score.sum(-1, keepdims=True) @ v[:, part])
            x = x + np.concatenate(out, -1) @ w[layer + "out.weight"].T
            gate, up = np.split(norm(x, w[layer + "mlp_norm.weight"]) @ w[layer + "gate_up.weight"].T, 2, -1)
            x = x + (silu(gate) * up) @ w[layer + "down.weight"].T
        hidden = norm(x, w["backbone.norm.weight"])[-c.horizon :]  # read at the actions themselves, unshifted
        return hidden @ w["action_head.weight"].T + w["action_head.bias"]

    u = noise.astype(float)
    for k in range(10):
        u = u + 0.1 * velocity(u, k / 10)
    return u


@pytest.mark.parametrize("vision_positions", ["none", "grid"])
def test_sampler_equals_an_independent_one_in_plain_numpy(vision_positions):
    policy, (codes, noise) = make(vision_positions=vision_positions), scene()
    chunks = sample(policy, range(3), codes, noise)
    for i in range(3):
        wanted = numpy_chunk(policy, TEXTS[i], codes[i].numpy(), noise[i].numpy())
        np.testing.assert_allclose(chunks[i].numpy(), wanted, atol=2e-5)


def test_a_row_of_a_batch_equals_that_row_alone():
    policy, (codes, noise) = make(), scene()
    batch = sample(policy, range(3), codes, noise)
    for i in range(3):
        alone = sample(policy, [i], codes[i : i + 1], noise[i : i + 1])
        torch.testing.assert_close(alone, batch[i : i + 1], atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing():
    policy, (codes, noise) = make(), scene()
    tight = sample(policy, [1], codes[:1], noise[:1], text_slots=len(TEXTS[1]))
    loose = sample(policy, [1], codes[:1], noise[:1], text_slots=128)
    torch.testing.assert_close(tight, loose, atol=1e-5, rtol=1e-5)


def test_what_an_earlier_request_left_in_the_cache_changes_nothing():
    policy, (codes, noise) = make(), scene()
    fresh = sample(policy, [1], codes[1:2], noise[1:2])
    cache = policy.new_cache(4, BRIDGE, 40)
    texts = [policy.encode_text(text) for text in TEXTS]
    policy.sample(texts, codes, noise, cache, BRIDGE)
    again = policy.sample(texts[1:2], codes[1:2], noise[1:2], cache, BRIDGE)
    torch.testing.assert_close(again, fresh, atol=1e-6, rtol=0)


@pytest.mark.parametrize("chunk", ["causal", "bidirectional"])
def test_prefix_is_the_same_for_every_time_and_action(chunk):
    policy, (codes, noise) = make(chunk_attention=chunk), scene()
    texts = [policy.encode_text(text) for text in TEXTS]
    kept = []
    for s, x in ((0.0, noise), (0.7, 5 * noise)):
        cache = policy.new_cache(3, BRIDGE, 40)
        prefix, _ = policy.prefill(texts, codes, x, cache, BRIDGE, s)
        end = prefix.layout.first_action
        before = cache.k[..., :end, :].clone(), cache.v[..., :end, :].clone()
        policy.step(prefix, 2 * x, 0.9)
        assert torch.equal(before[0], cache.k[..., :end, :])
        assert torch.equal(before[1], cache.v[..., :end, :])
        kept.append(before)
    torch.testing.assert_close(kept[0], kept[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_a_frame_filled_ahead_gives_the_same_chunk(choices):
    policy, (codes, noise) = make(**choices), scene()
    objective = policy.config.objective
    whole, staged = policy.new_cache(4, BRIDGE, 40), policy.new_cache(4, BRIDGE, 40)
    staged.k.normal_(), staged.v.normal_()  # whatever an earlier request left
    texts = [policy.encode_text(text) for text in TEXTS]
    wanted = policy.sample(texts, codes, noise, whole, BRIDGE)
    lengths = torch.tensor([text.length for text in texts])
    with torch.inference_mode():
        for row, text in enumerate(texts):
            staged.place(row, 40, text.k, text.v)
        assert policy.prefill_frame(lengths, codes[:, 0], staged, BRIDGE) == slice(40, 57)
        s = schedule(10, objective)[0][0]
        first = policy.prefill_rows(lengths, codes[:, 1:], noise, staged, BRIDGE, s)
        prefix = policy.prefix(lengths, staged, BRIDGE)
        chunk = integrate(lambda u, s: policy.step(prefix, u, s), noise, 10, "euler", objective, first)
    torch.testing.assert_close(chunk, wanted, atol=1e-5, rtol=1e-5)


def test_first_velocity_of_prefill_is_the_first_step():
    policy, (codes, noise) = make(), scene()
    texts = [policy.encode_text(text) for text in TEXTS]
    prefix, first = policy.prefill(texts, codes, noise, policy.new_cache(3, BRIDGE, 40), BRIDGE, 0.0)
    torch.testing.assert_close(policy.step(prefix, noise, 0.0), first, atol=1e-5, rtol=1e-5)


def test_causal_chunks_hide_later_actions_and_bidirectional_ones_show_them():
    codes, noise = scene()
    other = noise.clone()
    other[:, -1] += 3
    s = torch.full((3,), 0.5)
    for chunk, same in (("causal", True), ("bidirectional", False)):
        policy = make(chunk_attention=chunk)
        with torch.no_grad():
            a, b = (policy.velocity(TEXTS, codes, x, s, BRIDGE) for x in (noise, other))
        assert torch.allclose(a[:, :-1], b[:, :-1], atol=1e-6) == same
        assert not torch.allclose(a[:, -1], b[:, -1], atol=1e-3)


def test_frames_text_and_time_all_matter():
    policy, (codes, noise) = make(), scene(1)
    with torch.no_grad():
        half = torch.full((1,), 0.5)
        base = policy.velocity([TEXTS[0]], codes, noise, half, BRIDGE)
        for changed in (
            policy.velocity([TEXTS[1]], codes, noise, half, BRIDGE),
            policy.velocity([TEXTS[0]], codes.flip(1), noise, half, BRIDGE),
            policy.velocity([TEXTS[0]], codes, noise, half + 0.1, BRIDGE),
        ):
            assert (changed - base).abs().max() > 1e-3


def test_loss_reaches_every_weight_that_serving_uses():
    policy, (codes, actions) = make(dropout=0.1).train(), scene()
    policy.loss(TEXTS, codes, actions, BRIDGE, generator=torch.Generator().manual_seed(0)).backward()
    serving = {name for name, _ in Policy(policy.config, serving=True).named_parameters()}
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (name in serving), name


def test_training_learns_one_chunk():
    torch.manual_seed(0)
    policy, (codes, actions) = make(), scene(1)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(250):
        loss = policy.loss([TEXTS[0]] * 16, codes.expand(16, -1, -1), actions.expand(16, -1, -1), BRIDGE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chunk = sample(policy, [0], codes, torch.randn(1, 14, 8))
    assert (chunk - actions).abs().mean() < 0.25 * actions.abs().mean()


def test_text_that_does_not_fit_the_cache_is_refused():
    policy, (codes, noise) = make(), scene(1)
    with pytest.raises(ValueError, match="31 tokens does not fit 16 slots"):
        sample(policy, [2], codes, noise, text_slots=16)


def test_time_embedding_is_the_official_one():
    s = torch.tensor([0.0, 0.3, 0.9])
    i = np.arange(1024)
    angle = s.numpy()[:, None] * (1e4 ** (-i / 1023.0))
    expected = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    np.testing.assert_allclose(time_embedding(s, 2048, "official").numpy(), expected, atol=2e-6)


def test_periods_tell_neighbouring_euler_steps_apart():
    s = torch.arange(10) / 10
    embedded = time_embedding(s, 96, "periods")
    assert torch.cdist(embedded, embedded).fill_diagonal_(9).min() > 1.0
    angle = 2 * np.pi * 0.3 / np.geomspace(4e-3, 4, 48)
    np.testing.assert_allclose(
        time_embedding(s[3:4], 96, "periods")[0], np.concatenate([np.sin(angle), np.cos(angle)]), atol=2e-4
    )


def test_action_encoder_concatenates_time_before_action():
    encoder = ActionEncoder(small()).eval()
    x, s = torch.randn(2, 14, 8), torch.tensor([0.2, 0.8])
    weight = encoder.linear_2.weight
    action = x @ encoder.linear_1.weight.T + encoder.linear_1.bias
    time = time_embedding(s, 16, "periods") @ weight[:, :16].T
    h = torch.nn.functional.silu(time[:, None] + action @ weight[:, 16:].T + encoder.linear_2.bias)
    torch.testing.assert_close(
        encoder(x, s), h @ encoder.linear_3.weight.T + encoder.linear_3.bias, atol=1e-5, rtol=1e-5
    )


def test_bf16_weights_integrate_in_fp32():
    policy, (codes, noise) = make().to(torch.bfloat16), scene()
    chunk = sample(policy, range(3), codes, noise)
    assert chunk.dtype == torch.float32 and chunk.isfinite().all()
    assert policy.new_cache(1, BRIDGE).k.dtype == torch.bfloat16


def test_cache_is_two_buffers_that_are_never_reallocated():
    policy, (codes, noise) = make(), scene()
    cache = policy.new_cache(3, BRIDGE, 40)
    places = cache.k.data_ptr(), cache.v.data_ptr()
    for rows in (3, 1, 2):
        texts = [policy.encode_text(TEXTS[i]) for i in range(rows)]
        policy.sample(texts, codes[:rows], noise[:rows], cache, BRIDGE)
    assert places == (cache.k.data_ptr(), cache.v.data_ptr())
    assert isinstance(cache, KVCache) and cache.slots == 40 + 34 + 3 + 14
    default = policy.new_cache(1, BRIDGE)
    assert default.slots % 16 == 0 and 0 <= default.slots - (128 + 34 + 3 + 14) < 16


def test_schedule_starts_where_prefill_evaluates():
    assert schedule(10)[0] == (0.0, 0.1)
