"""Messages between robot and policy server, and their wire form.

One ZeroMQ frame a message: a msgpack map with `v` (protocol version), `type`, then the fields of the model
below. An array is `{"dtype": "float32", "shape": [14, 8], "data": bytes}`, C order, little endian. Nothing is
executed or unpickled, every size is checked before anything is allocated from it, and a received array is a
read-only view of the received bytes. A reply echoes `session` and `seq` of its request.

    request            reply
    hello              metadata, or error not_ready while the model loads and warms up
    infer              chunk, or error
    prefetch, cancel   none (error if the message is wrong; a cancelled infer is answered `cancelled`)
    ping               pong, at once, also while an inference runs
    stats              stats

Times on the wire are ms, except `t_obs`, which is the sender's clock in seconds and only echoed.
"""

import math
from typing import Annotated, Any, ClassVar, Literal, get_args

import msgpack
import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from config.embodiment import Crop, Embodiment

VERSION = 1
MAX_MESSAGE_BYTES = 4 * 2**20  # two raw 256x256 frames are 0.4 MB
MAX_TASK_CHARACTERS = 512
DTYPES = ("uint8", "float32", "float64", "int32", "int64")
MAX_DIMENSIONS = 4

ErrorCode = Literal[
    "malformed",
    "unsupported_version",
    "unknown_type",
    "too_large",
    "invalid",
    "bad_image",
    "bad_state",
    "bad_task",
    "unsupported",
    "not_ready",
    "busy",
    "superseded",
    "expired",
    "cancelled",
    "shutting_down",
    "inference_failed",
    "internal",
    "non_finite",
    "not_sent",
    "timeout",
    "disconnected",
    "mismatch",
]

ERRORS: dict[ErrorCode, str] = {
    "malformed": "not a msgpack map of this protocol: truncated, not msgpack, or too many frames",
    "unsupported_version": f"`v` is missing or not {VERSION}",
    "unknown_type": "`type` is none of the requests",
    "too_large": f"the message is longer than {MAX_MESSAGE_BYTES} bytes",
    "invalid": "a field is missing, unknown, of the wrong type or out of range",
    "bad_image": "images are not uint8 [2, h, w, 3] (prefetch: [h, w, 3]) of the policy's size, or not JPEG",
    "bad_state": "state is missing where the policy needs it, or not D finite float32",
    "bad_task": f"task is not 1 to {MAX_TASK_CHARACTERS} characters of UTF-8",
    "unsupported": "the request uses a feature this policy does not have (metadata says which it has)",
    "not_ready": "the policy is still loading or warming up; ask again",
    "busy": "too many requests are queued; ask again later",
    "superseded": "a newer request of the same session took its place",
    "expired": "its deadline passed before it could run; it was not run",
    "cancelled": "its session cancelled it",
    "shutting_down": "the server is stopping",
    "inference_failed": "the policy failed on this request; the log of the server says why",
    "internal": "the server failed on this request; its log says why",
    "non_finite": "the policy produced NaN or infinity; no actions are returned",
    "not_sent": "client: no server, no handshake yet, or the send queue is full; nothing was sent",
    "timeout": "client: no reply in time; a late one will be dropped",
    "disconnected": "client: the connection was lost before the reply",
    "mismatch": "client: the server's policy is not the one this robot expects; nothing was sent",
}
assert set(ERRORS) == set(get_args(ErrorCode))


class ProtocolError(ValueError):
    """A message breaks the protocol: its error `code` and, where readable, `session` and `seq`."""

    def __init__(self, code: ErrorCode, message: str, session=None, seq=None):
        super().__init__(message)
        self.code, self.session, self.seq = code, session, seq


# --- Arrays


def pack_array(array: np.ndarray) -> dict:
    """Wire form of an array. Raises ValueError for a dtype outside DTYPES."""
    array = np.ascontiguousarray(array)
    if array.dtype.name not in DTYPES:
        raise ValueError(f"dtype {array.dtype} is not one of {', '.join(DTYPES)}")
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "data": array.reshape(-1).view(np.uint8).data,
    }


def unpack_array(value: object) -> np.ndarray:
    """Read-only view of a wire array. Raises ValueError unless dtype, shape and length agree."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data"}:
        raise ValueError("an array is a map of dtype, shape and data")
    dtype, shape, data = value["dtype"], value["shape"], value["data"]
    if dtype not in DTYPES:
        raise ValueError(f"dtype is not one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"shape is not a list of at most {MAX_DIMENSIONS} sizes")
    if not all(type(size) is int and 0 <= size <= MAX_MESSAGE_BYTES for size in shape):
        raise ValueError("shape holds something other than sizes")
    if not isinstance(data, bytes):
        raise ValueError("data is not bytes")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise ValueError(f"data has {len(data)} bytes, shape {shape} of {dtype} needs another number")
    return np.frombuffer(data, dtype).reshape(shape)


def _pixels(value: object) -> np.ndarray | bytes:
    """One image: raw array uint8 [h, w, 3], or JPEG bytes."""
    if isinstance(value, bytes):
        return value
    array = unpack_array(value)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"not uint8 [h, w, 3]: {array.dtype} {list(array.shape)}")
    return array


def _frames(value: object) -> np.ndarray | tuple[bytes, bytes]:
    """Two images, o_{t-1} then o_t: raw array uint8 [2, h, w, 3], or two JPEG byte strings."""
    if isinstance(value, list | tuple):
        if len(value) != 2 or not all(isinstance(image, bytes) for image in value):
            raise ValueError("JPEG images are a list of two byte strings")
        return tuple(value)
    array = unpack_array(value)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[0] != 2 or array.shape[3] != 3:
        raise ValueError(f"not uint8 [2, h, w, 3]: {array.dtype} {list(array.shape)}")
    return array


def _floats(dimensions: int):
    def check(value: object) -> np.ndarray:
        array = unpack_array(value)
        if array.dtype not in (np.float32, np.float64) or array.ndim != dimensions:
            raise ValueError(f"not float32 with {dimensions} dimension(s): {array.dtype} {list(array.shape)}")
        return array.astype(np.float32, copy=False)

    return check


def _finite(array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise ValueError("holds NaN or infinity")
    return array


def _pack(value):
    return pack_array(value) if isinstance(value, np.ndarray) else value


Image = Annotated[Any, BeforeValidator(_pixels), PlainSerializer(_pack)]
Frames = Annotated[Any, BeforeValidator(_frames), PlainSerializer(_pack)]
Vector = Annotated[Any, BeforeValidator(lambda v: _finite(_floats(1)(v))), PlainSerializer(_pack)]  # [D]
Matrix = Annotated[Any, BeforeValidator(lambda v: _finite(_floats(2)(v))), PlainSerializer(_pack)]  # [n, D]


# --- Messages

Session = Annotated[str, Field(min_length=1, max_length=64)] | Annotated[int, Field(ge=0, lt=2**63)]
Sequence = Annotated[int, Field(ge=0, lt=2**63)]
Task = Annotated[str, Field(min_length=1, max_length=MAX_TASK_CHARACTERS)]


class Message(BaseModel):
    """Common to all: unknown fields, NaN and implicit conversions are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    type: str
    session: Session | None = None
    seq: Sequence | None = None


class Hello(Message):
    """Asks for the metadata."""

    type: Literal["hello"] = "hello"


class Infer(Message):
    """Asks for a chunk. Within a session the newest request wins."""

    type: Literal["infer"] = "infer"
    session: Session
    seq: Sequence
    t_obs: float = Field(description="capture stamp of o_t on the sender's clock, s; echoed")
    images: Frames = Field(
        description="o_{t-1} and o_t, RGB: uint8 [2, h, w, 3], or a list of two JPEG byte strings"
    )
    state: Vector | None = Field(
        None, description="measured state [D] at t_obs; only where metadata.needs_state"
    )
    task: Task
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the initial noise; same request and seed, same chunk"
    )
    deadline: float | None = Field(
        None, gt=0, le=600_000, description="budget from receipt at the server, ms"
    )
    prefix: Matrix | None = Field(None, description="actions [n, D] already committed; only where supported")
    delay_steps: int = Field(0, ge=0, le=64, description="actions expected to run before the chunk arrives")


class Prefetch(Message):
    """Lets the server prepare text and o_{t-1} before o_t exists. Never answered unless wrong."""

    type: Literal["prefetch"] = "prefetch"
    session: Session
    seq: Sequence
    image: Image = Field(description="o_{t-1}, RGB: uint8 [h, w, 3], or JPEG bytes")
    task: Task


class Cancel(Message):
    """Withdraws request `seq` of this session, queued or running; it is answered `cancelled`."""

    type: Literal["cancel"] = "cancel"
    session: Session
    seq: Sequence


class Ping(Message):
    """Answered by the I/O thread, whatever the policy does."""

    type: Literal["ping"] = "ping"


class StatsRequest(Message):
    """Asks for the server's counters."""

    type: Literal["stats"] = "stats"


class Limits(BaseModel):
    """What actions and requests stay within."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    action_low: tuple[float, ...] = Field(description="[D] actions are clipped to this, in `units`")
    action_high: tuple[float, ...] = Field(description="[D] actions are clipped to this, in `units`")
    message_bytes: int = MAX_MESSAGE_BYTES
    task_characters: int = MAX_TASK_CHARACTERS


class Metadata(Message):
    """What is served: the robot refuses a policy that does not fit it. Build it with `Metadata.describe`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)
    type: Literal["metadata"] = "metadata"
    protocol: int = VERSION
    model: str = Field(description="name of the network, e.g. vipra_tiny")
    parameters: int = Field(ge=0, description="number of weights")
    checkpoint: str = Field(description="hash of the checkpoint")
    embodiment: str = Field(description="name of the embodiment")
    action_names: tuple[str, ...] = Field(min_length=1, max_length=128, description="[D] ROS joint names")
    units: tuple[str, ...] = Field(description="[D] rad, or opening (0 closed, 1 open)")
    action_dim: int = Field(ge=1, description="D")
    horizon: int = Field(ge=1, description="H, actions in a chunk")
    rate_hz: float = Field(gt=0, description="rate of the demonstrations")
    history_seconds: float = Field(ge=0, description="o_{t-1} is this much older than o_t")
    crop: Crop | None = Field(
        None, description="part of the camera's picture to send, cut out before it is resized; null: all"
    )
    image_size: tuple[int, int] = Field(description="h, w of both images, px")
    needs_state: bool = Field(description="infer must carry `state` (actions relative to it)")
    supports_prefix: bool = Field(False, description="infer may carry `prefix` and `delay_steps`")
    supports_prefetch: bool = Field(False, description="an early `prefetch` of o_{t-1} saves time in infer")
    device: str = Field("cpu", description="what computes, e.g. cpu or NVIDIA H200")
    limits: Limits
    max_batch: int = Field(1, ge=1)
    warm_latency_ms: float = Field(
        0.0, ge=0, description="one request after warm-up; filled in by the server"
    )

    @classmethod
    def describe(cls, embodiment: Embodiment, **fields) -> "Metadata":
        """Metadata of a policy for `embodiment`; `fields` are the rest (model, parameters, ...)."""
        return cls(
            embodiment=embodiment.name,
            action_names=embodiment.names,
            units=tuple(dimension.unit for dimension in embodiment.dimensions),
            action_dim=embodiment.action_dim,
            horizon=embodiment.horizon,
            rate_hz=embodiment.rate_hz,
            history_seconds=embodiment.history_seconds,
            crop=embodiment.crop,
            **fields,
        )


class Timing(BaseModel):
    """Where a request's time went at the server, ms."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    queue: float = Field(0.0, ge=0, description="receipt to start of inference")
    encode: float = Field(0.0, ge=0, description="images to tokens")
    prefill: float = Field(0.0, ge=0, description="prefix and first integration step")
    integrate: float = Field(0.0, ge=0, description="the other integration steps")
    total: float = Field(0.0, ge=0, description="receipt to reply")


class Chunk(Message):
    """H actions, un-normalised, in `metadata.units`; action i is due at t_obs + i / rate."""

    type: Literal["chunk"] = "chunk"
    session: Session
    seq: Sequence
    t_obs: float
    actions: Matrix = Field(description="float32 [H, D]")
    timing: Timing = Timing()


class Pong(Message):
    """The I/O thread is alive."""

    type: Literal["pong"] = "pong"
    state: Literal["warming", "ready", "stopping"] = "ready"


class Stats(Message):
    """Counters since start."""

    type: Literal["stats"] = "stats"
    state: Literal["warming", "ready", "stopping"]
    uptime_s: float
    sessions: int = Field(description="sessions heard of lately")
    queued: int = Field(description="requests waiting now")
    running: int = Field(description="requests in the policy now")
    counts: dict[str, int] = Field(
        description="messages by type, replies by type or error code, dropped replies, prefetch hits"
    )
    batches: dict[str, int] = Field(description="inferences by batch size")
    latency_ms: dict[str, float] = Field(
        description="receipt to reply: p50, p95, p99 of the last 1000 chunks"
    )
    queue_ms: dict[str, float] = Field(description="receipt to start: p50, p95, p99 of the last 1000 chunks")


class Error(Message):
    """A request failed. `code` is one of ERRORS."""

    type: Literal["error"] = "error"
    code: ErrorCode
    message: str

    known: ClassVar[dict[ErrorCode, str]] = ERRORS


REQUESTS: dict[str, type[Message]] = {
    "hello": Hello,
    "infer": Infer,
    "prefetch": Prefetch,
    "cancel": Cancel,
    "ping": Ping,
    "stats": StatsRequest,
}
REPLIES: dict[str, type[Message]] = {
    "metadata": Metadata,
    "chunk": Chunk,
    "pong": Pong,
    "stats": Stats,
    "error": Error,
}
_FIELD_CODES: dict[str, ErrorCode] = {
    "images": "bad_image",
    "image": "bad_image",
    "state": "bad_state",
    "task": "bad_task",
}


# --- Wire form


def encode(message: Message) -> bytes:
    """One frame. Fields that are None are left out."""
    fields = {key: value for key, value in message.model_dump().items() if value is not None}
    return msgpack.packb({"v": VERSION, **fields})


def decode(frame: bytes, known: dict[str, type[Message]], max_bytes: int = MAX_MESSAGE_BYTES) -> Message:
    """Read one frame as one of `known` (REQUESTS or REPLIES). Raises ProtocolError."""
    if len(frame) > max_bytes:
        raise ProtocolError("too_large", f"{len(frame)} bytes, at most {max_bytes} are read")
    try:
        # surrogateescape: text that is not UTF-8 reaches the field's own check and the answer has its seq
        fields = msgpack.unpackb(
            frame,
            raw=False,
            unicode_errors="surrogateescape",
            ext_hook=_refuse_extension,
            max_str_len=65_536,
            max_bin_len=max_bytes,
            max_array_len=1024,
            max_map_len=256,
            max_ext_len=0,
        )
    except (
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        msgpack.exceptions.UnpackException,
    ) as error:
        raise ProtocolError("malformed", f"not readable as msgpack: {type(error).__name__}") from None
    if not isinstance(fields, dict):
        raise ProtocolError("malformed", "a message is a map")
    session, seq = _echo(fields.get("session"), fields.get("seq"))
    version, kind = fields.pop("v", None), fields.get("type")
    if type(version) is not int or version != VERSION:
        got = version if type(version) is int else "none"
        raise ProtocolError(
            "unsupported_version", f"protocol version {VERSION} is spoken here, got {got}", session, seq
        )
    model = known.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise ProtocolError("unknown_type", f"type is not one of {', '.join(known)}", session, seq)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        code = _FIELD_CODES.get(str(problems[0]["loc"][0]) if problems[0]["loc"] else "", "invalid")
        text = "; ".join(f"{_printable(p['loc'])}: {p['msg']}" for p in problems[:4])
        raise ProtocolError(code, text[:400], session, seq) from None


def _printable(location: tuple) -> str:
    return ".".join(str(part) for part in location)[:60].encode("ascii", "replace").decode()


def _echo(session: object, seq: object) -> tuple[str | int | None, int | None]:
    """`session` and `seq` of a message that may be wrong elsewhere; None where they are wrong themselves."""
    text = isinstance(session, str) and 1 <= len(session) <= 64 and session.isprintable()
    number = type(session) is int and 0 <= session < 2**63
    good_seq = type(seq) is int and 0 <= seq < 2**63
    return (session if text or number else None), (seq if good_seq else None)


def _refuse_extension(code: int, data: bytes):
    raise ValueError("msgpack extension types are not part of the protocol")
