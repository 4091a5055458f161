"""Reads a pickle of numpy arrays in plain containers, as LWM's VQGAN is released, and nothing else.

The few globals that spell a numeric array are answered with stand-ins that only take notes; the arrays are
made afterwards, from checked shape, dtype and bytes. So not even numpy's own unpickling runs, which trusts
what it is told about a dtype. Any other global is refused by name.
"""

import math
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np

from models.convert import ConvertError

NUMBERS = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8"}
MAX_DEPTH = 16


class PickleError(ConvertError):
    """A pickle holds something other than numeric arrays, or is damaged; the message names the global."""


class _DType:
    """Notes of `numpy.dtype(code)` and its byte order."""

    def __init__(self, code, align=False, copy=True):
        self.code, self.order = code, "|"

    def __setstate__(self, state) -> None:
        _version, self.order, *nested = state
        if any(part is not None for part in nested[:3]):
            raise PickleError("an array has a nested dtype")

    def numpy(self) -> np.dtype:
        if self.code not in NUMBERS or self.order not in ("<", ">", "|", "="):
            raise PickleError(f"an array has dtype {self.code!r}, which is not a number")
        return np.dtype(f"{self.order}{self.code}")


class _Array:
    """Notes of an array: shape, dtype, order and bytes."""

    def __init__(self, *_subtype_shape_code):
        self.notes = None

    def __setstate__(self, state) -> None:
        _version, shape, dtype, fortran, data = state
        self.notes = (shape, dtype, "F" if fortran else "C", data)

    @classmethod
    def of(cls, shape, dtype, order, data) -> "_Array":
        array = cls()
        array.notes = (shape, dtype, order, data)
        return array

    def numpy(self) -> np.ndarray:
        shape, dtype, order, data = self.notes or ((), None, "C", b"")
        if not (isinstance(dtype, _DType) and isinstance(data, bytes | bytearray) and order in ("C", "F")):
            raise PickleError("an array without numbers")
        kind, sizes = dtype.numpy(), tuple(shape)
        if any(type(n) is not int or n < 0 for n in sizes) or math.prod(sizes) * kind.itemsize != len(data):
            raise PickleError(f"{len(data)} bytes are not {list(sizes)} of {kind.name}")
        return np.frombuffer(data, kind).reshape(sizes, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """How protocols 0 to 2 spell bytes: `_codecs.encode(text, "latin1")`."""
    if encoding != "latin1":
        raise PickleError(f"a pickle asks for the codec {encoding!r}")
    return text.encode("latin1")


_GLOBALS = {
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument
    ("numpy", "dtype"): _DType,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
    **{
        (f"numpy.{core}.{module}", name): answer
        for core in ("core", "_core")  # numpy 1, numpy 2
        for module, name, answer in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", lambda dtype, data: _Array.of((), dtype, "C", data)),
            (
                "numeric",
                "_frombuffer",
                lambda data, dtype, shape, order: _Array.of(shape, dtype, order, data),
            ),
        )
    },
}


class _Reader(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise PickleError(
                f"it holds {module}.{name}, which is not a numpy array or a plain container"
            ) from None


def load(path: Path | str) -> dict[str, np.ndarray]:
    """Nested dicts of numeric arrays, flattened to names joined by `/`. Raises PickleError."""
    try:
        with Path(path).open("rb") as file:
            return dict(_flat(_Reader(file).load()))
    except PickleError as error:
        raise PickleError(f"{path}: refused: {error}") from error
    except Exception as error:  # damaged pickles raise almost anything
        raise PickleError(f"{path} is not a readable pickle: {type(error).__name__}: {error}") from error


def _flat(tree: object):
    if not isinstance(tree, dict):
        raise PickleError(f"it holds a {type(tree).__name__}, not a dict of arrays")
    waiting = [("", tree)]
    while waiting:
        prefix, node = waiting.pop()
        if prefix.count("/") > MAX_DEPTH:
            raise PickleError(f"more than {MAX_DEPTH} dicts inside dicts")
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                waiting.append((f"{name}/", value))
            elif isinstance(value, _Array):
                yield name, value.numpy()
            else:
                raise PickleError(f"{name} is a {type(value).__name__}, not a numeric array")
