"""The reader of streaming files gives every number back, or says at which byte it cannot."""

import msgpack
import numpy as np
import pytest
import torch

from models.convert.streaming import Stream, StreamError
from tests.models.convert.released import bf16, serialise, train_state, write_stream

RNG = np.random.default_rng(0)
STACKED = RNG.standard_normal((5, 7, 11)).astype(np.float32)


def stream_of(path, *entries) -> bytes:
    path.write_bytes(b"".join(msgpack.packb(entry) for entry in entries))
    return path


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 4 * 100, 4 * 77, 4])
def test_arrays_and_their_layers_come_back_whole_or_chunked(tmp_path, chunk_bytes):
    arrays = {
        "a/kernel": STACKED,
        "b": bf16(STACKED),
        "c": np.array(3.5, np.float32),
        "d": np.arange(6, dtype=np.int32),
    }
    with Stream(write_stream(tmp_path / "s", arrays, chunk_bytes)) as stream:
        assert stream.names == tuple(arrays)
        assert np.array_equal(stream.read("a/kernel").numpy(), STACKED)
        for i in range(5):
            assert np.array_equal(stream.read("a/kernel", i).numpy(), STACKED[i])
            assert torch.equal(stream.read("b", i), torch.from_numpy(STACKED[i]).bfloat16())
        assert stream.read("c") == 3.5
        assert stream.read("d").tolist() == list(range(6))


def test_chunk_writer_agrees_with_the_format_and_big_arrays_really_are_chunked():
    data = msgpack.unpackb(serialise(STACKED, 400), ext_hook=lambda code, raw: (code, msgpack.unpackb(raw)))
    assert data["__msgpack_chunked_array__"] is True and data["shape"] == {"0": 5, "1": 7, "2": 11}
    assert [chunk[1][0] for chunk in data["chunks"].values()] == [[100], [100], [100], [85]]
    assert {chunk[0] for chunk in data["chunks"].values()} == {1}


def test_a_stream_cut_anywhere_is_an_error_with_its_byte(tmp_path):
    few = STACKED[0, 0, :5]
    whole = write_stream(tmp_path / "s", {"a/b": few, "c": few}, 12).read_bytes()
    first = len(write_stream(tmp_path / "t", {"a/b": few}, 12).read_bytes())
    for length in range(len(whole)):
        if length == first:
            continue  # a shorter file, but a whole one
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(StreamError, match=r"cut: byte \d+: "):
            Stream(tmp_path / "cut")


def test_a_file_cut_while_it_is_read_is_an_error(tmp_path):
    path = write_stream(tmp_path / "s", {"a": STACKED})
    with Stream(path) as stream:
        stream.array("a")
        path.open("r+b").truncate(100)
        with pytest.raises(StreamError, match="cut short"):
            stream.read("a")


@pytest.mark.parametrize(
    "payload, message",
    [
        (msgpack.ExtType(1, msgpack.packb(((2,), "complex64", b"12345678"))), "unknown dtype 'complex64'"),
        (msgpack.ExtType(2, b"1234"), "unknown msgpack extension 2"),
        (msgpack.ExtType(1, msgpack.packb(((3,), "float32", b"1234"))), r"4 bytes are not \[3\] of float32"),
        (msgpack.ExtType(1, msgpack.packb(((-1000,), "float32", b""))), r"not \[-1000\]"),
        (msgpack.ExtType(1, msgpack.packb(([1] * 9, "float32", b"1234"))), "9 axes"),
        (msgpack.ExtType(1, msgpack.packb(((1,), "float32"))), "not .shape, dtype, bytes."),
        (msgpack.ExtType(1, msgpack.packb(((1,), "float32", b"1234")) + b"x"), "length is wrong"),
        ({"shape": {"0": 1}, "chunks": {}}, "neither an array nor a chunked array"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ([1, 2], "expected an array, found array"),
        (None, "unexpected msgpack code 0xc0"),
    ],
)
def test_arrays_that_are_none_are_refused(tmp_path, payload, message):
    path = stream_of(tmp_path / "s", (("x",), msgpack.packb(payload)))
    with Stream(path) as stream, pytest.raises(StreamError, match=rf"byte \d+: .*{message}"):
        stream.array("x")


def test_chunks_that_do_not_make_the_shape_are_refused(tmp_path):
    chunk = msgpack.ExtType(1, msgpack.packb(((2,), "float32", b"12345678")))
    for shape, chunks, message in (
        ({"0": 3}, {"0": chunk}, r"do not make \[3\]"),
        ({"0": -1000, "1": -1000}, {"0": chunk}, "do not make"),
        ({"0": 2}, {"1": chunk}, "number '0' is missing"),
        ({"1": 2}, {"0": chunk}, "number '0' is missing"),
    ):
        data = {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}
        path = stream_of(tmp_path / "s", (("x",), msgpack.packb(data)))
        with Stream(path) as stream, pytest.raises(StreamError, match=message):
            stream.array("x")


def test_a_length_beyond_the_file_allocates_nothing(tmp_path):
    head = msgpack.packb((("x",), b""))[:-2]
    (tmp_path / "s").write_bytes(head + b"\xc6\xff\xff\xff\xff" + b"1234")
    with pytest.raises(StreamError, match="4294967295 bytes, but only 4 are left: the file is truncated"):
        Stream(tmp_path / "s")
    inner = msgpack.packb(((1 << 40, 1 << 40), "float32", b"1234"))
    path = stream_of(tmp_path / "t", (("x",), msgpack.packb(msgpack.ExtType(1, inner))))
    with Stream(path) as stream, pytest.raises(StreamError, match="4 bytes are not"):
        stream.read("x")


def test_other_files_are_not_streams(tmp_path):
    for content in (
        b"",
        b"PK\x03\x04zip",
        b"\x80\x04\x95pickle",
        msgpack.packb({"a": 1}),
        b"\x92\x90\xc4\x00",
    ):
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(StreamError, match=r"byte [012]: "):
            Stream(tmp_path / "s")
    with pytest.raises(StreamError, match="not readable"):
        Stream(tmp_path / "nowhere")
    twice = stream_of(tmp_path / "s", (("x",), serialise(STACKED)), (("x",), serialise(STACKED)))
    with pytest.raises(StreamError, match="x appears twice"):
        Stream(twice)


def test_an_optimisers_odd_entries_do_not_matter_until_they_are_read(tmp_path):
    path = train_state(tmp_path / "s", {"w": STACKED})
    with path.open("ab") as file:
        file.write(msgpack.packb((("opt_state", "note"), msgpack.packb("text"))))
    with Stream(path) as stream:
        assert np.array_equal(stream.read("params/params/w").numpy(), STACKED)
        with pytest.raises(StreamError, match="opt_state/note"):
            stream.read("opt_state/note")
