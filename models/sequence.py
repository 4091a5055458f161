"""How text, frames and actions become one sequence: prompt, token layout, positions, masks, labels.

Stage 3 and serving (ViPRA-FM), one row a sample; text is left-padded to a fixed number of slots:

    | pad .. text, "<vision>" | o_{t-1} codes, eof | o_t codes, eov | "</vision> <action>" | H actions |
    0                         text_slots           ...                                     first_action

ViPRA-AR has H x (D codes, end of action) instead of the H actions. With +SP3 (paper table 2) the predicted
o_{t+H} stands between o_t and the text after the frames. Stage 2 has, after the same text,

    | o_{t-1} codes, eof | o_t codes, eof | o_{t+H} codes, eov | "</vision> <dynamics>"
    | H x (16 latent codes, end of step) | "</dynamics>", EOS |

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


def token_layout(text_slots: int, tokens: int) -> Layout:
    """A causal sequence with `tokens` ids after its text: stage 2, ViPRA-AR."""
    return Layout(text_slots, tokens, 0, 0)


def pad_left(texts: list[list[int]], slots: int, device="cpu") -> tuple[Tensor, Tensor]:
    """Token lists -> ids [B, slots] int64 with zeros in front, real lengths [B]. Raises ValueError if one is
    longer.
    """
    longest = max(map(len, texts))
    if longest > slots:
        raise ValueError(f"text of {longest} tokens does not fit {slots} slots")
    ids = torch.tensor([[0] * (slots - len(text)) + list(text) for text in texts], dtype=torch.long)
    return ids.to(device), torch.tensor([len(text) for text in texts]).to(device)


def vision_ids(config: ModelConfig, codes: Tensor, more: bool = False) -> Tensor:
    """VQGAN codes of F frames [B, F, N] -> ids [B, F (N + 1)] with end-of-frame, end-of-vision at the end.

    more: a predicted frame follows, so the last closes with end-of-frame too.
    """
    ends = torch.full_like(codes[:, :, :1], config.end_of_frame)
    if not more:
        ends[:, -1] = config.end_of_vision
    return torch.cat([codes, ends], 2).flatten(1)


def close_each(codes: Tensor, end: int) -> Tensor:
    """Groups of codes [B, groups, n] -> ids [B, groups (n + 1)], `end` after each group."""
    return torch.cat([codes, torch.full_like(codes[:, :, :1], end)], 2).flatten(1)


@dataclass(frozen=True)
class Segment:
    """Tokens of one kind at the same place in every row."""

    kind: str  # text | vision | latent | action: whose table embeds them and whose head predicts them
    ids: Tensor  # [B, n] int64
    counts: Tensor | None = None  # [B, n] bool, which of them are in the loss; None: all are given


def _given(kind: str, ids: Tensor) -> Segment:
    return Segment(kind, ids)


def _predicted(kind: str, ids: Tensor, valid: Tensor | None = None) -> Segment:
    """`valid` [B, groups]: a group of a row whose tokens do not count is False."""
    if valid is None:
        return Segment(kind, ids, torch.ones_like(ids, dtype=torch.bool))
    return Segment(kind, ids, valid.repeat_interleave(ids.shape[1] // valid.shape[1], 1))


@dataclass(frozen=True)
class Stage2:
    """What pretraining predicts, and the text between its parts (paper section 4.2, variants in table 2)."""

    future: bool  # the frame o_{t+H}
    steps: int  # latent actions
    bridge: tuple[int, ...]  # text after the frames
    closing: tuple[int, ...]


STAGE2_VARIANTS = ("full", "ac", "sp2", "la")


def stage2(tokenizer: Tokenizer, config: ModelConfig, variant: str = "full") -> Stage2:
    """full: future frame and H latent actions; ac: one latent action; sp2: no frame; la: only the frame.

    Raises ValueError for another name.
    """
    if variant not in STAGE2_VARIANTS:
        raise ValueError(f"variant: {variant!r} is not one of {', '.join(STAGE2_VARIANTS)}")
    steps = {"ac": 1, "la": 0}.get(variant, config.horizon)
    bridge, closing = ("</vision> <dynamics>", "</dynamics>") if steps else ("</vision>", "")
    return Stage2(
        future=variant != "sp2",
        steps=steps,
        bridge=tuple(tokenizer.encode(bridge)),
        closing=(*tokenizer.encode(closing), tokenizer.eos),
    )


def stage2_segments(
    config: ModelConfig, choice: Stage2, frames: Tensor, latents: Tensor, valid: Tensor | None = None
) -> list[Segment]:
    """A stage-2 sequence after its text, with its labels.

    frames: codes of o_{t-1}, o_t, o_{t+H} [B, 3, N]; latents: z_t .. [B, H, 16]; valid [B, H]: latent actions
    that count (a clip's repeat-padded end does not). Parts that `choice` leaves out are ignored.
    """

    def text(ids: tuple[int, ...]) -> Tensor:
        return torch.tensor(ids, device=frames.device).expand(len(frames), -1)

    segments = [_given("vision", vision_ids(config, frames[:, :2], more=choice.future))]
    if choice.future:
        segments.append(_predicted("vision", close_each(frames[:, 2:3], config.end_of_vision)))
    segments.append(_predicted("text", text(choice.bridge)))
    if choice.steps:
        steps = slice(choice.steps)
        ids = close_each(latents[:, steps], config.end_of_step)
        segments.append(_predicted("latent", ids, None if valid is None else valid[:, steps]))
    return [*segments, _predicted("text", text(choice.closing))]


def action_segments(
    config: ModelConfig, codes: Tensor, bridge: Tensor, actions: Tensor, valid: Tensor | None = None
) -> list[Segment]:
    """A ViPRA-AR sequence after its text: frames [B, 2, N], or with o_{t+H}, which is predicted, [B, 3, N];
    text ids between, action codes [B, H, D]; valid [B, H]: actions that count.
    """
    frames = [_given("vision", vision_ids(config, codes[:, :2], more=config.future_frame))]
    if config.future_frame:
        frames.append(_predicted("vision", close_each(codes[:, 2:], config.end_of_vision)))
    return [
        *frames,
        _given("text", bridge.expand(len(codes), -1)),
        _predicted("action", close_each(actions, config.end_of_action), valid),
    ]


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


@dataclass(frozen=True)
class Packing:
    """Several sequences in a row [R, L], the padding between them gone; the reverse of `pad_left`."""

    take: Tensor  # [R, L] int64, which of the B x slots padded tokens; 0 past a row's end
    mask: Tensor  # [R, 1, L, L] bool, causal within a sequence
    back: Tensor  # [B, slots] int64, where among the R x L a padded token went; 0 for padding


def pack(lengths: list[int], slots: int, limit: int, device="cpu") -> Packing:
    """Put B sequences, the last `lengths` of `slots` tokens each, into rows of at most `limit`: each into the
    first row that has room. Raises ValueError for one that no row can hold.
    """
    if max(lengths) > limit:
        raise ValueError(f"a sequence of {max(lengths)} tokens does not fit rows of {limit}")
    rows: list[list[int]] = []
    for i, length in enumerate(lengths):
        room = (row for row in rows if sum(lengths[k] for k in row) + length <= limit)
        if (row := next(room, None)) is None:
            rows.append(row := [])
        row.append(i)
    width = max(sum(lengths[i] for i in row) for row in rows)
    take = torch.zeros(len(rows), width, dtype=torch.long)
    owner = torch.full((len(rows), width), -1)
    back = torch.zeros(len(lengths), slots, dtype=torch.long)
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            here = slice(at, at := at + lengths[i])
            take[r, here] = torch.arange(slots - lengths[i], slots) + i * slots
            owner[r, here] = i
            back[i, slots - lengths[i] :] = torch.arange(here.start, here.stop) + r * width
    owner = owner.to(device)
    same = owner[:, :, None] == owner[:, None]
    return Packing(take.to(device), same.tril()[:, None], back.to(device))
