"""What a key means while recording, and reading keys one by one. A foot pedal is a keyboard with one key."""

import contextlib
import math
import os
import select
import sys
from collections.abc import Iterator

END = "\x04"  # Ctrl-D, and the end of the input
ESCAPE = b"\x1b"
_SEQUENCE_S = 0.02  # in which the rest of an arrow key's characters comes
REPEAT_S = 0.7  # the same key sooner than this is held down: terminals repeat after 0.25 to 0.66 s
HELP = "space start/stop  k keep  d discard  u undo  r retry  p pause  q quit"
_SPACE = {"IDLE": "start", "RECORDING": "stop", "PAUSED": "stop"}
_KEYS = {"k": "keep", "d": "discard", "u": "undo", "r": "retry", "p": "pause", "q": "quit"}


def verb(key: str, state: str) -> str | None:
    """The recorder's service for a key in a state, or "quit". None: the key means nothing now.

    Space never decides about an episode: a pedal that is stepped on twice neither keeps nor drops one.
    """
    if key in (" ", "\n", "\r"):
        return _SPACE.get(state)
    if key in ("\x03", END):
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
    """The next key; "" if none comes in time; "\\x04", again and again, at the end of the input.

    An arrow or function key is one escape character: the letters it sends after that are nobody's wish.
    """
    if not select.select([file], [], [], timeout_s)[0]:
        return ""
    data = os.read(file.fileno(), 1)
    if data == ESCAPE:
        skip_sequence(file)
    return data.decode(errors="replace") if data else END


def forget_typed(file=sys.stdin) -> None:
    """Drop the keys that were pressed while nobody read them, where `file` is a terminal."""
    if file.isatty():
        import termios

        termios.tcflush(file, termios.TCIFLUSH)


def skip_sequence(file) -> None:
    """Read what an arrow or function key sends after its escape character."""
    while select.select([file], [], [], _SEQUENCE_S)[0] and os.read(file.fileno(), 32):
        pass


class Repeats:
    """Tells a key that is held down, or bounces, from one that is pressed again."""

    def __init__(self):
        self._key, self._seen_s = "", -math.inf

    def repeated(self, key: str, now: float) -> bool:
        """Whether `key` at `now` s is the one before, still."""
        again = key == self._key and now - self._seen_s < REPEAT_S
        self._key, self._seen_s = key, now
        return again
