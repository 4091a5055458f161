"""A policy over buffers allocated once: images in, a chunk of normalised actions out, up to B rows at a time.

    encode frames -> prefill, with the first Euler step -> the other steps -> read

Notable: the functions that compute (`_encode`, `_prefill_frame`, `_prefill`, `_integrate`) touch only these
buffers, so a GPU records them once and replays them (models.graphs); prompts, and frames o_{t-1} computed
ahead, are copied into fixed, masked slots, so one recording serves all; the host waits for the device once a
chunk, to read it. The same code runs on CPU and GPU.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from models import decode
from models.flow import integrate, schedule
from models.graphs import Graphs, Mirror
from models.policy import Policy, TextPrefix
from models.vqgan import VQGAN


def batch_sizes(max_batch: int, recorded: bool) -> tuple[int, ...]:
    """Rows computed at once: every number, or where each is a graph, powers of two up to `max_batch`."""
    if not recorded:
        return tuple(range(1, max_batch + 1))
    return (*(2**i for i in range((max_batch - 1).bit_length())), max_batch)


class Runner:
    """Buffers for `max_batch` rows on the policy's device. One thread at a time, under inference_mode."""

    def __init__(
        self,
        policy: Policy,
        vqgan: VQGAN,
        bridge: list[int],
        max_batch: int,
        sampler: str = "euler",
        steps: int = 10,
        cuda_graphs: bool = True,
        counts: tuple[int, ...] = (),
        noise_scale: float = 1.0,
    ):
        """bridge: text ids between frames and actions. counts: bins of each dimension, for ViPRA-AR only.
        noise_scale: of the noise that chunks begin as; policies are trained with 1.
        """
        config, device = policy.config, policy.device
        self.policy, self.vqgan, self.config, self.device = policy, vqgan, config, device
        self.max_batch, self.sampler, self.steps, self.counts = max_batch, sampler, steps, counts
        self.noise_scale = noise_scale
        self.flow = config.action_heads == "flow"
        self.bridge = torch.tensor(bridge, device=device)
        new_cache = policy.new_cache if self.flow else lambda *sizes: decode.action_cache(policy, *sizes)
        self.cache = new_cache(max_batch, self.bridge)
        self.graphs = Graphs(device, cuda_graphs and self.flow)
        self.batches = batch_sizes(max_batch, self.graphs.enabled)
        size, shape = config.vqgan.image_size, (max_batch, config.horizon, config.action_dim)
        self.images = Mirror((max_batch, 2, size, size, 3), torch.uint8, device)
        self.noise = Mirror(shape, torch.float32, device)
        self.lengths = Mirror((max_batch,), torch.int64, device)  # of the rows' prompts
        self.chunk = Mirror(shape, torch.float32, device)
        self.codes = torch.zeros(max_batch, 2, config.frame_tokens, dtype=torch.int64, device=device)
        self.first = torch.zeros(shape, device=device)  # velocity of the first step
        self._in_row: list[TextPrefix | None] = [None] * max_batch  # prompts in the cache

    @property
    def buffers(self) -> list[Tensor]:
        """Everything on the device but the cache."""
        return [
            *(m.device for m in (self.images, self.noise, self.lengths, self.chunk)),
            self.codes,
            self.first,
        ]

    def set_row(self, row: int, images: np.ndarray, seed: int) -> None:
        """A request's frames, uint8 [2, h, w, 3], and the noise of its seed."""
        self.images.host[row].numpy()[...] = images
        generator = torch.Generator().manual_seed(seed)
        torch.randn(self.noise.host.shape[1:], generator=generator, out=self.noise.host[row])
        self.noise.host[row].mul_(self.noise_scale)

    def run(
        self,
        texts: list[TextPrefix],
        frames: list[TextPrefix] | None = None,
        mark: Callable[[], None] = lambda: None,
    ) -> None:
        """Compute the chunks of the rows that are set, and start copying them to `chunk.host`, which is NaN
        before: wait for the device, then read.

        frames: o_{t-1} of each row, where `prefill_frame` has computed all of them. mark: called at the start
        and after encoding, prefill and integration. ViPRA-AR leaves ids of bins in place of actions.
        """
        n, done = len(texts), int(frames is not None)
        rows = next(size for size in self.batches if size >= n)
        self._poison()
        self._skip_empty_slots(texts)
        mark()
        for row, text in enumerate(texts):
            self._place_text(row, text)
            if frames is not None:
                self.cache.place(row, self.frame_slots.stop, frames[row].k, frames[row].v)
        for mirror in (self.images, self.noise, self.lengths):
            mirror.upload(slice(rows))
        self.graphs.run(self._encode, rows, done, 2)
        mark()
        if self.flow:
            self.graphs.run(self._prefill, rows, done)
            mark()
            self.graphs.run(self._integrate, rows)
        else:
            mark()
            codes, cache = self.codes[:n], self.cache
            ids = decode.decode_actions(self.policy, texts, codes, cache, self.bridge, self.counts)
            self.chunk.device[:n] = ids.float().masked_fill(ids < 0, torch.nan)  # exact: ids are below 2^24
        self.chunk.download(slice(rows))
        mark()

    def prefill_frame(self, text: TextPrefix, image: np.ndarray) -> TextPrefix:
        """Keys and values of `image`, uint8 [h, w, 3], as o_{t-1} after a prompt; waits for the device."""
        self._skip_empty_slots([text])
        self.images.host[0, 0].numpy()[...] = image
        self._place_text(0, text)
        for mirror in (self.images, self.lengths):
            mirror.upload(slice(1))
        self.graphs.run(self._encode, 1, 0, 1)
        self.graphs.run(self._prefill_frame)
        k, v = (t[:, 0, :, self.frame_slots].clone() for t in (self.cache.k, self.cache.v))
        if self.device.type == "cuda":  # the host buffers are written again for the next request
            torch.cuda.current_stream().synchronize()
        return TextPrefix(k, v)

    @property
    def frame_slots(self) -> slice:
        """Where o_{t-1} sits in the cache."""
        start = self.policy.cache_layout(self.cache, self.bridge).text_slots
        return slice(start, start + self.config.frame_tokens + 1)

    def _place_text(self, row: int, text: TextPrefix) -> None:
        self.lengths.host[row] = text.length
        if self.flow and self._in_row[row] is not text:
            self.cache.place(row, self.frame_slots.start, text.k, text.v)
            self._in_row[row] = text

    def _skip_empty_slots(self, texts: list[TextPrefix]) -> None:
        """On the CPU: attention over what is there. On a GPU sizes are fixed, recorded or not."""
        if self.flow and self.device.type == "cpu":
            self.cache.first = self.frame_slots.start - max(text.length for text in texts)

    def _poison(self) -> None:
        """Make what an earlier chunk left unusable: a step that did not run can only lead to an error."""
        self.codes.fill_(-1)
        for buffer in (self.first, self.chunk.device, self.chunk.host):
            buffer.fill_(torch.nan)

    # what a GPU records: functions of numbers over the buffers

    def _encode(self, rows: int, start: int, end: int) -> None:
        """Frames start..end of the first `rows` images -> their codes."""
        images = self.images.device[:rows, start:end].flatten(0, 1)
        codes = self.vqgan.encode(self.vqgan.to_input(images))
        self.codes[:rows, start:end] = codes.view(rows, end - start, -1)

    def _prefill_frame(self) -> None:
        self.policy.prefill_frame(self.lengths.device[:1], self.codes[:1, 0], self.cache, self.bridge)

    def _prefill(self, rows: int, done: int) -> None:
        """`done`: frames that are in the cache already."""
        s = schedule(self.steps, self.config.objective)[0][0]
        lengths, codes, noise = self.lengths.device[:rows], self.codes[:rows, done:], self.noise.device[:rows]
        self.first[:rows] = self.policy.prefill_rows(lengths, codes, noise, self.cache, self.bridge, s)

    def _integrate(self, rows: int) -> None:
        prefix = self.policy.prefix(self.lengths.device[:rows], self.cache, self.bridge)
        self.chunk.device[:rows] = integrate(
            lambda u, s: self.policy.step(prefix, u, s),
            self.noise.device[:rows],
            self.steps,
            self.sampler,
            self.config.objective,
            self.first[:rows],
        )
