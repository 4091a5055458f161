"""The wire form: what is sent is what arrives, and nothing else is believed."""

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_server import protocol
from policy_server.protocol import REPLIES, REQUESTS, ProtocolError, decode, encode
from tests.policy_server.policies import Echo, frames


def infer(**changes) -> dict:
    """A good infer message as plain data, with changes; None removes a field."""
    fields = {
        "v": 1,
        "type": "infer",
        "session": "robot",
        "seq": 7,
        "t_obs": 1.5,
        "images": protocol.pack_array(frames()),
        "task": "stack the cups",
        "seed": 3,
        "deadline": 500.0,
    }
    return {k: v for k, v in (fields | changes).items() if v is not None}


def refusal(data: dict | bytes, known=REQUESTS) -> ProtocolError:
    frame = data if isinstance(data, bytes) else msgpack.packb(data, unicode_errors="surrogateescape")
    with pytest.raises(ProtocolError) as caught:
        decode(frame, known)
    return caught.value


def test_infer_as_the_design_writes_it_is_understood():
    message = decode(msgpack.packb(infer()), REQUESTS)
    assert (message.session, message.seq, message.t_obs, message.seed) == ("robot", 7, 1.5, 3)
    assert message.images.shape == (2, 32, 48, 3) and message.images.dtype == np.uint8


def test_integers_do_for_real_numbers_and_for_sessions():
    message = decode(msgpack.packb(infer(t_obs=2, deadline=500, session=12)), REQUESTS)
    assert (message.t_obs, message.deadline, message.session) == (2.0, 500.0, 12)


def test_received_arrays_are_views_of_the_message():
    images = decode(msgpack.packb(infer()), REQUESTS).images
    assert not images.flags.owndata and not images.flags.writeable


def test_metadata_survives_the_wire():
    metadata = Echo().metadata
    assert decode(encode(metadata), REPLIES) == metadata


def test_chunk_survives_the_wire():
    actions = np.random.default_rng(0).normal(size=(14, 8)).astype(np.float32)
    chunk = protocol.Chunk(session="s", seq=1, t_obs=0.25, actions=actions, timing=protocol.Timing(queue=2.0))
    again = decode(encode(chunk), REPLIES)
    np.testing.assert_array_equal(again.actions, actions)
    assert again.timing.queue == 2.0 and again.t_obs == 0.25


def test_every_error_code_is_documented():
    assert all(len(text) > 10 for text in protocol.ERRORS.values())


@pytest.mark.parametrize("version", [None, 0, 2, "1", 1.0, True])
def test_other_versions_are_named_as_such(version):
    error = refusal(infer(v=version))
    assert (error.code, error.session, error.seq) == ("unsupported_version", "robot", 7)


@pytest.mark.parametrize("kind", [None, "chunk", "exec", 3, ["infer"], {}])
def test_unknown_types_are_refused(kind):
    assert refusal(infer(type=kind)).code == "unknown_type"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"seq": None}, "invalid"),
        ({"seq": -1}, "invalid"),
        ({"seq": "7"}, "invalid"),
        ({"session": None}, "invalid"),
        ({"session": "x" * 65}, "invalid"),
        ({"t_obs": float("nan")}, "invalid"),
        ({"t_obs": "now"}, "invalid"),
        ({"deadline": 0}, "invalid"),
        ({"deadline": float("inf")}, "invalid"),
        ({"seed": -1}, "invalid"),
        ({"surprise": 1}, "invalid"),
        ({"images": None}, "bad_image"),
        ({"images": protocol.pack_array(frames()[0])}, "bad_image"),
        ({"images": protocol.pack_array(frames().astype(np.float32))}, "bad_image"),
        ({"images": [b"one"]}, "bad_image"),
        ({"images": [1, 2]}, "bad_image"),
        ({"images": "cat.jpg"}, "bad_image"),
        ({"state": protocol.pack_array(np.zeros((2, 2), np.float32))}, "bad_state"),
        ({"state": protocol.pack_array(np.array([np.nan], np.float32))}, "bad_state"),
        ({"state": [0.0] * 8}, "bad_state"),
        ({"task": None}, "bad_task"),
        ({"task": ""}, "bad_task"),
        ({"task": "x" * 513}, "bad_task"),
        ({"task": "x" * 10_000}, "bad_task"),
        ({"task": b"bytes"}, "bad_task"),
        ({"task": b"\xff\xfe\x80".decode("utf-8", "surrogateescape")}, "bad_task"),
    ],
)
def test_a_wrong_field_is_named_with_a_code_and_the_request(changes, code):
    error = refusal(infer(**changes))
    assert error.code == code
    assert next(iter(changes)) in str(error)
    assert error.seq == (None if "seq" in changes else 7)


@pytest.mark.parametrize(
    "array",
    [
        {"dtype": "uint8", "shape": [2, 32, 48, 3], "data": b""},
        {"dtype": "uint8", "shape": [2, 32, 48, 3], "data": bytes(2 * 32 * 48 * 3 + 1)},
        {"dtype": "uint8", "shape": [2, 2**40, 2**40, 3], "data": b"x"},
        {"dtype": "uint8", "shape": [2, -32, -48, 3], "data": bytes(2 * 32 * 48 * 3)},
        {"dtype": "uint8", "shape": [2, 32.0, 48, 3], "data": bytes(2 * 32 * 48 * 3)},
        {"dtype": "uint8", "shape": [True, 1, 1, 3], "data": bytes(3)},
        {"dtype": "uint8", "shape": [1] * 100, "data": b"x"},
        {"dtype": "object", "shape": [1], "data": bytes(8)},
        {"dtype": "V8", "shape": [1], "data": bytes(8)},
        {"dtype": ["u1"], "shape": [1], "data": b"x"},
        {"dtype": "uint8", "shape": [1], "data": "x"},
        {"dtype": "uint8", "shape": [1], "data": b"x", "strides": [0]},
    ],
)
def test_arrays_whose_description_lies_are_refused_before_they_are_made(array):
    with pytest.raises(ValueError):
        protocol.unpack_array(array)
    assert refusal(infer(images=array)).code == "bad_image"


@pytest.mark.parametrize("cut", [0, 1, 10, 1000, 9000])
def test_truncated_messages_are_malformed(cut):
    assert refusal(msgpack.packb(infer())[:cut]).code == "malformed"


def test_a_message_followed_by_more_is_malformed():
    assert refusal(msgpack.packb(infer()) + b"\x00").code == "malformed"


def test_extension_types_are_malformed():
    assert refusal(msgpack.packb(infer(seq=msgpack.ExtType(1, b"")))).code == "malformed"
    assert refusal(msgpack.packb(infer(seq=msgpack.Timestamp(1)))).code == "malformed"


def test_deep_nesting_is_malformed():
    assert refusal(b"\x91" * 100_000 + b"\x00").code == "malformed"


def test_oversized_messages_are_not_even_parsed():
    assert refusal(bytes(protocol.MAX_MESSAGE_BYTES + 1)).code == "too_large"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_give_a_message_or_a_protocol_error(data):
    for known in (REQUESTS, REPLIES):
        try:
            assert isinstance(decode(data, known), protocol.Message)
        except ProtocolError as error:
            assert error.code in protocol.ERRORS


_anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 2**63), inner, max_size=4)
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from([*REQUESTS, *REPLIES]),
    field=st.sampled_from(
        ["session", "seq", "t_obs", "images", "state", "task", "prefix", "actions", "timing"]
    ),
    value=_anything,
)
def test_any_value_in_any_field_gives_a_message_or_a_protocol_error(kind, field, value):
    data = msgpack.packb(infer(type=kind) | {field: value}, unicode_errors="surrogatepass")
    for known in (REQUESTS, REPLIES):
        try:
            assert isinstance(decode(data, known), protocol.Message)
        except ProtocolError as error:
            assert error.code in protocol.ERRORS
            str(error).encode()  # printable on any log


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(protocol.DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=protocol.MAX_DIMENSIONS),
    seed=st.integers(0, 100),
)
def test_arrays_survive_the_wire(dtype, shape, seed):
    array = (np.random.default_rng(seed).random(shape) * 100).astype(dtype)
    again = protocol.unpack_array(msgpack.unpackb(msgpack.packb(protocol.pack_array(array))))
    assert again.dtype == array.dtype
    np.testing.assert_array_equal(again, array)
