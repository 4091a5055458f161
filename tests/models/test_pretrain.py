"""Stage 2: what is in the sequence, what is learned from it, and that nothing else matters."""

import math

import pytest
import torch

from models import decode, sequence
from models.backbone import rope
from models.checkpoint import initialize
from models.config import VQGANConfig
from models.policy import STAGE2_WEIGHTS, Policy
from models.sequence import Stage2
from models.tokenizer import Tokenizer
from tests.models.sizes import small

TEXTS = [[1, 1, 5], [1, 1, 5, 4, 3]]
EOF, EOV, STEP = 8, 9, 4
FULL = Stage2(future=True, steps=2, bridge=(6, 7), closing=(8, 2))
VARIANTS = {
    "full": FULL,
    "sp2": Stage2(False, 2, (6, 7), (8, 2)),
    "la": Stage2(True, 0, (6,), (2,)),
    "ac": Stage2(True, 1, (6, 7), (8, 2)),
}


def config(**choices):
    """Frames of 2 x 2 codes of 8, two steps of 2 latent codes of 4."""
    sizes = {
        "vqgan": VQGANConfig(4, (8, 16), 1, 8, 8, norm_groups=4),
        "vision_vocab": 10,
        "text_vocab": 16,
        "max_text_tokens": 8,
        "max_positions": 64,
        "latent_codes": 4,
        "latent_tokens": 2,
        "horizon": 2,
        "action_heads": "none",
    }
    return small(**(sizes | choices))


def make(**choices) -> Policy:
    policy = Policy(config(**choices))
    initialize(policy, 0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return policy


def batch(rows: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 8, (rows, 3, 4), generator=generator)
    return frames, torch.randint(0, 4, (rows, 2, 2), generator=generator)


def layout(variant: str, valid=None) -> list[tuple[str, list[int], list[bool] | None]]:
    frames = torch.tensor([[[0, 1, 2, 3], [4, 5, 6, 7], [7, 7, 0, 0]]])
    latents = torch.tensor([[[0, 1], [2, 3]]])
    segments = sequence.stage2_segments(config(), VARIANTS[variant], frames, latents, valid)
    return [(s.kind, s.ids[0].tolist(), None if s.counts is None else s.counts[0].tolist()) for s in segments]


def test_the_sequence_and_its_labels_are_those_of_the_design():
    given = ("vision", [0, 1, 2, 3, EOF, 4, 5, 6, 7, EOF], None)
    closed = ("vision", [0, 1, 2, 3, EOF, 4, 5, 6, 7, EOV], None)
    future = ("vision", [7, 7, 0, 0, EOV], [True] * 5)
    bridge, closing = ("text", [6, 7], [True] * 2), ("text", [8, 2], [True] * 2)
    steps = ("latent", [0, 1, STEP, 2, 3, STEP], [True] * 6)
    assert layout("full") == [given, future, bridge, steps, closing]
    assert layout("sp2") == [closed, bridge, steps, closing]
    assert layout("la") == [given, future, ("text", [6], [True]), ("text", [2], [True])]
    assert layout("ac") == [given, future, bridge, ("latent", [0, 1, STEP], [True] * 3), closing]


def test_steps_past_the_end_of_a_clip_do_not_count():
    steps = layout("full", torch.tensor([[True, False]]))[3]
    assert steps == ("latent", [0, 1, STEP, 2, 3, STEP], [True] * 3 + [False] * 3)


def test_variants_by_name_carry_their_own_text():
    tokenizer = Tokenizer.train(["<vision></vision> <dynamics></dynamics>"], 300)
    for name, future, steps, text in (
        ("full", True, 2, "</vision> <dynamics></dynamics></s>"),
        ("ac", True, 1, "</vision> <dynamics></dynamics></s>"),
        ("sp2", False, 2, "</vision> <dynamics></dynamics></s>"),
        ("la", True, 0, "</vision></s>"),
    ):
        choice = sequence.stage2(tokenizer, config(), name)
        assert (choice.future, choice.steps) == (future, steps)
        assert tokenizer.decode([*choice.bridge, *choice.closing]) == text
    with pytest.raises(ValueError, match="variant: 'sp3' is not one of full, ac, sp2, la"):
        sequence.stage2(tokenizer, config(), "sp3")


def test_losses_equal_next_token_prediction_token_by_token():
    policy, (frames, latents) = make(latent_head="mlp").eval(), batch()
    heads = {k: policy.token_head(k) for k in ("vision", "text", "latent")}
    wanted = {kind: [] for kind in heads}
    with torch.no_grad():
        for row, text in enumerate(TEXTS):
            a, b, c = frames[row].tolist()
            z = latents[row].tolist()
            tokens = [("text", i, False) for i in text]
            tokens += [("vision", i, False) for i in [*a, EOF, *b, EOF]]
            tokens += [("vision", i, True) for i in [*c, EOV]]
            tokens += [("text", i, True) for i in (6, 7)]
            tokens += [("latent", i, True) for i in [*z[0], STEP, *z[1], STEP]]
            tokens += [("text", i, True) for i in (8, 2)]
            x = torch.cat([policy.embed(kind, torch.tensor([[i]])) for kind, i, _ in tokens], 1)
            n = len(tokens)
            mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
            hidden = policy.backbone(x, rope(policy.config, torch.arange(n)[None]), mask)[0]
            losses = {kind: [] for kind in heads}
            for place, (kind, i, counts) in enumerate(tokens):
                if counts:
                    losses[kind].append(-heads[kind](hidden[place - 1]).log_softmax(-1)[i])
            for kind, values in losses.items():
                wanted[kind].append(torch.stack(values).mean())
        parts = policy.pretrain_loss(TEXTS, frames, latents, FULL)
    means = {kind: torch.stack(values).mean() for kind, values in wanted.items()}
    for kind, value in means.items():
        torch.testing.assert_close(parts[kind], value, atol=1e-5, rtol=1e-5)
    total = sum(STAGE2_WEIGHTS[kind] * value for kind, value in means.items())
    torch.testing.assert_close(parts["loss"], total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing(variant):
    policy, (frames, latents) = make().eval(), batch()
    choice = VARIANTS[variant]
    with torch.no_grad():
        together = policy.pretrain_loss(TEXTS, frames, latents, choice)
        alone = [
            policy.pretrain_loss([TEXTS[i]], frames[i : i + 1], latents[i : i + 1], choice) for i in (0, 1)
        ]
    for name, value in together.items():
        torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2, atol=1e-5, rtol=1e-5)
    assert ("vision" in together) == choice.future and ("latent" in together) == (choice.steps > 0)


def test_packed_sequences_do_not_see_each_other():
    """Same losses and gradients as one sequence a row, with texts of different lengths in two rows."""
    texts = [[1, 1, 5, 4, 3], [1, 5], [1, 1, 5], [1, 1, 1, 4, 4, 5, 3]]
    frames, latents = batch(rows=4)
    tokens = 15 + 2 + 6 + 2  # frames, bridge, latent actions, closing
    lengths = [len(text) + tokens for text in texts]
    rows = sequence.pack(lengths, 7 + tokens, 60)
    assert rows.take.shape == (2, 60) and rows.mask.sum() < 0.6 * 2 * 60 * 60 / 2
    padded = torch.arange(4 * (7 + tokens)).view(4, -1)
    back = padded.flatten()[rows.take].flatten()[rows.back]
    assert all(torch.equal(back[i, -n:], padded[i, -n:]) for i, n in enumerate(lengths))

    found = []
    for limit in (None, 60):
        policy = make()
        parts = policy.pretrain_loss(texts, frames, latents, FULL, pack=limit)
        parts["loss"].backward()
        found.append((parts, {name: p.grad for name, p in policy.named_parameters()}))
    (plain, gradients), (packed, again) = found
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, gradients, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="a sequence of 32 tokens does not fit rows of 31"):
        sequence.pack(lengths, 7 + tokens, 31)


def test_what_is_masked_or_left_out_changes_nothing():
    policy, (frames, latents) = make().eval(), batch()
    other_frames, other_latents = batch(seed=2)
    valid = torch.tensor([[True, False], [True, False]])
    mixed = torch.stack([latents[:, 0], other_latents[:, 1]], 1)
    past = torch.cat([frames[:, :2], other_frames[:, 2:]], 1)

    def loss(frames, latents, variant, valid=None):
        with torch.no_grad():
            return policy.pretrain_loss(TEXTS, frames, latents, VARIANTS[variant], valid)

    assert torch.equal(
        loss(frames, latents, "full", valid)["latent"], loss(frames, mixed, "full", valid)["latent"]
    )
    assert not torch.equal(loss(frames, latents, "full")["latent"], loss(frames, mixed, "full")["latent"])
    assert loss(frames, latents, "full", ~valid & valid)["latent"] == 0
    assert torch.equal(loss(frames, latents, "ac")["loss"], loss(frames, mixed, "ac")["loss"])
    assert torch.equal(loss(frames, latents, "la")["loss"], loss(frames, other_latents, "la")["loss"])
    assert torch.equal(loss(frames, latents, "sp2")["loss"], loss(past, latents, "sp2")["loss"])
    assert not torch.equal(loss(frames, latents, "full")["loss"], loss(past, latents, "full")["loss"])


def test_an_untrained_model_knows_nothing():
    policy = Policy(config())
    initialize(policy, 0)
    parts = policy.pretrain_loss(TEXTS, *batch(), FULL)
    for kind, ids in (("vision", 10), ("text", 16), ("latent", 5)):
        assert abs(parts[kind].item() - math.log(ids)) < 0.1


def test_loss_reaches_every_weight():
    policy = make(dropout=0.1).train()
    policy.pretrain_loss(TEXTS, *batch(), FULL)["loss"].backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_copying_world_is_learned_and_then_imagined():
    """o_{t+H} is o_t, and the latent codes are those of o_{t-1} modulo 4: the frames are random, so only the
    right token at the right place tells anything.
    """
    torch.manual_seed(0)
    policy = Policy(config(layers=1, hidden=64, mlp_hidden=128))
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2, betas=(0.9, 0.95))
    texts = TEXTS * 16

    def world(rows):
        frames = torch.randint(0, 8, (rows, 2, 4))[:, [0, 1, 1]]
        return frames, (frames[:, 0] % 4).unflatten(1, (2, 2))

    for _ in range(150):
        loss = policy.pretrain_loss(texts, *world(len(texts)), FULL)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    frames, latents = world(16)
    found = decode.imagine(policy.eval(), TEXTS * 8, frames[:, :2], FULL)
    assert (found.future == frames[:, 2]).float().mean() > 0.9
    assert (found.latents == latents).float().mean() > 0.9
