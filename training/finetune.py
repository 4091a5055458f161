"""Stage 3: a policy that acts, by flow matching (ViPRA-FM) or discrete codes (ViPRA-AR); paper section 4.3,
appendix D. Table 2's ablations are values of the recipe: `horizon: 1` (-AC), `future_weight` (+SP3).

Notable: the prefix (text and frames) never sees the actions, so `samples` independent draws of
noise and flow time can share one prefix in one pass: the same gradient in expectation, for a fraction
of the arithmetic.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from config.embodiment import Embodiment
from config.loading import find, load
from config.training import FinetuneRecipe
from models import bins as discrete
from models import checkpoint, decode, normalization, sequence
from models.backbone import rope
from models.flow import flow_loss, integrate, sample_target
from models.policy import Policy
from training import lora, plots
from training.actions import Chunks, Corpus, chunk, history_frames, read_corpus
from training.data import windows
from training.data.loader import collate
from training.data.sampling import Samples
from training.distributed import Ranks
from training.export import Gathered
from training.loop import Batch, Stage, evaluate, to_device
from training.run import Run
from training.start import parts, weights_source
from training.text import Prompts


def shared_prefix(
    policy: Policy,
    texts: list[list[int]],
    codes: Tensor,
    x: Tensor,
    s: Tensor,
    bridge: Tensor,
    samples: int = 1,
    frame: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """g(x_s, s) [B * samples, H, D] for `samples` noisy chunks x a row, s [B * samples]; codes [B, F, N].

    frame: also the logits [B, N + 1, ids] of the last frame and its end, each from all tokens before it.
    """
    config, batch, horizon = policy.config, len(codes), x.shape[1]
    layout = policy.layout(max(map(len, texts)), bridge)
    ids, lengths = sequence.pad_left(texts, layout.text_slots, codes.device)
    noisy = policy.action_encoder(x, s).reshape(batch, samples * horizon, -1)
    embedded = torch.cat([policy.backbone.text_embedding(ids), policy.embed_scene(codes, bridge), noisy], 1)

    positions = sequence.positions(lengths, layout)
    prefix, actions_at = positions[:, : layout.first_action], positions[:, layout.first_action :]
    mask = sequence.attention_mask(lengths, layout, config.chunk_attention)
    first = layout.first_action
    size = first + samples * horizon
    wide = mask.new_zeros(batch, 1, size, size)
    wide[:, :, :first, :first] = mask[:, :, :first, :first]
    for k in range(samples):
        rows = slice(first + k * horizon, first + (k + 1) * horizon)
        wide[:, :, rows, :first] = mask[:, :, first:, :first]
        wide[:, :, rows, rows] = mask[:, :, first:, first:]
    rotation = rope(config, torch.cat([prefix, actions_at.repeat(1, samples)], 1))
    # `tail` reads the matrices past the adapters, and drops the frames
    tail = None if frame or lora.adapted(policy) else samples * horizon
    hidden = policy.backbone(embedded, rotation, wide, tail=tail)
    velocity = policy.action_head(hidden[:, -samples * horizon :]).reshape(batch * samples, horizon, -1)
    if not frame:
        return velocity, None
    last = layout.text_slots + layout.vision - 1
    return velocity, policy.backbone.vision_head(hidden[:, last - config.frame_tokens - 1 : last])


def shared_prefix_loss(
    policy: Policy,
    texts: list[list[int]],
    codes: Tensor,
    actions: Tensor,
    bridge: Tensor,
    samples: int = 1,
    valid: Tensor | None = None,
) -> dict[str, Tensor]:
    """Scalars of `samples` draws a row: `flow`, the flow-matching loss, and with the config's `future_frame`
    `vision`, the cross-entropy of o_{t+H}. codes [B, F, N]; actions [B, H, D] normalised; valid [B, H].

    `flow` equals `Policy.loss` for one sample, up to padded rows: here every row weighs the same.
    """
    config = policy.config
    target = sample_target(actions.float().repeat_interleave(samples, 0), config.objective)
    prediction, logits = shared_prefix(
        policy, texts, codes, target.x, target.s, bridge, samples, config.future_frame
    )
    if valid is None:
        parts = {"flow": flow_loss(prediction, target)}
    else:
        error = (target.weight * prediction.float() - target.velocity).square().mean(-1)
        counts = valid.repeat_interleave(samples, 0)
        parts = {"flow": ((error * counts).sum(1) / counts.sum(1).clamp(min=1)).mean()}
    if logits is not None:
        wanted = sequence.close_each(codes[:, 2:], config.end_of_vision)
        parts["vision"] = F.cross_entropy(logits.float().transpose(1, 2), wanted)
    return parts


class Actor(nn.Module):
    """What the loop calls: the loss of a batch, or (`what="sample"`) chunks sampled for it."""

    def __init__(self, policy: Policy, bridge: list[int], samples: int, future_weight: float):
        super().__init__()
        self.policy, self.bridge, self.samples = policy, bridge, samples
        self.future_weight = future_weight

    def forward(self, batch: Batch, step: int, what: str = "loss") -> dict[str, Tensor]:
        texts, codes, mask = batch["texts"], batch["codes"], batch["mask"]
        bridge = torch.tensor(self.bridge, device=codes.device)
        if what == "sample":
            return {"actions": self.sample(texts, codes, bridge, batch["actions"])}
        if self.policy.config.action_heads == "ar":
            parts = self.policy.ar_loss(texts, codes, batch["ids"], bridge, mask)
        else:
            parts = shared_prefix_loss(
                self.policy, texts, codes, batch["actions"], bridge, self.samples, mask
            )
            parts["loss"] = parts["flow"]
        if self.future_weight:
            parts["loss"] = parts["loss"] + self.future_weight * parts["vision"]
        return {name: value.clone() for name, value in parts.items()}  # FSDP2 wants no views

    def sample(self, texts: list[list[int]], codes: Tensor, bridge: Tensor, like: Tensor) -> Tensor:
        """Normalised actions [B, H, D] in 10 Euler steps, recomputing the prefix (no cache while sharded)."""
        noise = torch.randn(like.shape, device=like.device)

        def velocity(u: Tensor, s: float) -> Tensor:
            at = torch.full((len(u),), s, device=u.device)
            return shared_prefix(self.policy, texts, codes, u, at, bridge)[0]

        return integrate(velocity, noise, objective=self.policy.config.objective)


class Finetune(Stage):
    """Built on every rank; `demonstrations` encodes its share of the frames."""

    def __init__(self, recipe: FinetuneRecipe, robot: Embodiment, robot_text: str, planning: bool = False):
        self.recipe, self.robot, self.robot_text = recipe, robot, robot_text
        self.start, self.frames, config = parts(recipe, planning)
        self.prompts = Prompts(self.frames.tokenizer, config.max_text_tokens)
        self.config = config
        self.action_bins = self.normalizer = self.vqgan = None

    def fit(self, train: Corpus, held_out: Corpus) -> None:
        """Statistics of the training episodes, then the module that fits them."""
        recipe, robot = self.recipe, self.robot
        self.train_corpus, self.held_out = train, held_out
        for demonstration in (*train.episodes.values(), *held_out.episodes.values()):
            self.prompts(demonstration.instruction)  # too long a one ends the run here
        kinds = tuple(d.kind for d in robot.dimensions)
        cuts = [
            (chunk(e.actions, t, robot.horizon)[0], e.states[t])
            for e in train.episodes.values()
            for t in range(len(e.actions))
        ]
        chunks, states = np.stack([c for c, _ in cuts]), np.stack([s for _, s in cuts])
        relative, (low, high) = recipe.representation == "relative", np.array(robot.limits)
        self.normalizer = normalization.fit(
            chunks, robot.names, kinds, states if relative else None, recipe.normalization, high - low,
            each_action=recipe.normalize_each_action,
        )  # fmt: skip
        mean_state = states.mean(0) if relative else None
        self.mean_chunk = self.normalizer.normalize(chunks.mean(0), mean_state)  # [H, D]
        if recipe.head == "ar":
            raw = np.concatenate([e.actions for e in train.episodes.values()])
            self.action_bins = discrete.fit(raw, robot.names, kinds, recipe.bins)
        self.build()

    def build(self) -> None:
        """The module on meta, and where its weights come from."""
        recipe, robot = self.recipe, self.robot
        future = recipe.future_weight > 0
        frames = (2 + future) * (self.config.frame_tokens + 1)
        longest = self.config.max_text_tokens + frames + robot.horizon
        self.config = self.config.with_embodiment(
            robot.action_dim,
            robot.horizon,
            future_frame=future,
            max_positions=max(self.config.max_positions, longest),
            action_heads=recipe.head,
            action_vocab=_action_ids(recipe, self.action_bins),
            chunk_attention=recipe.chunk_attention,
            representation=recipe.representation,
            dropout=recipe.dropout,
            activation=recipe.activation,
            time_embedding=recipe.time_embedding,
        )
        with torch.device("meta"):
            policy = Policy(self.config)
        unused = ["backbone.text_head", "latent_embedding", "latent_head"]
        unused += [] if future else ["backbone.vision_head"]
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(unused)))
        source, self.fresh = weights_source(self.config, self.start, self.frames, recipe.seed)
        if recipe.lora:
            source = lora.attach(policy, recipe.lora, source, recipe.seed, recipe.precision)
        bridge = sequence.encode_bridge(self.frames.tokenizer)
        self.module = Actor(policy, bridge, recipe.samples, recipe.future_weight)
        self.layers = policy.backbone.layers
        self.source = lambda name: source(name.removeprefix("policy."))
        self.tokens_per_sample = (
            self.config.max_text_tokens // 2 + self.config.vision_tokens + robot.horizon * recipe.samples
        )

    def prepare(self, batch: Batch, device: torch.device) -> Batch:
        raw = batch["actions"].numpy()
        state = batch["state"].numpy() if self.normalizer.needs_state else None
        actions = torch.from_numpy(self.normalizer.normalize(raw, state))
        if "frames" in batch:  # augmented: encoded anew each time
            batch = {**batch, "codes": self.frame_codes(batch["frames"].to(device))}
        ready = {**batch, "actions": actions, "texts": [self.prompts(t) for t in batch["instruction"]]}
        if self.action_bins:
            ready["ids"] = torch.from_numpy(self.action_bins.encode(raw))
        return to_device(ready, device)

    @torch.no_grad()
    def frame_codes(self, frames: Tensor) -> Tensor:
        """uint8 RGB [B, 2, s, s, 3] -> codes [B, 2, tokens a frame]."""
        if self.vqgan is None:
            self.vqgan = self.frames.vqgan(frames.device)
        codes = self.vqgan.encode(self.vqgan.to_input(frames.flatten(0, 1)))
        return codes.unflatten(0, frames.shape[:2])

    def example(self, count: int) -> Batch:
        """A batch on meta, for estimates."""
        shape = (count, self.robot.horizon, self.robot.action_dim)
        on = {"device": "meta"}
        return {
            "texts": [[0] * 48] * count,
            "codes": torch.zeros(count, self.config.frames, self.config.frame_tokens, dtype=torch.long, **on),
            "actions": torch.zeros(shape, **on),
            "ids": torch.zeros(shape, dtype=torch.long, **on),
            "mask": torch.ones(shape[:2], dtype=torch.bool, **on),
        }

    def samples(self) -> Chunks | Samples:
        recipe, robot = self.recipe, self.robot
        if recipe.augmentation is None:
            return self.chunks(self.train_corpus)
        window = windows.Chunks(robot.horizon, self.config.vqgan.image_size, robot.history_seconds)
        return Samples(recipe.data, window, recipe.seed, recipe.augmentation)

    def chunks(self, corpus: Corpus) -> Chunks:
        recipe, robot = self.recipe, self.robot
        future = self.config.future_frame
        return Chunks(corpus, recipe.seed, robot.horizon, history_frames(robot), recipe.history_lags, future)

    # held-out episodes

    @property
    def plays(self) -> bool:
        """Whether validation samples actions; decoding tokens reads the matrices past the adapters."""
        decodes = self.recipe.head == "ar" or self.recipe.future_weight > 0
        return not (decodes and self.recipe.lora)

    def validate(self, step: int, run: Run, ranks: Ranks, recipe: FinetuneRecipe) -> dict[str, float]:
        corpus = self.held_out
        if not corpus.episodes:
            return {}
        chunks = self.chunks(corpus)
        picked = [chunks.read(*place) for place in corpus.spread(recipe.validation.samples)]

        def measure(batch: Batch) -> dict[str, Tensor]:
            found = self.module(batch, step)
            count, mask = len(batch["codes"]), batch["mask"][..., None]
            if not self.plays:
                return {"loss": found["loss"].expand(count)}
            error = (self.sampled(batch, step) - batch["actions"]) * mask
            baseline = (batch["actions"] - torch.from_numpy(self.mean_chunk).to(error.device)) * mask
            scale = torch.tensor(self.normalizer.scale, device=error.device)
            return {
                "loss": found["loss"].expand(count),
                "action_mse": error.square().sum((1, 2)),
                "mean_action_mse": baseline.square().sum((1, 2)),
                "absolute": error.abs() * scale,
                "count": mask.sum((1, 2)) * error.shape[-1],
                "counts": mask.expand_as(error).float(),
            }

        means = evaluate(self, picked, ranks, recipe, measure)
        metrics = {"loss": float(means["loss"])}
        if not self.plays:
            return metrics
        metrics |= {key: float(means[key] / means["count"]) for key in ("action_mse", "mean_action_mse")}
        error = means["absolute"] / np.maximum(means["counts"], 1e-9)
        metrics["action_error"] = float(error.mean())
        self.report(step, run, error)
        self.replay(step, run, ranks, recipe)
        return metrics

    def sampled(self, batch: Batch, step: int) -> Tensor:
        """Chunks the policy would play, normalised [B, H, D]: ten Euler steps, or the likeliest codes; behind
        the o_{t+H} that it imagines itself, where the actions follow one.
        """
        policy, codes = self.module.policy, batch["codes"]
        bridge = torch.tensor(self.module.bridge, device=codes.device)
        if self.config.future_frame:
            alone = sequence.Stage2(future=True, steps=0, bridge=tuple(self.module.bridge), closing=())
            self.module.unshard()  # its tables are read outside its forward
            future = decode.imagine(policy, batch["texts"], codes[:, :2], alone).future
            self.module.reshard()
            codes = torch.cat([codes[:, :2], future[:, None]], 1)
        if self.recipe.head == "flow":
            return self.module({**batch, "codes": codes}, step, what="sample")["actions"]
        self.module.unshard()
        texts = [policy.encode_text(text) for text in batch["texts"]]
        cache = decode.action_cache(policy, len(codes), bridge)
        ids = decode.decode_actions(policy, texts, codes, cache, bridge, self.action_bins.counts)
        self.module.reshard()
        actions = self.action_bins.decode(ids.cpu().numpy())
        return torch.from_numpy(self.normalizer.normalize(actions)).to(codes.device)

    def report(self, step: int, run: Run, error: np.ndarray) -> None:
        """Absolute error [H, D], rad and opening, of held-out chunks: a table and a plot."""
        self.action_error = error
        header = "step," + ",".join(self.robot.names)
        rows = [f"{i}," + ",".join(f"{v:.5f}" for v in row) for i, row in enumerate(error)]
        run.write("action_error.csv", "\n".join([header, *rows]) + "\n")
        if run.rank == 0:
            run.figure(step, "action_error", plots.action_error(error, self.robot.names))

    def replay(self, step: int, run: Run, ranks: Ranks, recipe: FinetuneRecipe) -> None:
        """One held-out episode, a new chunk every H frames, against its demonstration."""
        corpus = self.held_out
        name = next(iter(corpus.episodes))
        episode, horizon = corpus.episodes[name], self.robot.horizon
        chunks = self.chunks(corpus)
        parts = [chunks.read(name, t) for t in range(0, len(episode.actions), horizon)]
        torch.manual_seed(recipe.seed)
        batches = [parts[i : i + recipe.micro_batch] for i in range(0, len(parts), recipe.micro_batch)]
        with torch.no_grad():  # every rank: sharded modules need all of them
            ready = [self.prepare(collate(batch), ranks.device) for batch in batches]
            sampled = torch.cat([self.sampled(batch, step) for batch in ready]).cpu().numpy()
        states = np.stack([part["state"] for part in parts]) if self.normalizer.needs_state else None
        played = self.normalizer.denormalize(sampled, states).reshape(-1, self.robot.action_dim)
        if run.rank == 0:
            figure = plots.replay(
                played[: len(episode.actions)], episode.actions, self.robot.names, self.robot.rate_hz, horizon
            )
            run.figure(step, "open_loop", figure)

    # what comes out

    def export(self, folder: Path, run: Run, ranks: Ranks) -> str | None:
        """Write the checkpoint `vipra serve` loads, in bf16. Every rank calls it; rank 0 returns the hash."""
        shapes = checkpoint.parameter_shapes(Policy, self.config)
        gathered = Gathered(self.module.policy, self.recipe.lora)
        if not ranks.first:
            gathered.follow(shapes)
            return None
        vqgan = checkpoint.compact(dict(self.frames.vqgan().named_parameters()))
        text = checkpoint.texts(self.frames.tokenizer, self.normalizer, self.robot_text, self.action_bins)
        # exported models run without dropout; the choice stays in the run's config.yaml
        config = replace(self.config, dropout=0.0)
        weights = checkpoint.Weights(shapes, gathered, torch.bfloat16)
        digest = checkpoint.write(folder, config, weights, vqgan, text)
        (folder / "README.md").write_text(self.card(folder, run))
        return digest

    def card(self, folder: Path, run: Run) -> str:
        recipe, last = self.recipe, run.last()
        head = {"flow": "ViPRA-FM", "ar": "ViPRA-AR"}[recipe.head]
        head += " +SP3 (for study, cannot be served)" if self.config.future_frame else ""
        began = f"`{self.start.path.name}` ({self.start.hash[:12]})" if self.start else "random weights"
        tasks = sorted({e.instruction for e in self.train_corpus.episodes.values()})
        shown = "; ".join(tasks[:12]) + (f"; and {len(tasks) - 12} more" if len(tasks) > 12 else "")
        size = sum(math.prod(s) for s in checkpoint.parameter_shapes(Policy, self.config).values())
        episodes = len(self.train_corpus.episodes), len(self.held_out.episodes)
        return CARD.format(
            name=folder.name, head=head, parameters=size,
            model=recipe.model, robot=self.robot.name, dim=self.robot.action_dim, horizon=self.robot.horizon,
            rate=self.robot.rate_hz, representation=recipe.representation, began=began, tasks=shown,
            episodes=episodes[0], held_out=episodes[1], steps=recipe.steps, batch=recipe.global_batch,
            how="LoRA, merged" if recipe.lora else "all weights", run=run.folder.name,
            measured=json.dumps(last, indent=1),
        )  # fmt: skip


def _action_ids(recipe: FinetuneRecipe, bins: discrete.ActionBins | None) -> int:
    """Rows of the discrete action table; before the data is read, as many as there can be."""
    if recipe.head != "ar":
        return 0
    return bins.vocab if bins else recipe.bins + 1


CARD = """# {name}

{head} for `{robot}`: {dim} {representation} actions, chunks of {horizon} at {rate:g} Hz. {model},
{parameters:,} parameters, finetuned from {began} ({how}).

- Demonstrations: {episodes} episodes; {held_out} more held out
- Instructions: {tasks}
- {steps} steps of {batch} samples; run `{run}` has the recipe, curves and pictures
- Last measured:

```json
{measured}
```

Serve it: `vipra serve --policy POLICY.yaml` with `checkpoint:` set to this folder.
"""


def embodiment(recipe: FinetuneRecipe) -> tuple[Embodiment, str]:
    """The recipe's embodiment with its horizon, and the YAML text that says so. Raises ConfigError."""
    path = find(Embodiment.KIND, recipe.embodiment)
    robot, text = load(Embodiment, recipe.embodiment), path.read_text()
    if recipe.horizon is None:
        return robot, text
    data = {**yaml.safe_load(text), "horizon": recipe.horizon}
    return robot.model_copy(update={"horizon": recipe.horizon}), yaml.safe_dump(data, sort_keys=False)


def plan(recipe: FinetuneRecipe) -> Finetune:
    """The stage without data, for estimates."""
    stage = Finetune(recipe, *embodiment(recipe), planning=True)
    stage.build()
    return stage


def build(recipe: FinetuneRecipe, ranks: Ranks, run: Run) -> Finetune:
    """Read and encode the demonstrations, fit their statistics, plan the module."""
    robot, text = embodiment(recipe)
    recipe = recipe.model_copy(update={"data": recipe.data.seen_through(robot.crop, robot.camera)})
    stage = Finetune(recipe, robot, text)
    relative = recipe.representation == "relative"
    train, held = read_corpus(recipe.data, robot, stage.frames.vqgan(ranks.device), ranks, run, relative)
    stage.fit(train, held)
    run.say(
        f"{len(train.episodes)} episodes, {len(train.frames)} frames; {len(held.episodes)} episodes held out"
    )
    if not stage.plays:
        run.say("adapters with discrete actions or a predicted frame: validation measures the loss alone")
    if stage.fresh and stage.start:
        run.say(f"random at the start: {', '.join(sorted({n.rsplit('.', 1)[0] for n in stage.fresh}))}")
    return stage
