"""How text, frames and actions become one sequence: prompt, token layout, positions, masks.

Stage 3 and serving (ViPRA-FM), one row a sample; text is left-padded to a fixed number of slots:

    | pad .. text, "<vision>" | o_{t-1} codes, eof | o_t codes, eov | "</vision> <action>" | H actions |
    0                         text_slots           ...                                     first_action

Positions count real tokens only, and padding is masked, so it never changes a result. Training appends
`</action>` and EOS after the actions upstream; nothing is read there and the actions cannot see it, so it is
left out here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import ModelConfig
from models.tokenizer import Tokenizer

PROMPT = "<s> You are a helpful assistant. USER: What action should the robot take to `{task}` ASSISTANT:"


def encode_prompt(tokenizer: Tokenizer, task: str) -> list[int]:
    """Text ids up to and with `<vision>`.

    The BOS is doubled as in the official code: id of `<s>`, then `<s>` again as the prompt's own text.
    """
    return [tokenizer.bos, *tokenizer.encode(PROMPT.format(task=task)), *tokenizer.encode("<vision>")]


def encode_bridge(tokenizer: Tokenizer) -> list[int]:
    """Text ids between the frames and the actions."""
    return tokenizer.encode("</vision> <action>")


@dataclass(frozen=True)
class Layout:
    """Where each part of a stage-3 sequence sits."""

    text_slots: int
    vision: int
    bridge: int
    horizon: int

    @property
    def first_action(self) -> int:
        return self.text_slots + self.vision + self.bridge

    @property
    def slots(self) -> int:
        return self.first_action + self.horizon


def pad_left(texts: list[list[int]], slots: int, device="cpu") -> tuple[Tensor, Tensor]:
    """Token lists -> ids [B, slots] int64 with zeros in front, real lengths [B]. Raises ValueError if one is
    longer.
    """
    longest = max(map(len, texts))
    if longest > slots:
        raise ValueError(f"text of {longest} tokens does not fit {slots} slots")
    ids = torch.tensor([[0] * (slots - len(text)) + list(text) for text in texts], dtype=torch.long)
    return ids.to(device), torch.tensor([len(text) for text in texts]).to(device)


def vision_ids(config: ModelConfig, codes: Tensor) -> Tensor:
    """VQGAN codes of o_{t-1}, o_t [B, 2, N] -> ids [B, 2 (N + 1)] with end-of-frame and end-of-vision."""
    ends = torch.stack(
        [
            torch.full_like(codes[:, 0, 0], config.end_of_frame),
            torch.full_like(codes[:, 0, 0], config.end_of_vision),
        ],
        1,
    )
    return torch.cat([codes, ends[:, :, None]], 2).flatten(1)


def positions(lengths: Tensor, layout: Layout, start: int = 0) -> Tensor:
    """Position of each slot from `start` on [B, slots - start]: real tokens before it (0 for padding)."""
    slot = torch.arange(start, layout.slots, device=lengths.device)
    return (slot[None] - (layout.text_slots - lengths[:, None])).clamp(min=0)


def attention_mask(
    lengths: Tensor, layout: Layout, chunk_attention: str = "causal", start: int = 0
) -> Tensor:
    """Who sees whom: bool [B, 1, slots - start, slots] for queries from slot `start` on.

    Causal, padding hidden (a padding row sees itself so that its softmax is finite); `bidirectional` lets the
    actions of a chunk see each other. The prefix never sees an action, so its keys and values hold for every
    Euler step.
    """
    key = torch.arange(layout.slots, device=lengths.device)
    query = key[start:, None]
    mask = key[None] <= query
    if chunk_attention == "bidirectional":
        mask = mask | ((query >= layout.first_action) & (key[None] >= layout.first_action))
    real = key[None] >= (layout.text_slots - lengths[:, None])
    mask = (mask[None] & real[:, None]) | (key[None] == query)[None]
    return mask[:, None]
