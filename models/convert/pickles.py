"""Reads a pickle of numpy arrays in plain containers, as LWM's VQGAN is released, and nothing else.

Only the few globals that rebuild a numeric array are resolved (numpy 1 and 2 name them differently); any
other global is refused by name before it is imported.
"""

import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy._core import multiarray, numeric

from models.convert import ConvertError


class PickleError(ConvertError):
    """A pickle holds something other than numeric arrays, or is damaged; the message names the global."""


def _latin1(text: str, encoding: str) -> bytes:
    """How protocols 0 to 2 spell bytes: `_codecs.encode(text, "latin1")`."""
    if encoding != "latin1":
        raise PickleError(f"a pickle asks for the codec {encoding!r}")
    return text.encode("latin1")


_GLOBALS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", multiarray._reconstruct),
            ("multiarray", "scalar", multiarray.scalar),
            ("numeric", "_frombuffer", numeric._frombuffer),
        )
    },
}


class _Arrays(pickle.Unpickler):
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
            tree = _Arrays(file).load()
    except PickleError as error:
        raise PickleError(f"{path}: refused: {error}") from error
    except Exception as error:  # damaged pickles raise almost anything
        raise PickleError(f"{path} is not a readable pickle: {type(error).__name__}: {error}") from error
    if not isinstance(tree, dict):
        raise PickleError(f"{path} holds a {type(tree).__name__}, expected a dict of arrays")
    out = {}
    waiting = [("", tree)]
    while waiting:
        prefix, node = waiting.pop()
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                waiting.append((f"{name}/", value))
            elif isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
                out[name] = value
            else:
                raise PickleError(f"{path}: {name} is a {type(value).__name__}, expected a numeric array")
    return out
