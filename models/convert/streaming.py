"""Reads LWM's and ViPRA's "streaming" files: a msgpack stream of (key tuple, flax-serialised array).

An array is msgpack extension 1 around (shape, dtype name, C-order bytes); above 1 GiB flax cuts it into
chunks (`__msgpack_chunked_array__`). Notable: opening a file reads only the heads and remembers where the
bytes lie, so any tensor, or one layer of a stacked tensor, is read straight into its place. Lengths are
checked before anything is allocated, and nothing is executed.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.convert import ConvertError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint32": torch.uint32,
}
ARRAY, SCALAR = 1, 3  # flax's msgpack extension types that hold numbers
CHUNKED = "__msgpack_chunked_array__"
MAX_KEY, MAX_DIMENSIONS = 64, 8  # parts of a name, axes of an array: far above any real one


class StreamError(ConvertError):
    """A streaming file is truncated, damaged or of another kind; the message names the file and byte."""


@dataclass(frozen=True)
class Array:
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[int, int], ...]  # (first byte in the file, bytes) in C order


class _Cursor:
    """Walks msgpack heads between two bytes of a file."""

    def __init__(self, path: Path, descriptor: int, start: int, end: int):
        self.path, self.descriptor, self.at, self.end = path, descriptor, start, end

    def error(self, what: str, at: int | None = None) -> StreamError:
        return StreamError(f"{self.path}: byte {self.at if at is None else at}: {what}")

    def require(self, count: int, what: str) -> None:
        if count > self.end - self.at:
            raise self.error(
                f"{what} of {count} bytes, but only {self.end - self.at} are left: "
                "the file is truncated or damaged, download it again"
            )

    def take(self, count: int, what: str) -> bytes:
        self.require(count, what)
        data = os.pread(self.descriptor, count, self.at)
        if len(data) != count:
            raise self.error(f"{what} ends early: the file changed while it was read")
        self.at += count
        return data

    def head(self) -> tuple[str, int]:
        """The next value's kind, and its number, count or length; an extension's type is still to be read."""
        at, code = self.at, self.take(1, "a value")[0]
        for low, high, kind, mask in _SMALL:
            if low <= code <= high:
                return kind, code & mask
        if code not in _WIDE:
            raise self.error(f"unexpected msgpack code 0x{code:02x}: not a streaming checkpoint", at)
        kind, width, signed = _WIDE[code]
        if width < 0:  # extension of fixed length
            return kind, -width
        return kind, int.from_bytes(self.take(width, "a length"), "big", signed=signed)

    def expect(self, kind: str, what: str) -> int:
        at = self.at
        found, number = self.head()
        if found != kind:
            raise self.error(f"{what}: expected {kind}, found {found}", at)
        return number

    def text(self, what: str) -> str:
        at, length = self.at, self.expect("str", what)
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not text", at) from error


_SMALL = (  # first code, last code, kind, mask of the number inside the code
    (0x00, 0x7F, "int", 0x7F),
    (0x80, 0x8F, "map", 0x0F),
    (0x90, 0x9F, "array", 0x0F),
    (0xA0, 0xBF, "str", 0x1F),
    (0xC2, 0xC3, "bool", 0x01),
)
_WIDE = {  # code -> kind, bytes of the number (negative: its fixed length), signed
    **{0xC4 + i: ("bin", 1 << i, False) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i, False) for i in range(3)},
    **{0xCC + i: ("int", 1 << i, False) for i in range(4)},
    **{0xD0 + i: ("int", 1 << i, True) for i in range(4)},
    **{0xD4 + i: ("ext", -(1 << i), False) for i in range(5)},
    **{0xD9 + i: ("str", 1 << i, False) for i in range(3)},
    **{0xDC + i: ("array", 2 << i, False) for i in range(2)},
    **{0xDE + i: ("map", 2 << i, False) for i in range(2)},
}


class Stream:
    """An open streaming file: `names` in order, `array(name)` its description, `read(name)` its numbers.

    Raises StreamError.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise StreamError(f"{self.path} is not readable: {error}") from error
        self._entries: dict[str, tuple[int, int]] = {}  # name -> bytes of its serialised array
        self._arrays: dict[str, Array] = {}
        size = os.fstat(self._file.fileno()).st_size
        cursor = _Cursor(self.path, self._file.fileno(), 0, size)
        try:
            while cursor.at < size:
                self._entry(cursor)
            if not self._entries:
                raise cursor.error("the file is empty")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Key parts joined by `/`."""
        return tuple(self._entries)

    def _entry(self, cursor: _Cursor) -> None:
        start = cursor.at
        if cursor.expect("array", "an entry (key, array)") != 2:
            raise cursor.error("an entry is not a pair (key, array)", start)
        count = cursor.expect("array", "a key")
        if not 0 < count <= MAX_KEY:
            raise cursor.error(f"a key of {count} parts", start)
        name = "/".join(cursor.text("a key's part") for _ in range(count))
        if name in self._entries:
            raise cursor.error(f"{name} appears twice", start)
        length = cursor.expect("bin", f"array {name}")
        cursor.require(length, f"array {name}")
        self._entries[name] = (cursor.at, length)
        cursor.at += length

    def array(self, name: str) -> Array:
        """Shape, dtype and place of an array, checked against each other."""
        if name not in self._arrays:
            start, length = self._entries[name]
            cursor = _Cursor(self.path, self._file.fileno(), start, start + length)
            self._arrays[name] = self._whole(cursor, name)
            if cursor.at != cursor.end:
                raise cursor.error(f"{name} is followed by {cursor.end - cursor.at} stray bytes")
        return self._arrays[name]

    def _whole(self, cursor: _Cursor, name: str) -> Array:
        start = cursor.at
        kind, count = cursor.head()
        if kind == "ext":
            cursor.at = start
            return self._plain(cursor, name)
        if kind != "map":
            raise cursor.error(f"{name}: expected an array, found {kind}", start)
        chunked, shape, chunks = False, None, {}
        for _ in range(count):
            key = cursor.text(f"{name}: a key")
            if key == CHUNKED:
                chunked = cursor.expect("bool", f"{name}: {key}") == 1
            elif key == "shape":
                pairs = cursor.expect("map", f"{name}: shape")
                found = {cursor.text("an axis"): cursor.expect("int", "a size") for _ in range(pairs)}
                shape = self._ordered(cursor, found, f"{name}: shape")
            elif key == "chunks":
                pairs = cursor.expect("map", f"{name}: chunks")
                for _ in range(pairs):
                    index = cursor.text(f"{name}: a chunk's number")
                    chunks[index] = self._plain(cursor, f"{name} chunk {index}")
            else:
                raise cursor.error(f"{name}: unknown key {key!r}", start)
        parts = self._ordered(cursor, chunks, f"{name}: chunks")
        if not chunked or shape is None or not parts:
            raise cursor.error(f"{name}: neither an array nor a chunked array", start)
        dtypes = {part.dtype for part in parts}
        array = Array(shape, parts[0].dtype, tuple(p for part in parts for p in part.pieces))
        if (
            len(dtypes) > 1
            or min(shape, default=0) < 0
            or math.prod(shape) != sum(math.prod(part.shape) for part in parts)
        ):
            raise cursor.error(f"{name}: its chunks do not make {list(shape)}", start)
        return array

    @staticmethod
    def _ordered(cursor: _Cursor, numbered: dict, what: str) -> tuple:
        """Values of flax's {"0": .., "1": ..} in order."""
        try:
            return tuple(numbered[str(i)] for i in range(len(numbered)))
        except KeyError as error:
            raise cursor.error(f"{what}: number {error} is missing") from error

    def _plain(self, cursor: _Cursor, name: str) -> Array:
        start, length = cursor.at, cursor.expect("ext", name)
        kind = cursor.take(1, "an extension's type")[0]
        cursor.require(length, name)
        if kind not in (ARRAY, SCALAR):
            raise cursor.error(f"{name}: unknown msgpack extension {kind}", start)
        end = cursor.at + length
        if cursor.expect("array", f"{name}: (shape, dtype, bytes)") != 3:
            raise cursor.error(f"{name}: not (shape, dtype, bytes)", start)
        axes = cursor.expect("array", f"{name}: shape")
        if axes > MAX_DIMENSIONS:
            raise cursor.error(f"{name} has {axes} axes", start)
        shape = tuple(cursor.expect("int", f"{name}: a size") for _ in range(axes))
        dtype = cursor.text(f"{name}: dtype")
        if dtype not in DTYPES:
            raise cursor.error(f"{name}: unknown dtype {dtype!r}", start)
        count = cursor.expect("bin", f"{name}: bytes")
        cursor.require(count, name)
        if min(shape, default=0) < 0 or count != math.prod(shape) * DTYPES[dtype].itemsize:
            raise cursor.error(f"{name}: {count} bytes are not {list(shape)} of {dtype}", start)
        piece = (cursor.at, count)
        cursor.at += count
        if cursor.at != end:
            raise cursor.error(f"{name}: its length is wrong", start)
        return Array(shape, DTYPES[dtype], (piece,))

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """An array, or entry `layer` along its first axis, in memory of its own."""
        array = self.array(name)
        shape = array.shape if layer is None else array.shape[1:]
        out = torch.empty(shape, dtype=array.dtype)
        target = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        first = (layer or 0) * out.nbytes  # of the array's own bytes
        begin = 0
        for offset, count in array.pieces:
            low, high = max(first, begin), min(first + out.nbytes, begin + count)
            if low < high:
                self._fill(target[low - first : high - first], offset + low - begin, name)
            begin += count
        return out

    def _fill(self, target: memoryview, offset: int, name: str) -> None:
        while len(target):
            try:
                count = os.preadv(self._file.fileno(), [target], offset)
            except OSError as error:
                raise StreamError(f"{self.path}: byte {offset}: {name}: {error}") from error
            if count == 0:
                raise StreamError(f"{self.path}: byte {offset}: {name} ends early: the file was cut short")
            target, offset = target[count:], offset + count
