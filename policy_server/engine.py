"""The policy on its device: encode frames, prefill with the first Euler step, nine more steps, un-normalise.

Notable: every buffer is allocated once for `max_batch` robots; keys and values of a task's prompt are
computed once and copied into fixed, masked slots; the noise comes from each request's own seed, so a request
gets the same chunk alone or in a batch. The same code runs on CPU and GPU, and nothing waits for the GPU
between upload and read-out.
"""

import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import yaml

from config.embodiment import Embodiment
from config.loading import parse, root
from config.policy import Policy as PolicyConfig
from models import checkpoint as checkpoints
from models import sequence
from models.checkpoint import Checkpoint, CheckpointError
from models.flow import integrate, schedule
from models.policy import TextPrefix
from policy_server.protocol import MAX_TASK_CHARACTERS, ErrorCode, Limits, Metadata
from policy_server.scheduler import Request, Result

CACHED_TASKS = 16  # prompts whose keys and values are kept


class EngineError(RuntimeError):
    """A request cannot be answered: `code` is the protocol's, the message says what was expected."""

    def __init__(self, code: ErrorCode, message: str):
        super().__init__(message)
        self.code = code


class Stopwatch:
    """Times between marks on the device's own timeline, ms; never makes the host wait before `read`."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def read(self) -> list[float]:
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.cuda:
            self.marks[-1].synchronize()
            return [a.elapsed_time(b) for a, b in pairs]
        return [(b - a) * 1e3 for a, b in pairs]


class Engine:
    """A checkpoint ready to answer; `policy_server.scheduler.Policy` for the server. One thread at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_batch: int = 4,
        sampler: str = "euler",
        steps: int = 10,
    ):
        """Allocates all buffers on the checkpoint's device.

        Raises CheckpointError when its parts disagree or it cannot act, ConfigError for a bad embodiment.
        """
        config, device = checkpoint.config, checkpoint.policy.device
        if config.action_heads == "none":
            raise CheckpointError(
                f"{config.name} has no action heads: it is pretrained only. Finetune it: vipra train finetune"
            )
        embodiment = _embodiment(checkpoint)
        if sampler == "heun" and config.objective != "corrected":
            raise CheckpointError("the heun sampler integrates the corrected objective only: use euler")
        self.config, self.policy, self.vqgan = config, checkpoint.policy, checkpoint.vqgan
        self.tokenizer, self.normalizer = checkpoint.tokenizer, checkpoint.normalizer
        self.max_batch, self.sampler, self.steps, self.device = max_batch, sampler, steps, device
        size, pinned = config.vqgan.image_size, device.type == "cuda"
        self.bridge = torch.tensor(sequence.encode_bridge(self.tokenizer), device=device)
        self.cache = self.policy.new_cache(max_batch, self.bridge)
        self._images_host = torch.zeros(max_batch, 2, size, size, 3, dtype=torch.uint8, pin_memory=pinned)
        self._images = self._images_host if not pinned else self._images_host.to(device)
        self._noise_host = torch.zeros(max_batch, config.horizon, config.action_dim, pin_memory=pinned)
        self._noise = self._noise_host if not pinned else self._noise_host.to(device)
        self._texts: OrderedDict[str, TextPrefix] = OrderedDict()
        low, high = self.normalizer.limits
        weights = [*self.policy.parameters(), *self.vqgan.parameters()]
        self.metadata = Metadata.describe(
            embodiment,
            model=config.name,
            parameters=sum(p.numel() for p in weights),
            checkpoint=checkpoint.hash,
            image_size=(size, size),
            needs_state=self.normalizer.needs_state,
            limits=Limits(action_low=tuple(low.tolist()), action_high=tuple(high.tolist())),
            max_batch=max_batch,
        )

    @classmethod
    def from_policy(cls, policy: PolicyConfig) -> "Engine":
        """Load what a policy file names. Raises CheckpointError, and ConfigError for a bad embodiment."""
        if policy.threads is not None:
            torch.set_num_threads(policy.threads)
        device = policy.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise CheckpointError("device cuda was asked for, but torch sees no GPU: use device: auto or cpu")
        dtype = policy.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        folder = Path(policy.checkpoint).expanduser()
        folder = folder if folder.is_absolute() else root() / folder
        loaded = checkpoints.load(folder, device, getattr(torch, dtype), serving=True)
        return cls(loaded, policy.max_batch, policy.sampler, policy.steps)

    def warm_up(self) -> float:
        """Run full and single batches until caches and allocators are warm; median latency of one request,
        ms.
        """
        size, state = self.config.vqgan.image_size, None
        if self.normalizer.needs_state:
            state = np.asarray(self.normalizer.centre, np.float32) * 0
        request = Request(np.zeros((2, size, size, 3), np.uint8), "warm up", 0, state)
        self.infer([request] * self.max_batch)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            self.infer([request])
            times.append(time.perf_counter() - start)
        return sorted(times)[len(times) // 2] * 1e3

    @torch.inference_mode()
    def infer(self, requests: list[Request]) -> list[Result]:
        """One chunk a request, in order: float32 [H, D] in rad and opening, within the metadata's limits.

        All or nothing. Raises EngineError: bad_image, bad_state, bad_task, unsupported, invalid, non_finite.
        """
        if not 1 <= len(requests) <= self.max_batch:
            raise EngineError("invalid", f"{len(requests)} requests, this engine takes 1 to {self.max_batch}")
        for row, request in enumerate(requests):
            self._check(request)
            self._images_host[row].numpy()[...] = request.images
            generator = torch.Generator().manual_seed(request.seed)
            torch.randn(self._noise_host.shape[1:], generator=generator, out=self._noise_host[row])
        n, watch = len(requests), Stopwatch(self.device)
        images, noise = self._images[:n], self._noise[:n]
        texts = [self._text(request.task) for request in requests]
        watch.mark()
        if self.device.type == "cuda":
            images.copy_(self._images_host[:n], non_blocking=True)
            noise.copy_(self._noise_host[:n], non_blocking=True)
        codes = self.vqgan.encode(self.vqgan.to_input(images.flatten(0, 1))).view(n, 2, -1)
        watch.mark()
        objective = self.config.objective
        first_s = schedule(self.steps, objective)[0][0]
        prefix, first = self.policy.prefill(texts, codes, noise, self.cache, self.bridge, first_s)
        watch.mark()
        chunk = integrate(
            lambda u, s: self.policy.step(prefix, u, s), noise, self.steps, self.sampler, objective, first
        )
        watch.mark()
        normalised = chunk.cpu().numpy()
        if not np.isfinite(normalised).all():
            raise EngineError("non_finite", "the network's actions hold NaN or infinity")
        timing = dict(zip(("encode", "prefill", "integrate"), watch.read(), strict=True))
        return [
            Result(self.normalizer.denormalize(actions, request.state), timing)
            for actions, request in zip(normalised, requests, strict=True)
        ]

    def prefetch(self, task: str, image: np.ndarray) -> None:
        """Compute the keys and values of `task` ahead of its first request. `image` is not used yet.

        Raises EngineError bad_task.
        """
        self._text(task)

    def _check(self, request: Request) -> None:
        images, size, dim = request.images, self.config.vqgan.image_size, self.config.action_dim
        expected = (2, size, size, 3)
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != expected:
            found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images)
            raise EngineError("bad_image", f"images are {found}, this policy takes uint8 {list(expected)}")
        if type(request.seed) is not int or not 0 <= request.seed < 2**63:
            raise EngineError("invalid", f"seed {request.seed!r} is not an integer from 0 to 2^63 - 1")
        if request.prefix is not None or request.delay_steps:
            raise EngineError("unsupported", "this policy takes no prefix and no delay_steps")
        if self.normalizer.needs_state:
            if request.state is None:
                raise EngineError("bad_state", f"this policy needs the state [{dim}] at t_obs")
            state = np.asarray(request.state)
            if state.shape != (dim,) or state.dtype.kind != "f" or not np.isfinite(state).all():
                raise EngineError("bad_state", f"state must be {dim} finite floats, got {state!r:.200}")

    def _text(self, task: str) -> TextPrefix:
        """Keys and values of a task's prompt, computed once. Raises EngineError bad_task."""
        if isinstance(task, str) and task in self._texts:
            self._texts.move_to_end(task)
            return self._texts[task]
        if not isinstance(task, str) or not task.strip() or len(task) > MAX_TASK_CHARACTERS:
            raise EngineError("bad_task", f"task must be 1 to {MAX_TASK_CHARACTERS} characters, not blank")
        try:
            task.encode()
        except UnicodeEncodeError as error:
            raise EngineError("bad_task", f"task is not valid Unicode: {error}") from error
        ids = sequence.encode_prompt(self.tokenizer, task)
        if len(ids) > self.config.max_text_tokens:
            raise EngineError(
                "bad_task",
                f"the prompt is {len(ids)} tokens, this policy takes {self.config.max_text_tokens}: shorten",
            )
        self._texts[task] = self.policy.encode_text(ids)
        if len(self._texts) > CACHED_TASKS:
            self._texts.popitem(last=False)
        return self._texts[task]


def _embodiment(checkpoint: Checkpoint) -> Embodiment:
    """The checkpoint's embodiment; normalisation and model must describe the same action vector."""
    try:
        data = yaml.safe_load(checkpoint.embodiment)
    except yaml.YAMLError as error:
        raise CheckpointError(f"embodiment.yaml is not YAML: {error}") from error
    embodiment = parse(Embodiment, data, "embodiment.yaml")
    config, normalizer = checkpoint.config, checkpoint.normalizer
    kinds = tuple(dimension.kind for dimension in embodiment.dimensions)
    for what, found, expected in (
        ("action_dim", config.action_dim, embodiment.action_dim),
        ("horizon", config.horizon, embodiment.horizon),
        ("normalization names", normalizer.names, embodiment.names),
        ("normalization kinds", normalizer.kinds, kinds),
    ):
        if found != expected:
            raise CheckpointError(f"{what} is {found}, embodiment {embodiment.name} says {expected}")
    return embodiment
