"""Sharing one prefix between flow samples changes the cost of the loss, not the loss."""

import torch

from models import sequence
from models.config import SIZES
from models.policy import Policy
from models.tokenizer import Tokenizer
from training.finetune import shared_prefix_loss


def small():
    config = SIZES["vipra_tiny"].with_embodiment(action_dim=4, horizon=14)
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["move both hands", "wave"], 300)
    texts = [sequence.encode_prompt(tokenizer, task) for task in ("move both hands", "wave")]
    codes = torch.randint(512, (2, 2, config.frame_tokens))
    return (
        Policy(config),
        texts,
        codes,
        torch.randn(2, 14, 4),
        torch.tensor(sequence.encode_bridge(tokenizer)),
    )


def test_one_sample_equals_the_plain_loss():
    policy, texts, codes, actions, bridge = small()
    torch.manual_seed(1)
    plain = policy.loss(texts, codes, actions, bridge)
    torch.manual_seed(1)
    shared = shared_prefix_loss(policy, texts, codes, actions, bridge, samples=1)
    assert torch.allclose(plain, shared, atol=1e-5)


def test_samples_of_one_prefix_do_not_see_each_other():
    policy, texts, codes, actions, bridge = small()
    torch.manual_seed(1)
    shared = shared_prefix_loss(policy, texts, codes, actions, bridge, samples=3)
    torch.manual_seed(1)
    repeated = policy.loss(
        [text for text in texts for _ in range(3)],
        codes.repeat_interleave(3, 0),
        actions.repeat_interleave(3, 0),
        bridge,
    )
    assert torch.allclose(shared, repeated, atol=1e-5)
