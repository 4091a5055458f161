"""ViPRA-AR: the loss on discrete actions, and a chunk learned, decoded and turned back into raw actions."""

import numpy as np
import pytest
import torch

from models import bins, decode, sequence
from models.backbone import rope
from models.checkpoint import initialize
from models.config import ModelConfig, ModelConfigError
from models.policy import Policy
from tests.models.sizes import small

BRIDGE = [3, 4, 5]
TEXTS = [[1, 1, *range(10, 14)], [1, 1, 40, 41, 42, 43, 44, 45, 46]]
NAMES, KINDS = ("a", "b", "grip"), ("joint", "joint", "gripper")


def make(vocab: int = 12, **choices) -> Policy:
    config = small(action_dim=3, horizon=4, action_heads="ar", action_vocab=vocab, **choices)
    policy = Policy(config)
    initialize(policy, 0)
    return policy


def scene(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(0, 32, (rows, 2, 16), generator=generator),
        torch.randint(0, 11, (rows, 4, 3), generator=generator),
    )


def test_the_loss_is_on_codes_and_ends_of_actions_only():
    codes, actions = scene(1)
    vision, bridge, chunk = sequence.action_segments(
        make().config, codes, torch.tensor(BRIDGE), actions, torch.tensor([[True, True, True, False]])
    )
    assert vision.counts is None and bridge.counts is None
    assert vision.ids[0, 16] == 32 and vision.ids[0, 33] == 33 and vision.ids.shape == (1, 34)
    assert bridge.ids[0].tolist() == BRIDGE
    assert chunk.ids[0].view(4, 4)[:, :3].tolist() == actions[0].tolist()
    assert chunk.ids[0].view(4, 4)[:, 3].tolist() == [11] * 4
    assert chunk.counts[0].tolist() == [True] * 12 + [False] * 4


def test_loss_equals_next_token_prediction_token_by_token():
    policy, (codes, actions) = make().eval(), scene()
    wanted = []
    with torch.no_grad():
        for row, text in enumerate(TEXTS):
            vision = [*codes[row, 0].tolist(), 32, *codes[row, 1].tolist(), 33]
            chunk = [i for action in actions[row].tolist() for i in (*action, 11)]
            parts = [("text", text), ("vision", vision), ("text", BRIDGE), ("action", chunk)]
            x = torch.cat([policy.embed(kind, torch.tensor([ids])) for kind, ids in parts], 1)
            n = x.shape[1]
            mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
            hidden = policy.backbone(x, rope(policy.config, torch.arange(n)[None]), mask)[0]
            odds = policy.action_code_head(hidden[-17:-1]).log_softmax(-1)
            wanted.append(-odds[torch.arange(16), torch.tensor(chunk)].mean())
        parts = policy.ar_loss(TEXTS, codes, actions, BRIDGE)
    torch.testing.assert_close(parts["loss"], torch.stack(wanted).mean(), atol=1e-5, rtol=1e-5)
    assert set(parts) == {"loss", "action", "action_accuracy"}


def test_actions_that_do_not_count_change_nothing():
    policy, (codes, actions) = make().eval(), scene()
    other = actions.clone()
    other[:, 3] = (other[:, 3] + 1) % 11
    valid = torch.tensor([[True, True, True, False]] * 2)
    with torch.no_grad():
        a, b = (policy.ar_loss(TEXTS, codes, x, BRIDGE, valid)["loss"] for x in (actions, other))
        c = policy.ar_loss(TEXTS, codes, other, BRIDGE)["loss"]
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_loss_reaches_every_weight_that_serving_uses():
    policy, (codes, actions) = make(dropout=0.1).train(), scene()
    policy.ar_loss(TEXTS, codes, actions, BRIDGE)["loss"].backward()
    serving = {name for name, _ in Policy(policy.config, serving=True).named_parameters()}
    assert {"action_embedding.weight", "action_code_head.weight"} <= serving
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (name in serving), name


def test_a_demonstrated_chunk_is_learned_and_served_in_the_robots_units():
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    raw = generator.uniform(-1, 1, (40, 4, 3))
    raw[..., 1] = 0.25  # a joint that never moves
    raw[..., 2] = raw[..., 2] > 0
    fitted = bins.fit(raw, NAMES, KINDS, 20)
    policy, (codes, _) = make(fitted.vocab), scene(2)
    wanted = torch.from_numpy(fitted.encode(raw[:2]))
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(80):
        loss = policy.ar_loss(TEXTS, codes, wanted, BRIDGE)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()
    cache = decode.action_cache(policy, 2, BRIDGE)
    texts = [policy.encode_text(text) for text in TEXTS]
    ids = decode.decode_actions(policy, texts, codes, cache, BRIDGE, fitted.counts)
    actions = fitted.decode(ids.numpy())
    assert actions.dtype == np.float32 and fitted.counts == (20, 1, 2)
    np.testing.assert_array_equal(actions, fitted.decode(wanted.numpy()))
    assert np.abs(actions - raw[:2]).max() < 0.15


def test_choices_that_do_not_fit_discrete_actions_are_refused():
    for change, message in (
        ({"action_heads": "ar"}, "action_vocab of at least 2"),
        ({"action_heads": "ar", "action_vocab": 1}, "action_vocab of at least 2"),
        ({"action_heads": "ar", "action_vocab": 9, "representation": "relative"}, "raw actions"),
        ({"action_vocab": 9}, "action_vocab: 9 needs action_heads ar"),
        ({"action_heads": "none", "action_vocab": 9}, "action_vocab: 9 needs action_heads ar"),
    ):
        with pytest.raises(ModelConfigError, match=message):
            small(**change)


def test_folders_older_than_discrete_actions_still_load():
    config = make().config
    assert (config.end_of_action, ModelConfig.from_dict(config.to_dict())) == (11, config)
    data = small().to_dict()
    del data["action_vocab"]
    assert ModelConfig.from_dict(data) == small()
