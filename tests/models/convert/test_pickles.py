"""A pickle of arrays opens; one that holds anything else is refused before any of it runs."""

import builtins
import contextlib
import os
import pickle
import subprocess
from collections import OrderedDict

import numpy as np
import pytest

from models.convert import vqgan
from models.convert.pickles import PickleError, load
from tests.models.convert.released import vqgan as random_vqgan

ARRAYS = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.array([1, 2], np.int64)}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("old_numpy", [False, True])
def test_arrays_of_any_protocol_and_numpy_come_back(tmp_path, protocol, old_numpy):
    data = pickle.dumps(OrderedDict(ARRAYS), protocol)
    if old_numpy and protocol < 4:  # from 4 on the module's name carries its length
        data = data.replace(b"numpy._core.", b"numpy.core.")
    elif old_numpy:
        data = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
        data = data.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
        data = data[:2] + data[11:]  # without the frame and its length
    (tmp_path / "p").write_bytes(data)
    found = load(tmp_path / "p")
    assert set(found) == {"a/b", "c"}
    assert np.array_equal(found["a/b"], ARRAYS["a"]["b"]) and found["c"].tolist() == [1, 2]


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function, arguments",
    [
        (os.system, ("touch {}",)),
        (builtins.eval, ("open({!r}, 'w')",)),
        (builtins.exec, ("open({!r}, 'w')",)),
        (builtins.getattr, ("", "join")),
        (subprocess.Popen, (["touch", "{}"],)),
        (np.load, ("{}",)),
        (np.fromfile, ("{}",)),
        (__import__, ("antigravity",)),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_call_in_a_pickle_is_refused_by_name_and_not_made(tmp_path, function, arguments, protocol):
    target = str(tmp_path / "executed")
    arguments = tuple(a.format(target) if isinstance(a, str) else a for a in arguments)
    arguments = tuple([x.format(target) for x in a] if isinstance(a, list) else a for a in arguments)
    (tmp_path / "p").write_bytes(pickle.dumps({**ARRAYS, "x": Calls(function, *arguments)}, protocol))
    with pytest.raises(PickleError, match=rf"refused: it holds .*{function.__name__}"):
        load(tmp_path / "p")
    assert not (tmp_path / "executed").exists()


def test_only_numeric_arrays_in_dicts_pass(tmp_path):
    for content, message in (
        ([1, 2], "holds a list, not a dict"),
        ({"a": "text"}, "a is a str"),
        ({"a": {"b": np.array(["text"])}}, "dtype 'U4', which is not a number"),
        ({"a": np.array([{}, 1], object)}, "an array without numbers|dtype 'O8'"),
        ({"a": np.zeros(2, [("x", "f4")])}, "nested dtype"),
        ({"a": 1.0}, "a is a float"),
    ):
        for protocol in (2, 4):
            (tmp_path / "p").write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(PickleError, match=message):
                load(tmp_path / "p")
    (tmp_path / "p").write_bytes(b"c_codecs\nencode\n(Vabc\nVzlib\ntR.")
    with pytest.raises(PickleError, match="codec 'zlib'"):
        load(tmp_path / "p")
    cycle = {}
    cycle["a"] = cycle
    (tmp_path / "p").write_bytes(pickle.dumps(cycle))
    with pytest.raises(PickleError, match="dicts inside dicts"):
        load(tmp_path / "p")


def test_an_array_that_lies_about_itself_is_refused(tmp_path):
    data = pickle.dumps({"a": np.arange(6, dtype=np.float32)}, 2)
    for old, new, message in (
        (b"K\x06\x85", b"K\x07\x85", r"24 bytes are not \[7\]"),
        (b"X\x02\x00\x00\x00f4", b"X\x02\x00\x00\x00f8", r"24 bytes are not \[6\] of float64"),
        (b"X\x02\x00\x00\x00f4", b"X\x02\x00\x00\x00O8", "dtype 'O8'"),
    ):
        assert data.count(old) == 1
        (tmp_path / "p").write_bytes(data.replace(old, new))
        with pytest.raises(PickleError, match=message):
            load(tmp_path / "p")


def test_damaged_pickles_are_one_kind_of_error(tmp_path):
    whole = pickle.dumps(ARRAYS)
    rng = np.random.default_rng(0)
    for length in range(0, len(whole), 7):
        (tmp_path / "p").write_bytes(whole[:length])
        with pytest.raises(PickleError):
            load(tmp_path / "p")
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        (tmp_path / "p").write_bytes(bytes(data))
        with contextlib.suppress(PickleError):
            load(tmp_path / "p")


def test_vqgan_with_unknown_missing_misshapen_or_nan_tensors_is_refused(tmp_path):
    def case(change, message):
        tree = random_vqgan(np.random.default_rng(0))
        change(tree)
        (tmp_path / "vqgan").write_bytes(pickle.dumps(tree))
        with pytest.raises(ValueError, match=message):
            vqgan.read(tmp_path / "vqgan", 64)

    case(lambda t: t.update(extra=np.ones(1)), r"unknown tensors \['extra'\], missing tensors \[\]")
    case(lambda t: t["encoder"]["Conv_1"].pop("bias"), r"missing tensors \['encoder/Conv_1/bias'\]")
    case(lambda t: t.pop("encoder"), "not LWM's VQGAN")
    case(lambda t: t["quant_conv"].update(bias=np.ones(3)), r"quant_conv/bias gives \[3\], expected \[16\]")
    case(lambda t: t["quant_conv"].update(bias=np.full(16, np.nan)), "quant_conv/bias holds NaN")
