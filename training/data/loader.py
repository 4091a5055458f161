"""Batches of a rank, read by worker processes, and what could not be read."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from training.data.episode import DataError
from training.data.sampling import Samples


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Arrays and numbers stacked to tensors, texts as lists, errors of all samples together.

    Raises DataError where shapes differ, as with datasets of different robots.
    """
    batch: dict[str, Any] = {"errors": [error for sample in samples for error in sample["errors"]]}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if key == "errors":
            continue
        if isinstance(values[0], str):
            batch[key] = values
            continue
        if len({np.shape(v) for v in values}) > 1:
            places = {np.shape(s[key]): s["key"] for s in samples}
            raise DataError(
                f"{key} differ in shape: " + ", ".join(f"{shape} in {k}" for shape, k in places.items())
            )
        batch[key] = torch.from_numpy(np.stack(values))
    return batch


class Loader:
    """Iterates the batches of one rank from `start_step` on; step s of rank r holds the samples
    s * global_batch + r * global_batch / ranks and following.
    """

    def __init__(
        self,
        samples: Samples,
        global_batch: int,
        start_step: int = 0,
        steps: int | None = None,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
    ):
        """Without `steps`, endless. Raises DataError if the ranks do not divide the batch."""
        if global_batch % ranks:
            raise DataError(f"a global batch of {global_batch} does not divide among {ranks} ranks")
        self.samples, self.workers = samples, workers
        self.errors: Counter[tuple[str, str]] = Counter(samples.broken)
        self._share, self._batch, self._rank = global_batch // ranks, global_batch, rank
        self._start, self._stop = start_step, None if steps is None else start_step + steps

    def _batches(self) -> Iterator[range]:
        step = self._start
        while step != self._stop:
            first = step * self._batch + self._rank * self._share
            yield range(first, first + self._share)
            step += 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            self.samples,
            batch_sampler=self._batches(),
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if self.workers else None,
        )
        try:
            for batch in loader:
                self.errors.update(batch.pop("errors"))
                yield batch
        except DataError as error:  # a worker's comes as its traceback, in which the message is last
            error.with_traceback(None)  # its frames keep the workers
            raise DataError(str(error).rpartition(f"{DataError.__name__}: ")[2].strip()) from None
