"""Between protocol and policy: requests checked against what it takes, and its answers checked."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from policy_server import images, protocol
from policy_server.scheduler import (
    DeviceFailed,
    Entry,
    Failure,
    Policy,
    PrefetchEntry,
    Request,
    Result,
)

log = logging.getLogger("policy_server")


def checked(message: protocol.Infer, metadata: protocol.Metadata) -> Request:
    """The policy's request from a message. Raises ProtocolError where it does not fit `metadata`."""
    size, dim = metadata.image_size, metadata.action_dim
    if isinstance(message.images, tuple):
        pictures = np.stack([checked_image(image, size) for image in message.images])
    elif message.images.shape != (2, *size, 3):
        got = list(message.images.shape)
        raise protocol.ProtocolError("bad_image", f"images are {got}, this policy takes {[2, *size, 3]}")
    else:
        pictures = message.images
    state, prefix = message.state, message.prefix
    if metadata.needs_state and state is None:
        raise protocol.ProtocolError("bad_state", f"this policy needs `state` [{dim}] at t_obs")
    if state is not None and state.shape != (dim,):
        raise protocol.ProtocolError("bad_state", f"state is {list(state.shape)}, this policy takes [{dim}]")
    if (prefix is not None or message.delay_steps) and not metadata.supports_prefix:
        raise protocol.ProtocolError("unsupported", "this policy takes no `prefix` and no `delay_steps`")
    if prefix is not None and (prefix.shape[1] != dim or not 1 <= len(prefix) <= metadata.horizon):
        expected = f"[1 to {metadata.horizon}, {dim}]"
        raise protocol.ProtocolError(
            "invalid", f"prefix is {list(prefix.shape)}, this policy takes {expected}"
        )
    state = state if metadata.needs_state else None
    return Request(pictures, checked_task(message.task), message.seed, state, prefix, message.delay_steps)


def checked_task(task: str) -> str:
    """Raises ProtocolError for a blank one."""
    if not task.strip():
        raise protocol.ProtocolError("bad_task", "task is blank")
    return task


def checked_image(image: np.ndarray | bytes, size: tuple[int, int]) -> np.ndarray:
    """One image of `size`, uint8 [h, w, 3]. Raises ProtocolError."""
    if isinstance(image, bytes):
        try:
            return images.decode_jpeg(image, size)
        except ValueError as error:
            raise protocol.ProtocolError("bad_image", str(error)) from None
    if image.shape != (*size, 3):
        raise protocol.ProtocolError(
            "bad_image", f"image is {list(image.shape)}, this policy takes {[*size, 3]}"
        )
    return image


@dataclass(frozen=True)
class Done:
    """What comes back from the inference thread: metadata once, then the outcomes of each job."""

    metadata: protocol.Metadata | None = None
    outcomes: Sequence[tuple[Entry, Result | Failure]] = ()
    started: float = 0.0
    finished: float = 0.0
    lost: DeviceFailed | None = None  # nothing more can be computed


def load(make: Callable[[], Policy]) -> tuple[Policy, protocol.Metadata, dict[str, int]]:
    """A policy that is warm, its metadata with what that showed, and the bytes it takes by use."""
    policy = make()
    latency_ms = float(policy.warm_up())
    measured = {"warm_latency_ms": latency_ms, "max_batch": policy.max_batch}
    return policy, policy.metadata.model_copy(update=measured), policy.memory()


def run(policy: Policy, metadata: protocol.Metadata, job: list[Entry] | PrefetchEntry) -> Done:
    """Run a batch or a prefetch. Never raises: what fails is in the outcomes, or the log, or `lost`."""
    started, outcomes, lost = time.monotonic(), [], None
    try:
        if isinstance(job, PrefetchEntry):
            _prefetch(policy, job)
        else:
            outcomes = run_batch(policy, metadata, job)
    except DeviceFailed as error:
        lost = error
        if not isinstance(job, PrefetchEntry):  # also what was computed before: nobody can vouch for it
            outcomes = [(entry, _failure("inference_failed")) for entry in job]
    return Done(outcomes=outcomes, started=started, finished=time.monotonic(), lost=lost)


def _prefetch(policy: Policy, job: PrefetchEntry) -> None:
    try:
        policy.prefetch(job.task, job.image)
    except DeviceFailed:
        raise
    except Exception as error:  # the request that follows is told
        log.debug("prefetch failed: %s", error)


def run_batch(
    policy: Policy, metadata: protocol.Metadata, batch: list[Entry]
) -> list[tuple[Entry, Result | Failure]]:
    """Run `batch` and check what comes out. If it fails as a whole, each request is tried alone.

    Raises DeviceFailed.
    """
    try:
        results = policy.infer([entry.request for entry in batch])
        return [(entry, _verdict(result, metadata)) for entry, result in zip(batch, results, strict=True)]
    except DeviceFailed:
        raise
    except Exception as error:
        if len(batch) > 1:
            return [outcome for entry in batch for outcome in run_batch(policy, metadata, [entry])]
        code = getattr(error, "code", None)
        if isinstance(code, str) and code in protocol.ERRORS:
            log.warning("the policy refuses a request: %s", error, extra={"fields": {"code": code}})
            return [(batch[0], Failure(code, str(error)[:400]))]
        log.exception("inference failed")
        return [(batch[0], _failure("inference_failed"))]


def _verdict(result: Result, metadata: protocol.Metadata) -> Result | Failure:
    """The result, checked, with exactly the timings of the protocol; or what replaces it."""
    actions = np.asarray(result.actions)
    if actions.shape != (metadata.horizon, metadata.action_dim) or actions.dtype.kind != "f":
        fields = {"shape": list(actions.shape), "dtype": str(actions.dtype)}
        log.error("the policy's actions have the wrong shape or dtype", extra={"fields": fields})
        return _failure("inference_failed")
    with np.errstate(over="ignore"):  # too large for float32 is infinite
        actions = actions.astype(np.float32, copy=False)
    if not np.isfinite(actions).all():
        log.error("the policy's actions hold NaN or infinity")
        return _failure("non_finite")
    timing = {name: float(result.timing.get(name, 0.0)) for name in ("encode", "prefill", "integrate")}
    return Result(actions, timing, result.prefetched)


def _failure(code: protocol.ErrorCode) -> Failure:
    return Failure(code, protocol.ERRORS[code])
