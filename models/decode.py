"""Generation token by token over one static KV cache: discrete actions, future frame, latent actions.

A token's kind and place in the sequence are known in advance. So every choice is among the valid ids of that
place, ends are never chosen but fed with the code before them, and the number of passes is fixed: nothing in
a loop waits for the device.

    cache   = decode.action_cache(policy, batch, bridge)
    ids     = decode.decode_actions(policy, prefixes, codes, cache, bridge, bins.counts)   # [B, H, D]
    actions = bins.decode(ids.cpu().numpy())                                             # raw
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import sequence
from models.backbone import KVCache, rope
from models.config import ModelConfig
from models.policy import Ids, Policy, TextPrefix
from models.sequence import Stage2


@dataclass(frozen=True)
class Sampling:
    """How a code is chosen: the likeliest (temperature 0), or drawn, from the `top_k` likeliest (0: all)."""

    temperature: float = 0.0
    top_k: int = 0
    generators: tuple[torch.Generator, ...] = ()  # one a row, on the model's device: a row is its own draw

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature} must not be negative")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k} must not be negative")
        if self.temperature and not self.generators:
            raise ValueError("temperature: drawing needs one generator a row")


GREEDY = Sampling()


def choose(logits: Tensor, count: int, sampling: Sampling = GREEDY) -> Tensor:
    """Logits [B, ids] -> one of the ids 0..count-1 for each row [B]."""
    scores = logits[:, :count].float()
    if sampling.temperature == 0:
        return scores.argmax(-1)
    if 0 < sampling.top_k < count:
        least = scores.topk(sampling.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    # softmax draw as a race of exponentials: unlike torch.multinomial it never waits for the device
    clocks = [torch.empty_like(scores[0]).exponential_(generator=g) for g in sampling.generators]
    clock = torch.stack(clocks).clamp_min(torch.finfo(torch.float32).tiny)
    return (scores / sampling.temperature - clock.log()).argmax(-1)


class Rows:
    """B rows of a cache: their prompts are in it, `feed` appends. Raises ValueError when they do not fit."""

    def __init__(
        self,
        policy: Policy,
        texts: list[TextPrefix],
        cache: KVCache,
        tokens: int,
        sampling: Sampling,
        on_code: Callable[[], None] = lambda: None,
    ):
        """`tokens` is the room kept after the prompts; `on_code` is called after each choice."""
        if sampling.temperature and len(sampling.generators) != len(texts):
            raise ValueError(f"{len(sampling.generators)} generators for {len(texts)} rows")
        end = cache.slots - tokens
        for row, text in enumerate(texts):
            if text.length > end:
                raise ValueError(f"text of {text.length} tokens does not fit {end} slots")
            cache.place(row, end, text.k, text.v)
        layout = sequence.token_layout(end, tokens)
        lengths = torch.tensor([text.length for text in texts]).to(policy.device, non_blocking=True)
        self.policy, self.cache, self.next_slot = policy, cache, end
        self.sampling, self.on_code = sampling, on_code
        self.cos, self.sin = rope(policy.config, sequence.positions(lengths, layout))
        self.mask = sequence.attention_mask(lengths, layout)

    def feed(self, x: Tensor) -> Tensor:
        """Embeddings [B, n, hidden] of the next n tokens -> hidden state [B, hidden] after the last."""
        start, self.next_slot = self.next_slot, self.next_slot + x.shape[1]
        now = slice(start, self.next_slot)
        rotation = self.cos[:, :, now], self.sin[:, :, now]
        hidden = self.policy.backbone(x, rotation, self.mask[:, :, now], self.cache, start, tail=1)
        self.last = hidden[:, 0]
        return self.last

    def finite(self) -> Tensor:
        """Rows [B] whose states hold no NaN or infinity: every token passes its own on to all later ones."""
        return self.last.isfinite().all(-1)

    def codes(self, before: Tensor, kind: str, counts: Sequence[int], end: int) -> tuple[Tensor, Tensor]:
        """One code for each of `counts`, its number of valid ids, then the id `end`.

        before: embeddings [B, n, hidden] not fed yet. Returns codes [B, len(counts)] and the embeddings then
        not fed yet: of the last code and of `end`.
        """
        embed, head = self.policy.embed, self.policy.token_head(kind)
        chosen = []
        for place, count in enumerate(counts):
            code = choose(head(self.feed(before)), count, self.sampling)
            self.on_code()
            chosen.append(code)
            before = embed(kind, code[:, None], place)
        closing = embed(kind, torch.full_like(chosen[-1][:, None], end), len(counts))
        return torch.stack(chosen, 1), torch.cat([before, closing], 1)


def action_cache(policy: Policy, batch: int, bridge: Ids, text_slots: int | None = None) -> KVCache:
    """A cache for `decode_actions`: up to `batch` rows of `text_slots` (default: the config's) text slots."""
    slots = (text_slots or policy.config.max_text_tokens) + _action_tokens(policy, bridge)
    return KVCache(policy.config, batch, slots, policy.device, policy.dtype)


def _action_tokens(policy: Policy, bridge: Ids) -> int:
    config = policy.config
    return config.vision_tokens + len(bridge) + config.horizon * (config.action_dim + 1)


@torch.inference_mode()
def decode_actions(
    policy: Policy,
    texts: list[TextPrefix],
    codes: Tensor,
    cache: KVCache,
    bridge: Ids,
    counts: Sequence[int],
    sampling: Sampling = GREEDY,
) -> Tensor:
    """ViPRA-AR: frames' codes [B, 2, N] -> ids of the chunk [B, H, D] int64, dimension d below `counts[d]`;
    -1 in rows where the network's numbers are not finite.

    H x D passes: an action's end rides with its last code.
    """
    config = policy.config
    rows = Rows(policy, texts, cache, _action_tokens(policy, bridge), sampling)
    before, chunk = policy.embed_scene(codes, bridge), []
    for _ in range(config.horizon):
        action, before = rows.codes(before, "action", counts, config.end_of_action)
        chunk.append(action)
    return torch.stack(chunk, 1).masked_fill(~rows.finite()[:, None, None], -1)


@dataclass
class Imagined:
    """What a pretrained model expects to happen."""

    future: Tensor | None  # VQGAN codes of o_{t+H} [B, N]
    latents: Tensor | None  # latent actions z_t .. [B, steps, codes]


def stage2_tokens(config: ModelConfig, choice: Stage2) -> tuple[int, int]:
    """Tokens of a stage-2 sequence between its text and its closing text, and how many of them are chosen."""
    frames = (3 if choice.future else 2) * (config.frame_tokens + 1)
    chosen = choice.future * config.frame_tokens + choice.steps * config.latent_tokens
    return frames + len(choice.bridge) + choice.steps * (config.latent_tokens + 1), chosen


@torch.inference_mode()
def imagine(
    policy: Policy,
    texts: list[list[int]],
    codes: Tensor,
    choice: Stage2,
    sampling: Sampling = GREEDY,
    on_code: Callable[[], None] = lambda: None,
) -> Imagined:
    """Stage 2: frames' codes [B, 2, N] and prompts -> o_{t+H} and the latent actions that lead there.

    `on_code` is called after each code. Raises ValueError for a policy loaded for serving.
    """
    config = policy.config
    if policy.latent_head is None:
        raise ValueError("a policy loaded for serving has no token heads: load with serving=False")
    tokens, _ = stage2_tokens(config, choice)
    prefixes = [policy.encode_text(text) for text in texts]
    slots = max(prefix.length for prefix in prefixes) + tokens
    cache = KVCache(config, len(texts), slots, policy.device, policy.dtype)
    rows = Rows(policy, prefixes, cache, tokens, sampling, on_code)
    bridge = policy.embed("text", torch.tensor(choice.bridge, device=codes.device))

    before = policy.embed("vision", sequence.vision_ids(config, codes, more=choice.future))
    future, steps = None, []
    if choice.future:
        counts = [config.vqgan.codebook_size] * config.frame_tokens
        future, before = rows.codes(before, "vision", counts, config.end_of_vision)
    before = torch.cat([before, bridge.expand(len(codes), -1, -1)], 1)
    for _ in range(choice.steps):
        counts = [config.latent_codes] * config.latent_tokens
        step, before = rows.codes(before, "latent", counts, config.end_of_step)
        steps.append(step)
    return Imagined(future, torch.stack(steps, 1) if steps else None)
