"""The policy behind the server: checks requests, remembers prompts and announced frames, answers in rad.

Notable: keys and values of a task's prompt, and of a frame o_{t-1} that `prefetch` announced, are computed
once; the noise comes from each request's own seed, so a request gets the same chunk alone or in a batch. What
computes is models.runner, the same on CPU and GPU.
"""

import contextlib
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from config.embodiment import Embodiment
from config.loading import parse, root
from config.policy import Policy as PolicyConfig
from models import checkpoint as checkpoints
from models import fp8, sequence
from models.checkpoint import Checkpoint, CheckpointError
from models.config import ModelConfig
from models.policy import TextPrefix
from models.runner import Runner
from policy_server import memory
from policy_server.memory import CACHED_TASKS, FRAMES_PER_ROW
from policy_server.protocol import MAX_TASK_CHARACTERS, ErrorCode, Limits, Metadata
from policy_server.scheduler import DeviceFailed, Request, Result

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)
ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # on a GPU: those that take any mask


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
        cuda_graphs: bool = True,
        quantization: str = "none",
        image_encoder: str = "auto",
        progress: Progress | None = None,
        noise_scale: float = 1.0,
    ):
        """Allocates all buffers on the checkpoint's device.

        Arguments as in config.policy. quantization fp8: of a twin, the checkpoint's policy stays as it is; on
        a GPU its image encoder is converted in place. Raises CheckpointError when its parts disagree or it
        cannot act, ConfigError for a bad embodiment.
        """
        config, policy = checkpoint.config, checkpoint.policy
        _require_heads(config)
        embodiment = _embodiment(checkpoint)
        if sampler == "heun" and config.objective != "corrected":
            raise CheckpointError("the heun sampler integrates the corrected objective only: use euler")
        self.config, self.tokenizer, self.normalizer = config, checkpoint.tokenizer, checkpoint.normalizer
        self.bins, self.max_batch, self.device = checkpoint.bins, max_batch, policy.device
        self._progress = progress or (lambda stage, done, total: None)
        if quantization == "fp8":
            policy = fp8.twin(policy)
            _quantize(policy, self._progress)
        on_gpu = self.device.type == "cuda"
        chosen = policy.dtype if image_encoder == "auto" else getattr(torch, image_encoder)
        checkpoint.vqgan.set_encoder(chosen if on_gpu else torch.float32)
        self.runner = Runner(
            policy,
            checkpoint.vqgan,
            sequence.encode_bridge(self.tokenizer),
            max_batch,
            sampler,
            steps,
            cuda_graphs,
            self.bins.counts if self.bins else (),
            noise_scale,
        )
        self._texts: OrderedDict[str, TextPrefix] = OrderedDict()
        self._frames: OrderedDict[tuple[str, bytes], TextPrefix] = OrderedDict()  # by task and image
        self._lost: str | None = None  # why nothing can be computed any more
        low, high = self.normalizer.limits
        size = config.vqgan.image_size
        self.metadata = Metadata.describe(
            embodiment,
            model=config.name,
            parameters=sum(p.numel() for p in (*policy.parameters(), *checkpoint.vqgan.parameters())),
            checkpoint=checkpoint.hash,
            image_size=(size, size),
            needs_state=self.normalizer.needs_state,
            supports_prefetch=self.runner.flow,
            device=torch.cuda.get_device_name(self.device) if on_gpu else "cpu",
            limits=Limits(action_low=tuple(low.tolist()), action_high=tuple(high.tolist())),
            max_batch=max_batch,
        )

    @classmethod
    def from_policy(cls, policy: PolicyConfig, progress: Progress | None = None) -> "Engine":
        """Load what a policy file names. Raises CheckpointError, and ConfigError for a bad embodiment.

        progress: called here and in `warm_up`, and once with done == total for each stage.
        """
        if policy.threads is not None:
            torch.set_num_threads(policy.threads)
        device = policy.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device == "cuda" and not torch.cuda.is_available():
            raise CheckpointError("device cuda was asked for, but torch sees no GPU: use device: auto or cpu")
        name = policy.dtype
        if name == "auto":
            name = "bfloat16" if device == "cuda" else "float32"
        dtype = getattr(torch, name)
        folder = Path(policy.checkpoint).expanduser()
        folder = folder if folder.is_absolute() else root() / folder
        if folder.is_dir():
            _require_heads(checkpoints.read_config(folder))  # before gigabytes are read
        if device == "cuda" and folder.is_dir():
            if policy.quantization == "fp8" and not fp8.supported(torch.device(device)):
                found = torch.cuda.get_device_name(device)
                raise CheckpointError(f"{found} does not multiply fp8 (Hopper or later does): use none")
            free, _ = torch.cuda.mem_get_info()
            memory.require(
                free, checkpoints.read_config(folder), dtype, policy.quantization, policy.max_batch
            )
        loaded = checkpoints.load(folder, device, dtype, serving=True, progress=progress)
        if policy.quantization == "fp8":
            _quantize(loaded.policy, progress or (lambda stage, done, total: None))
        return cls(
            loaded,
            policy.max_batch,
            policy.sampler,
            policy.steps,
            policy.cuda_graphs,
            image_encoder=policy.image_encoder,
            progress=progress,
            noise_scale=policy.noise_scale,
        )

    def warm_up(self) -> float:
        """Run until caches and allocators are warm and every graph is recorded; median latency of one
        request, ms.
        """
        size, state, task = self.config.vqgan.image_size, None, "warm up"
        if self.normalizer.needs_state:
            state = np.zeros(len(self.normalizer.names), np.float32)
        request = Request(np.zeros((2, size, size, 3), np.uint8), task, 0, state)
        stage, batches = "capturing graphs", self.runner.batches[::-1]
        if not self.runner.graphs.enabled:
            stage, batches = "warming up", sorted({1, self.max_batch}, reverse=True)
        for done, rows in enumerate(batches):
            self._progress(stage, done, len(batches))
            self.infer([request] * rows)
            if self.runner.flow:
                self.prefetch(task, request.images[0])
                self.infer([request] * rows)
                self._frames.clear()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            self.infer([request])
            times.append(time.perf_counter() - start)
        self._progress(stage, len(batches), len(batches))
        return sorted(times)[len(times) // 2] * 1e3

    def memory(self) -> dict[str, int]:
        """Bytes on the device by use; `graphs`, with all that is computed in them, once they are recorded."""
        policy, cache, graphs = self.runner.policy, self.runner.cache, 0
        weights = [*policy.parameters(), *policy.buffers(), *self.runner.vqgan.parameters()]
        kept = [t for p in (*self._texts.values(), *self._frames.values()) for t in (p.k, p.v)]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what stays reserved and is not allocated belongs to the graphs
            graphs = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return {
            "weights": sum(t.nbytes for t in weights),
            "cache": cache.k.nbytes + cache.v.nbytes,
            "buffers": sum(t.nbytes for t in (*self.runner.buffers, *kept)),
            "graphs": graphs,
        }

    def infer(self, requests: list[Request]) -> list[Result]:
        """One chunk a request, in order: float32 [H, D] in rad and opening, within the metadata's limits.

        All or nothing. Raises EngineError: bad_image, bad_state, bad_task, unsupported, invalid, non_finite,
        inference_failed; DeviceFailed once the GPU has failed.
        """
        n = len(requests)
        if not 1 <= n <= self.max_batch:
            raise EngineError("invalid", f"{n} requests, this engine takes 1 to {self.max_batch}")
        for row, request in enumerate(requests):
            self._check(request)
            self.runner.set_row(row, request.images, request.seed)
        with self._computing():
            texts = [self._text(request.task) for request in requests]
            found = [self._prefetched(request) for request in requests]
            frames = None if None in found else found
            watch = Stopwatch(self.device)
            self.runner.run(texts, frames, watch.mark)
            timing = dict(zip(("encode", "prefill", "integrate"), watch.read(), strict=True))
        chunk = self.runner.chunk.host[:n].numpy()
        if not np.isfinite(chunk).all():
            raise EngineError("non_finite", "the network's actions hold NaN or infinity")
        return [
            Result(self._actions(x, request.state), timing, prefetched=frames is not None)
            for x, request in zip(chunk, requests, strict=True)
        ]

    def prefetch(self, task: str, image: np.ndarray) -> None:
        """Compute keys and values of `task` and of `image` as o_{t-1}, so that an `infer` with both computes
        only what is new in it: the same chunk, sooner.

        Raises EngineError bad_task, bad_image, inference_failed; DeviceFailed.
        """
        expected = tuple(self.runner.images.host.shape[2:])
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != expected:
            raise EngineError("bad_image", f"o_{{t-1}} must be uint8 {list(expected)}")
        with self._computing():
            text, key = self._text(task), (task, _digest(image))
            if not self.runner.flow:
                return
            if key not in self._frames:
                self._frames[key] = self.runner.prefill_frame(text, image)
            self._frames.move_to_end(key)
            if len(self._frames) > FRAMES_PER_ROW * self.max_batch:
                self._frames.popitem(last=False)

    def _prefetched(self, request: Request) -> TextPrefix | None:
        """Keys and values of the request's o_{t-1}, if they were computed ahead."""
        if not any(task == request.task for task, _ in self._frames):
            return None
        key = (request.task, _digest(request.images[0]))
        if key in self._frames:
            self._frames.move_to_end(key, last=False)  # used: the first to go
        return self._frames.get(key)

    def _actions(self, x: np.ndarray, state: np.ndarray | None) -> np.ndarray:
        """The network's [H, D] -> the embodiment's units, within limits."""
        if self.bins is None:
            return self.normalizer.denormalize(x, state)
        return np.clip(self.bins.decode(x.astype(np.int64)), *self.normalizer.limits).astype(np.float32)

    @contextlib.contextmanager
    def _computing(self):
        """Around all work on the device: how it runs, and what its errors are called."""
        if self._lost is not None:
            raise DeviceFailed(self._lost)
        kernels = sdpa_kernel(ATTENTION) if self.device.type == "cuda" else contextlib.nullcontext()
        try:
            with torch.inference_mode(), kernels:
                yield
        except EngineError:
            raise
        except torch.OutOfMemoryError as error:
            raise EngineError("inference_failed", "the GPU is out of memory: lower max_batch") from error
        except RuntimeError as error:
            if not isinstance(error, torch.AcceleratorError) and "CUDA error" not in str(error):
                raise
            self.runner.graphs.drop()
            self._lost = f"the GPU failed: {str(error).splitlines()[0]}"
            raise DeviceFailed(self._lost) from error

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
        self._texts[task] = self.runner.policy.encode_text(ids)
        if len(self._texts) > CACHED_TASKS:
            self._texts.popitem(last=False)
        return self._texts[task]


def _require_heads(config: ModelConfig) -> None:
    if config.action_heads == "none":
        raise CheckpointError(
            f"{config.name} has no action heads: it is pretrained only. Finetune it: vipra train finetune"
        )


def _digest(image: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image).data).digest()


def _quantize(policy: nn.Module, progress: Progress) -> None:
    try:
        fp8.quantize(policy, lambda done, total: progress("quantising", done, total))
    except ValueError as error:
        raise CheckpointError(str(error)) from error


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
