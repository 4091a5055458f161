"""What a key means while recording, and reading keys one by one. A foot pedal is a keyboard with one key."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator

HELP = "space start/stop  k keep  d discard  u undo  r retry  p pause  q quit"
_SPACE = {"IDLE": "start", "RECORDING": "stop", "PAUSED": "stop"}
_KEYS = {"k": "keep", "d": "discard", "u": "undo", "r": "retry", "p": "pause", "q": "quit"}


def verb(key: str, state: str) -> str | None:
    """The recorder's service for a key in a state, or "quit". None: the key means nothing now.

    Space never decides about an episode: a pedal that is stepped on twice neither keeps nor drops one.
    """
    if key in (" ", "\n", "\r"):
        return _SPACE.get(state)
    if key in ("\x03", "\x04"):
        return "quit"
    return _KEYS.get(key.lower())


@contextlib.contextmanager
def raw_keys(file=sys.stdin) -> Iterator[None]:
    """Keys come one by one and are not shown, where `file` is a terminal."""
    if not file.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(file)
    try:
        tty.setcbreak(file)
        yield
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)


def read_key(timeout_s: float, file=sys.stdin) -> str:
    """The next key; "" if none comes in time; "\\x04", again and again, at the end of the input."""
    if not select.select([file], [], [], timeout_s)[0]:
        return ""
    data = os.read(file.fileno(), 1)
    return data.decode(errors="replace") if data else "\x04"
