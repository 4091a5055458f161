"""Every message but the pictures as MCAP, for those who want to look closer (Foxglove, `mcap`). No ROS.

The messages' definitions go along, so that the file needs no ROS to be read.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from config.loading import ConfigError

_FIELD = re.compile(r"^([a-zA-Z]\w*/[A-Z]\w*|[A-Z]\w*)(?:\[.*?\])?\s+\w+", re.MULTILINE)
_RULE = "\n" + "=" * 80 + "\n"
_LOOK_EVERY = 2**20  # bytes of messages between two looks at the free disk


def definition(package: str, name: str) -> str:
    """Text of a message type with all it is made of, as MCAP's `ros2msg` encoding wants it."""
    done: dict[str, str] = {}

    def add(package: str, name: str) -> None:
        if f"{package}/{name}" in done:
            return
        text = done[f"{package}/{name}"] = _file(package, name).read_text()
        for kind in _FIELD.findall(text):
            add(*(kind.split("/") if "/" in kind else (package, kind)))

    add(package, name)
    (_, first), *others = done.items()
    return first + "".join(f"{_RULE}MSG: {kind}\n{text}" for kind, text in others)


def _file(package: str, name: str) -> Path:
    """Definition of a message type. Raises ConfigError."""
    prefixes = [*filter(None, os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)), sys.prefix]
    for prefix in prefixes:
        path = Path(prefix) / "share" / package / "msg" / f"{name}.msg"
        if path.is_file():
            return path
    raise ConfigError(f"raw: no definition of {package}/{name} below {', '.join(prefixes)}: leave raw out")


class RawLog:
    """One MCAP file. `add` takes serialised messages, `close` completes it.

    It ends by itself where the disk is full: episodes matter more.
    """

    def __init__(
        self,
        path: Path,
        topics: dict[str, type],
        reserve_mb: float = 0.0,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ):
        """topics: name -> message class. Raises ConfigError where the package mcap is not installed."""
        try:
            from mcap.writer import Writer
        except ModuleNotFoundError as error:
            raise ConfigError(
                "raw: the package mcap is not installed: pip install 'vipra_ros[raw]'"
            ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        self.ended = ""  # why nothing is logged any more
        self._path, self._reserve_mb, self._free_bytes = path, reserve_mb, free_bytes
        self._unlooked = _LOOK_EVERY
        self._file = path.open("wb")
        self._writer = Writer(self._file, chunk_size=2**18)
        self._writer.start("ros2", "vipra_ros")
        schemas: dict[type, int] = {}
        self._channels = {}
        for topic, kind in topics.items():
            package = kind.__module__.partition(".")[0]
            if kind not in schemas:
                text = definition(package, kind.__name__).encode()
                schemas[kind] = self._writer.register_schema(
                    f"{package}/msg/{kind.__name__}", "ros2msg", text
                )
            self._channels[topic] = self._writer.register_channel(topic, "cdr", schemas[kind])

    def add(self, topic: str, data: bytes, time_s: float) -> None:
        """A message, serialised (CDR), received at executor time `time_s`. Nothing once it has `ended`."""
        if self.ended:
            return
        stamp = round(time_s * 1e9)
        try:
            self._writer.add_message(self._channels[topic], stamp, data, stamp)
            self._unlooked += len(data)
            if self._unlooked > _LOOK_EVERY:
                self._unlooked, free_mb = 0, self._free_bytes(self._path.parent) / 1e6
                if free_mb < self._reserve_mb:
                    self._end(f"{free_mb:.0f} MB left, {self._reserve_mb:g} MB are kept for episodes")
        except OSError as error:
            self._end(str(error))

    def close(self) -> None:
        if not self.ended:
            self._end("closed")

    def _end(self, why: str) -> None:
        self.ended = f"raw log ended: {self._path}: {why}"
        with contextlib.suppress(OSError):
            self._writer.finish()
        with contextlib.suppress(OSError):
            self._file.close()
