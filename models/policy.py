"""ViPRA-FM: two frames and an instruction in, a chunk of H normalised actions out.

Training (stage 3); frames are o_{t-1}, o_t, and the VQGAN stays frozen:

    texts  = [encode_prompt(tokenizer, task) for task in tasks]      # models.sequence
    codes  = vqgan.encode(vqgan.to_input(frames.flatten(0, 1))).view(B, 2, -1)  # uint8 [B, 2, h, w, 3]
    loss   = policy.loss(texts, codes, normalizer.normalize(actions, state), bridge=encode_bridge(tokenizer))

Inference works over one static KV cache: `encode_text` (once a task), `prefill` (frames and the first Euler
step in one pass), `step` for every later evaluation; `sample` is those in order. Below them, `prefill_frame`,
`prefill_rows` and `prefix` touch only tensors they are given, so a GPU can record them (models.graphs).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import sequence
from models.backbone import Backbone, KVCache, rope
from models.config import ModelConfig
from models.flow import flow_loss, integrate, sample_target, schedule
from models.heads import (
    ActionEncoder,
    LatentHead,
    action_code_head,
    action_embedding,
    flow_head,
    latent_embedding,
)
from models.sequence import Layout, Segment, Stage2

STAGE2_WEIGHTS = {"vision": 0.48, "latent": 0.48, "text": 0.02}  # official; the paper has no text term
ALIGNED = 16  # slots of a cache come in multiples of this
Ids = Sequence[int] | Tensor  # token ids; a tensor on the model's device saves the copy


@dataclass
class TextPrefix:
    """Keys and values [layers, heads, tokens, head_dim] of one prompt (or of o_{t-1} after one): the same for
    every request that starts with it.
    """

    k: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        return self.k.shape[2]


@dataclass
class Prefix:
    """State of a chunk between prefill and its last step: which rows, and the actions' fixed rotation and
    mask.
    """

    cache: KVCache
    layout: Layout
    rotation: tuple[Tensor, Tensor]
    mask: Tensor


class Policy(nn.Module):
    """Backbone and heads. `serving=True` leaves out tables and heads that actions do not use."""

    def __init__(self, config: ModelConfig, serving: bool = False):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, token_heads=not serving)
        self.latent_embedding = None if serving else latent_embedding(config)
        self.latent_head = None if serving else LatentHead(config)
        flow, discrete = config.action_heads == "flow", config.action_heads == "ar"
        self.action_encoder = ActionEncoder(config) if flow else None
        self.action_head = flow_head(config) if flow else None
        self.action_embedding = action_embedding(config) if discrete else None
        self.action_code_head = action_code_head(config) if discrete else None

    @property
    def device(self) -> torch.device:
        return self.backbone.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.norm.weight.dtype

    def layout(self, text_slots: int, bridge: Ids) -> Layout:
        return Layout(text_slots, self.config.vision_tokens, len(bridge), self.config.horizon)

    def embed_scene(self, codes: Tensor, bridge: Ids) -> Tensor:
        """VQGAN codes [B, F, N] and the text after them -> embeddings [B, vision + bridge, hidden]."""
        vision = self.backbone.vision_embedding(sequence.vision_ids(self.config, codes))
        after = self.backbone.text_embedding(torch.as_tensor(bridge, device=codes.device))
        return torch.cat([vision, after.expand(len(codes), -1, -1)], 1)

    # one whole sequence at once: training, and the reference that cached inference must equal

    def velocity(self, texts: list[list[int]], codes: Tensor, x: Tensor, s: Tensor, bridge: Ids) -> Tensor:
        """g(x_s, s) [B, H, D] recomputing every token. texts: ids up to `<vision>`; codes [B, 2, N]; x [B, H,
        D]; s [B].
        """
        layout = self.layout(max(map(len, texts)), bridge)
        ids, lengths = sequence.pad_left(texts, layout.text_slots, codes.device)
        embedded = [
            self.backbone.text_embedding(ids),
            self.embed_scene(codes, bridge),
            self.action_encoder(x, s),
        ]
        hidden = self.backbone(
            torch.cat(embedded, 1),
            rope(self.config, sequence.positions(lengths, layout)),
            sequence.attention_mask(lengths, layout, self.config.chunk_attention),
            tail=layout.horizon,
        )
        return self.action_head(hidden)

    def loss(
        self,
        texts: list[list[int]],
        codes: Tensor,
        actions: Tensor,
        bridge: Ids,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Flow-matching loss (scalar) for normalised actions [B, H, D]; `valid` [B, H] marks actions that
        count.
        """
        target = sample_target(actions.float(), self.config.objective, generator)
        return flow_loss(self.velocity(texts, codes, target.x, target.s, bridge), target, valid)

    @torch.inference_mode()
    def sample_recomputing(
        self,
        texts: list[list[int]],
        codes: Tensor,
        noise: Tensor,
        bridge: Ids,
        steps: int = 10,
        sampler="euler",
    ) -> Tensor:
        """The chunk, recomputing the prefix at every step: what the cache is checked and measured against."""

        def velocity(u: Tensor, s: float) -> Tensor:
            return self.velocity(texts, codes, u, torch.full((len(u),), s, device=u.device), bridge)

        return integrate(velocity, noise, steps, sampler, self.config.objective)

    # cached inference

    def new_cache(self, batch: int, bridge: Ids, text_slots: int | None = None) -> KVCache:
        """A cache for up to `batch` rows of `text_slots` text slots, two frames and a chunk.

        Default: the config's text slots, and as many more as make rows of a mask as long as GPU kernels like.
        """
        if text_slots is None:
            text_slots = self.config.max_text_tokens
            text_slots += -self.layout(text_slots, bridge).slots % ALIGNED
        return KVCache(self.config, batch, self.layout(text_slots, bridge).slots, self.device, self.dtype)

    def cache_layout(self, cache: KVCache, bridge: Ids) -> Layout:
        """Where the parts of a sequence sit in a cache of `new_cache`."""
        return self.layout(cache.slots - self.layout(0, bridge).slots, bridge)

    @torch.inference_mode()
    def encode_text(self, text: list[int]) -> TextPrefix:
        """Keys and values of one prompt."""
        n = len(text)
        cache = KVCache(self.config, 1, n, self.device, self.dtype)
        ids = torch.tensor([text], device=self.device)
        mask = torch.ones(n, n, dtype=torch.bool, device=self.device).tril()[None, None]
        rotation = rope(self.config, torch.arange(n, device=self.device)[None])
        self.backbone(self.backbone.text_embedding(ids), rotation, mask, cache, tail=0)
        return TextPrefix(cache.k[:, 0], cache.v[:, 0])

    @torch.inference_mode()
    def prefill(
        self,
        texts: list[TextPrefix],
        codes: Tensor,
        noise: Tensor,
        cache: KVCache,
        bridge: Ids,
        s: float = 0.0,
    ) -> tuple[Prefix, Tensor]:
        """Fill `cache` with B rows and evaluate g(noise, s) [B, H, D] in the same pass.

        Text lands right-aligned in the cache's text slots. Raises ValueError when a prompt is longer than
        those.
        """
        end = self.cache_layout(cache, bridge).text_slots
        for row, text in enumerate(texts):
            if text.length > end:
                raise ValueError(f"text of {text.length} tokens does not fit {end} slots")
            cache.place(row, end, text.k, text.v)
        lengths = torch.tensor([text.length for text in texts]).to(self.device, non_blocking=True)
        first = self.prefill_rows(lengths, codes, noise, cache, bridge, s)
        return self.prefix(lengths, cache, bridge), first

    def prefill_frame(self, lengths: Tensor, codes: Tensor, cache: KVCache, bridge: Ids) -> slice:
        """Keys and values of o_{t-1}, codes [B, N], into its slots, which are returned: before o_t exists.

        lengths [B]: real tokens of the rows' prompts, which are in the cache.
        """
        layout = self.cache_layout(cache, bridge)
        ids = sequence.vision_ids(self.config, codes[:, None], more=True)
        slots = slice(layout.text_slots, layout.text_slots + ids.shape[1])
        rotation, mask = self._places(lengths, layout, slots)
        x = self.backbone.vision_embedding(ids)
        self.backbone(x, rotation, mask, cache, start=slots.start, tail=0)
        return slots

    def prefill_rows(
        self, lengths: Tensor, codes: Tensor, noise: Tensor, cache: KVCache, bridge: Ids, s: float = 0.0
    ) -> Tensor:
        """g(noise, s) [B, H, D], filling the rest of the cache behind its prompts of `lengths` [B] tokens.

        codes: o_{t-1} and o_t [B, 2, N], or only o_t [B, 1, N] behind what `prefill_frame` has filled.
        """
        layout = self.cache_layout(cache, bridge)
        done = (2 - codes.shape[1]) * (self.config.frame_tokens + 1)
        slots = slice(layout.text_slots + done, layout.slots)
        actions = self.action_encoder(noise, torch.full((len(noise),), s, device=noise.device))
        x = torch.cat([self.embed_scene(codes, bridge), actions], 1)
        rotation, mask = self._places(lengths, layout, slots)
        hidden = self.backbone(x, rotation, mask, cache, start=slots.start, tail=layout.horizon)
        return self.action_head(hidden)

    def prefix(self, lengths: Tensor, cache: KVCache, bridge: Ids) -> Prefix:
        """What `step` needs of rows that are filled."""
        layout = self.cache_layout(cache, bridge)
        slots = slice(layout.first_action, layout.slots)
        return Prefix(cache, layout, *self._places(lengths, layout, slots))

    def _places(self, lengths: Tensor, layout: Layout, slots: slice) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Rotation and mask of the tokens in `slots`."""
        n, choice = slots.stop - slots.start, self.config.chunk_attention
        positions = sequence.positions(lengths, layout, slots.start)[:, :n]
        mask = sequence.attention_mask(lengths, layout, choice, slots.start)[:, :, :n]
        return rope(self.config, positions), mask

    @torch.inference_mode()
    def step(self, prefix: Prefix, u: Tensor, s: float) -> Tensor:
        """g(u, s) [B, H, D] against the cached prefix; overwrites the actions' own slots."""
        x = self.action_encoder(u, torch.full((len(u),), s, device=u.device))
        start = prefix.layout.first_action
        return self.action_head(self.backbone(x, prefix.rotation, prefix.mask, prefix.cache, start=start))

    @torch.inference_mode()
    def sample(
        self,
        texts: list[TextPrefix],
        codes: Tensor,
        noise: Tensor,
        cache: KVCache,
        bridge: Ids,
        steps: int = 10,
        sampler: str = "euler",
    ) -> Tensor:
        """Noise [B, H, D] fp32 -> normalised actions [B, H, D] fp32."""
        first_s = schedule(steps, self.config.objective)[0][0]
        prefix, first = self.prefill(texts, codes, noise, cache, bridge, first_s)
        return integrate(
            lambda u, s: self.step(prefix, u, s), noise, steps, sampler, self.config.objective, first=first
        )

    # tokens: pretraining (stage 2) and discrete actions (ViPRA-AR)

    def embed(self, kind: str, ids: Tensor, first: int = 0) -> Tensor:
        """Ids [B, n] of a `sequence.Segment`'s kind -> [B, n, hidden]; first: place in its frame of a vision
        segment's first id.
        """
        backbone = self.backbone
        if kind == "vision":
            return backbone.vision_embedding(ids, first)
        return {
            "text": backbone.text_embedding,
            "latent": self.latent_embedding,
            "action": self.action_embedding,
        }[kind](ids)

    def token_head(self, kind: str) -> nn.Module:
        """What turns a hidden state into logits over the ids of a kind."""
        backbone = self.backbone
        return {
            "text": backbone.text_head,
            "vision": backbone.vision_head,
            "latent": self.latent_head,
            "action": self.action_code_head,
        }[kind]

    def token_logits(
        self, texts: list[list[int]], segments: list[Segment], pack: int | None = None
    ) -> list[Tensor | None]:
        """For each segment the logits [B, n, ids] of its tokens, each from all tokens before it.

        Teacher forcing; None for a segment that is given. texts: ids up to `<vision>`. pack: compute rows of
        up to so many tokens that hold several sequences; the result is the same.
        """
        widths = [segment.ids.shape[1] for segment in segments]
        layout = sequence.token_layout(max(map(len, texts)), sum(widths))
        ids, lengths = sequence.pad_left(texts, layout.text_slots, segments[0].ids.device)
        embedded = [self.embed(segment.kind, segment.ids) for segment in segments]
        x = torch.cat([self.backbone.text_embedding(ids), *embedded], 1)
        places = sequence.positions(lengths, layout)
        if pack is None:
            mask = sequence.attention_mask(lengths, layout)
            hidden = self.backbone(x, rope(self.config, places), mask)
        else:
            real = [len(text) + sum(widths) for text in texts]
            rows = sequence.pack(real, layout.slots, pack, x.device)
            places = places.flatten()[rows.take]
            hidden = self.backbone(x.flatten(0, 1)[rows.take], rope(self.config, places), rows.mask)
            hidden = hidden.flatten(0, 1)[rows.back]
        before = hidden[:, layout.text_slots - 1 : -1].split(widths, 1)
        return [
            None if segment.counts is None else self.token_head(segment.kind)(h)
            for segment, h in zip(segments, before, strict=True)
        ]

    def token_losses(
        self, texts: list[list[int]], segments: list[Segment], pack: int | None = None
    ) -> dict[str, Tensor]:
        """Cross-entropy and accuracy of each predicted kind: {kind: .., kind_accuracy: ..}, scalars.

        A sample's mean over its tokens that count, then the mean over samples, so that a batch may be split.
        """
        sums: dict[str, Tensor] = {}
        for segment, logits in zip(segments, self.token_logits(texts, segments, pack), strict=True):
            if logits is None:
                continue
            error = F.cross_entropy(logits.float().transpose(1, 2), segment.ids, reduction="none")
            right = logits.argmax(-1) == segment.ids
            part = torch.stack([error, right.float(), torch.ones_like(error)]) * segment.counts
            sums[segment.kind] = sums.get(segment.kind, 0) + part.sum(-1)
        means = {kind: (part[:2] / part[2].clamp(min=1)).mean(1) for kind, part in sums.items()}
        return {kind: error for kind, (error, _) in means.items()} | {
            f"{kind}_accuracy": right for kind, (_, right) in means.items()
        }

    def pretrain_loss(
        self,
        texts: list[list[int]],
        frames: Tensor,
        latents: Tensor,
        choice: Stage2,
        valid: Tensor | None = None,
        weights: dict[str, float] = STAGE2_WEIGHTS,
        pack: int | None = None,
    ) -> dict[str, Tensor]:
        """Stage 2: predict o_{t+H} and the latent actions (paper section 4.2, equation 3).

        frames: codes of o_{t-1}, o_t, o_{t+H} [B, 3, N]; latents [B, H, 16]; valid [B, H] marks latent
        actions that count; pack: as in `token_logits`. Returns scalars: `loss`, and of each kind (vision,
        latent, text) cross-entropy and accuracy.
        """
        segments = sequence.stage2_segments(self.config, choice, frames, latents, valid)
        parts = self.token_losses(texts, segments, pack)
        return {
            "loss": sum(weight * parts[kind] for kind, weight in weights.items() if kind in parts)
        } | parts

    def ar_loss(
        self,
        texts: list[list[int]],
        codes: Tensor,
        actions: Tensor,
        bridge: Ids,
        valid: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """ViPRA-AR, stage 3: cross-entropy of action codes [B, H, D] and their ends (`ActionBins.encode`).

        codes [B, 2, N], or with the o_{t+H} of +SP3 [B, 3, N]; valid [B, H] marks actions that count.
        Returns scalars: `loss`, that of the actions, and of each kind cross-entropy and accuracy.
        """
        bridge = torch.as_tensor(bridge, device=codes.device)
        segments = sequence.action_segments(self.config, codes, bridge, actions, valid)
        parts = self.token_losses(texts, segments)
        return {"loss": parts["action"]} | parts
