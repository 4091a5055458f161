"""Two frames on the host to a chunk of actions on the host, for every way of computing it, in one run.

    python -m benchmarks.chunk_latency --model tiny|100m|7b [--json FILE]

    recompute           the whole sequence again at each of the ten Euler steps
    transformers        transformers.LlamaModel over the same weights: prompt and frames into a DynamicCache,
                        then ten steps, the chunk's keys cut off after each
    transformers_tuned  the same given two of the engine's savings: the prompt's keys are known beforehand,
                        and the first Euler step rides in the prefill pass
    growing             as that, in our layers: what the static cache is compared with
    eager               the server's engine: static cache, no CUDA graphs; what runs on a CPU
    graph               the same with CUDA graphs
    fp8                 the same with CUDA graphs and fp8 weights and activations
    prefetch            `graph` (on a CPU `eager`), o_{t-1} prefilled before o_t came: the critical path
    fp8_prefetch        `fp8` likewise

Every variant gets the same frames, noise, prompt and weights and runs the same VQGAN. Rounds are interleaved
and ratios are medians over rounds (on a CPU of the process's own CPU time), so they hold on a busy machine.
On a GPU the ways that are not the engine run in every fifth round only, like `recompute` everywhere. Each
variant's actions are compared with `eager`'s: in fp32 a difference above 1e-4 is an error.
"""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from benchmarks import common, device
from models import sequence
from models.backbone import rope
from models.checkpoint import Checkpoint
from models.config import ModelConfig
from models.flow import integrate, schedule
from models.policy import Policy, TextPrefix
from policy_server.engine import Engine, Stopwatch
from policy_server.scheduler import Request

PROMPTS, DIMS = (20, 60), (7, 8, 16)
ENGINES, PREFETCHED = ("eager", "graph", "fp8"), {"prefetch": "graph", "fp8_prefetch": "fp8"}
VARIANTS = ("recompute", "transformers", "transformers_tuned", "growing", *ENGINES, *PREFETCHED)
SLOW = ("recompute", "transformers", "transformers_tuned", "growing")
RARE = {"cpu": SLOW[:1], "cuda": SLOW}  # in every fifth round only: a GPU's time is scarce
ROUNDS = {("tiny", "cpu"): 40, ("100m", "cpu"): 6, ("7b", "cuda"): 100}
TOLERANCE = 1e-4  # of normalised actions, fp32
STAGES = ("encode", "prefill", "integrate")
TITLES = {
    "variant": "variant",
    "prompt_tokens": "prompt",
    "action_dim": "D",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
    "encode_ms": "encode",
    "prefill_ms": "prefill",
    "integrate_ms": "integrate",
    "floor_ms": "floor ms",
    "of_floor": "p50 / floor",
    "to_transformers": "/ transformers",
    "difference": "max diff.",
}

# the ways that are not the engine: (codes, noise, watch) -> normalised actions; one mark after prefill

Sampler = Callable[[Tensor, Tensor, Stopwatch], Tensor]


def recompute(policy: Policy, text: list[int], bridge: Tensor) -> Sampler:
    def sample(codes: Tensor, noise: Tensor, watch: Stopwatch) -> Tensor:
        watch.mark()
        return policy.sample_recomputing([text], codes, noise, bridge, device.STEPS)

    return sample


class GrowingCache:
    """`KVCache`'s `update` without its buffers: what is new from `start` on is concatenated."""

    def __init__(self, text: TextPrefix):
        self.layers = [(k[None], v[None]) for k, v in zip(text.k, text.v, strict=True)]

    def update(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(self.layers[layer], (k, v), strict=True)
        self.layers[layer] = tuple(torch.cat([old[:, :, :start], new], 2) for old, new in pairs)
        return self.layers[layer]


class Unpadded:
    """Embeddings, positions and mask after one prompt, without padding: what any LLaMA can take."""

    def __init__(self, policy: Policy, text: list[int], bridge: Tensor):
        self.policy, self.bridge, self.text = policy, bridge, policy.encode_text(text)
        config, n, h = policy.config, len(text), policy.config.horizon
        lengths, layout = torch.tensor([n], device=policy.device), policy.layout(n, bridge)
        self.layout, self.times = layout, [s for s, _ in schedule(device.STEPS, config.objective)]
        self.ids = torch.tensor([text], device=policy.device)
        self.whole_positions = sequence.positions(lengths, layout)
        self.whole_mask = sequence.attention_mask(lengths, layout, config.chunk_attention)
        self.positions, self.mask = self.whole_positions[:, n:], self.whole_mask[:, :, n:]
        self.rotation = rope(config, self.positions)
        self.step_rotation = tuple(part[:, :, -h:] for part in self.rotation)

    def actions(self, u: Tensor, s: float) -> Tensor:
        return self.policy.action_encoder(u, torch.full((1,), s, device=u.device))

    def prefill(self, codes: Tensor, noise: Tensor) -> Tensor:
        scene = self.policy.embed_scene(codes, self.bridge)
        return torch.cat([scene, self.actions(noise, self.times[0])], 1)


def growing(prompt: Unpadded) -> Sampler:
    policy, h = prompt.policy, prompt.layout.horizon

    def sample(codes: Tensor, noise: Tensor, watch: Stopwatch) -> Tensor:
        cache = GrowingCache(prompt.text)

        def run(x: Tensor, rotation: tuple, mask: Tensor, start: int) -> Tensor:
            return policy.action_head(policy.backbone(x, rotation, mask, cache, start, tail=h))

        x = prompt.prefill(codes, noise)
        first = run(x, prompt.rotation, prompt.mask, prompt.layout.text_slots)
        watch.mark()
        mask, start = prompt.mask[:, :, -h:], prompt.layout.first_action

        def velocity(u: Tensor, s: float) -> Tensor:
            return run(prompt.actions(u, s), prompt.step_rotation, mask, start)

        return integrate(velocity, noise, device.STEPS, "euler", policy.config.objective, first)

    return sample


def llama(policy: Policy) -> LlamaModel:
    """transformers' LLaMA over views of the policy's own weights: no copy, same numbers."""
    config = policy.config
    if config.rope_precision != "fp32":
        raise ValueError(f"transformers computes RoPE in fp32, this model has {config.rope_precision}")
    shape = LlamaConfig(
        hidden_size=config.hidden,
        intermediate_size=config.mlp_hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        vocab_size=1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        model = LlamaModel(shape).eval()
    model.rotary_emb = type(model.rotary_emb)(shape).to(policy.device)

    def assign(module: nn.Module, weight: Tensor) -> None:
        module.weight = nn.Parameter(weight, requires_grad=False)

    assign(model.norm, policy.backbone.norm.weight.detach())
    for theirs, ours in zip(model.layers, policy.backbone.layers, strict=True):
        q, k, v = ours.qkv.weight.detach().chunk(3)
        gate, up = ours.gate_up.weight.detach().chunk(2)
        attention, mlp = theirs.self_attn, theirs.mlp
        for module, weight in (
            (attention.q_proj, q),
            (attention.k_proj, k),
            (attention.v_proj, v),
            (attention.o_proj, ours.out.weight.detach()),
            (mlp.gate_proj, gate),
            (mlp.up_proj, up),
            (mlp.down_proj, ours.down.weight.detach()),
            (theirs.input_layernorm, ours.attention_norm.weight.detach()),
            (theirs.post_attention_layernorm, ours.mlp_norm.weight.detach()),
        ):
            assign(module, weight)
    return model


def transformers(prompt: Unpadded, model: LlamaModel, tuned: bool) -> Sampler:
    policy, h, objective = prompt.policy, prompt.layout.horizon, prompt.policy.config.objective
    known = [(k[None], v[None]) for k, v in zip(prompt.text.k, prompt.text.v, strict=True)]
    end = prompt.layout.first_action

    def sample(codes: Tensor, noise: Tensor, watch: Stopwatch) -> Tensor:
        cache = DynamicCache(known) if tuned else DynamicCache()

        def run(x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
            given = {"attention_mask": mask, "position_ids": positions}
            return model(inputs_embeds=x, past_key_values=cache, use_cache=True, **given).last_hidden_state

        def actions(hidden: Tensor) -> Tensor:
            cache.crop(-h)  # the chunk's own keys and values: the next step replaces them
            return policy.action_head(hidden[:, -h:])

        def velocity(u: Tensor, s: float) -> Tensor:
            return actions(run(prompt.actions(u, s), prompt.mask[:, :, -h:], prompt.positions[:, -h:]))

        first = None
        if tuned:
            first = actions(run(prompt.prefill(codes, noise), prompt.mask, prompt.positions))
        else:
            text = policy.backbone.text_embedding(prompt.ids)
            x = torch.cat([text, policy.embed_scene(codes, prompt.bridge)], 1)
            run(x, prompt.whole_mask[:, :, :end, :end], prompt.whole_positions[:, :end])
        watch.mark()
        return integrate(velocity, noise, device.STEPS, "euler", objective, first)

    return sample


Chunk = Callable[[Request], tuple[np.ndarray, dict[str, float]]]  # -> normalised actions, stage times in ms


def around(checkpoint: Checkpoint, sample: Sampler) -> Chunk:
    """From frames to actions on the host as the engine does it, with another sampler inside."""
    config, vqgan, where = checkpoint.config, checkpoint.vqgan, checkpoint.policy.device

    @torch.inference_mode()
    def run(request: Request) -> tuple[np.ndarray, dict[str, float]]:
        generator = torch.Generator().manual_seed(request.seed)
        noise = torch.randn(1, config.horizon, config.action_dim, generator=generator)
        watch = Stopwatch(where)
        watch.mark()
        images, noise = torch.from_numpy(request.images).to(where), noise.to(where)
        codes = vqgan.encode(vqgan.to_input(images)).view(1, 2, -1)
        watch.mark()
        chunk = sample(codes, noise, watch)
        watch.mark()
        actions = checkpoint.normalizer.denormalize(chunk.cpu().numpy()[0], request.state)
        return actions, dict(zip(STAGES, watch.read(), strict=True))

    return run


def served(engine: Engine) -> Chunk:
    def run(request: Request) -> tuple[np.ndarray, dict[str, float]]:
        (result,) = engine.infer([request])
        return result.actions, result.timing

    return run


@dataclass(frozen=True)
class Ways:
    """Everything that computes chunks of one set of random weights."""

    checkpoint: Checkpoint
    engines: dict[str, Engine]
    llama: LlamaModel

    @classmethod
    def build(cls, config: ModelConfig, where: torch.device) -> "Ways":
        checkpoint = common.random_checkpoint(config, where)
        engines = {
            kind: common.engine(checkpoint, kind) for kind in ENGINES if common.skipped(kind, where) is None
        }
        return cls(checkpoint, engines, llama(checkpoint.policy))

    def engine(self, variant: str) -> Engine:
        """What serves a variant; on a CPU `eager` stands in for `graph`."""
        return self.engines.get(PREFETCHED.get(variant, variant), self.engines["eager"])

    def chunks(self, task: str) -> dict[str, Chunk]:
        """Every variant that runs on this device."""
        policy, tokenizer = self.checkpoint.policy, self.checkpoint.tokenizer
        text, bridge = sequence.encode_prompt(tokenizer, task), sequence.encode_bridge(tokenizer)
        bridge = torch.tensor(bridge, device=policy.device)
        unpadded = Unpadded(policy, text, bridge)
        samplers = {
            "recompute": recompute(policy, text, bridge),
            "transformers": transformers(unpadded, self.llama, tuned=False),
            "transformers_tuned": transformers(unpadded, self.llama, tuned=True),
            "growing": growing(unpadded),
        }
        return {
            name: around(self.checkpoint, samplers[name]) if name in samplers else served(self.engine(name))
            for name in VARIANTS
            if common.skipped(name, policy.device) is None
        }


def measure(ways: Ways, rates: device.Rates, prompt: int, rounds: int) -> list[dict]:
    """Rows of every variant at one prompt length. Raises RuntimeError when fp32 actions differ too much."""
    config, where = ways.checkpoint.config, ways.checkpoint.policy.device
    task = common.task_of(prompt, ways.checkpoint.tokenizer)
    # frames of their own for prefetched rows: nobody else's o_{t-1} may be known
    requests = {known: common.request(config, task, seed=int(known)) for known in (False, True)}
    expected = {
        known: ways.engines["eager"].infer([request])[0].actions for known, request in requests.items()
    }
    chunks, before, runs, stages, difference = ways.chunks(task), {}, {}, {}, {}
    for name, chunk in chunks.items():
        known, stages[name] = name in PREFETCHED, []
        if known:
            before[name] = partial(ways.engine(name).prefetch, task, requests[known].images[0])
            before[name]()
        difference[name] = float(np.abs(chunk(requests[known])[0] - expected[known]).max())
        if ways.checkpoint.policy.dtype == torch.float32 and not difference[name] <= TOLERANCE:
            raise RuntimeError(f"{name} differs from eager by {difference[name]:.2e}, allowed: {TOLERANCE}")

        def run(chunk=chunk, request=requests[known], kept=stages[name]) -> None:
            kept.append(chunk(request)[1])

        runs[name] = run
    times = common.interleave(runs, rounds, before, RARE[where.type])
    rows = []
    for name in VARIANTS:
        row = {"variant": name, "prompt_tokens": prompt, "action_dim": config.action_dim}
        rows.append(row)
        if reason := common.skipped(name, where):
            row |= dict.fromkeys(TITLES.keys() - row.keys()) | {"skipped": reason}
            continue
        precision = device.PRECISIONS[where.type]["fp8" in name]
        floor = device.floor(config, rates, prompt, precision, prefetched=name in PREFETCHED).total_ms
        row |= times[name].percentiles
        for stage in STAGES:
            row[f"{stage}_ms"] = round(statistics.median(taken[stage] for taken in stages[name]), 2)
        row |= {
            "floor_ms": floor,
            "of_floor": row["p50_ms"] / floor,
            "to_transformers": times[name].ratio(times["transformers"], where),
            "difference": difference[name],
            "rounds": len(times[name].wall),
        }
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = common.parser("chunk_latency", __doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, metavar="TOKENS")
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, metavar="D")
    arguments = parser.parse_args(argv)
    where = common.device(arguments.device, arguments.threads)
    rounds = arguments.repeats or ROUNDS.get((arguments.model, where.type), 20)
    rates = device.measure(common.sized(arguments.model), where, at_least_s=min(1.0, 0.05 * rounds))
    rows = []
    for dim in arguments.dims:
        ways = Ways.build(common.sized(arguments.model, dim), where)
        for prompt in track(arguments.prompts, f"D = {dim}"):
            rows += measure(ways, rates, prompt, rounds)
        ways = None  # the next size needs the memory
        gc.collect()
    report = common.header("chunk_latency", where, model=arguments.model) | {
        "steps": device.STEPS,
        "bandwidth_bytes_per_s": rates.bandwidth,
        "rows": rows,
    }
    common.show(f"vipra_{arguments.model}: chunk latency, {report['device']}", rows, TITLES)
    for reason in common.reasons(rows):
        print(f"skipped {reason}")
    common.write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
