"""Dynamixel servos on a serial port through ROBOTIS's SDK (protocol 2.0), and a thread that reads a GELLO.

The SDK is imported when a port is opened: nothing else here needs it.
"""

import contextlib
import errno
import math
import termios
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from config.teleop import Dynamixel
from vipra_ros.teleop.servos import CalibrationError, Unwrapped

PRESENT_POSITION, LENGTH = 132, 4  # control table of the X series
RETRY_S = 1.0
_READ_S = 0.002  # the SDK asks for bytes in a loop: let the kernel wait instead


class LeaderError(RuntimeError):
    """A GELLO's servos cannot be read; the message names port, cause and fix."""


class Servos:
    """An open port. Not thread-safe. Close it, or use it as a context manager."""

    def __init__(self, port: str, baud: int, ids: Sequence[int]):
        """Raises LeaderError when the SDK or the port is not there."""
        try:
            import dynamixel_sdk as sdk
            from serial import SerialException
        except ModuleNotFoundError as error:
            raise LeaderError("dynamixel-sdk is not installed: pip install 'vipra_ros[robot]'") from error
        self.port, self.ids = port, tuple(ids)
        # pyserial lets termios.error through, which is no OSError, when a port is unplugged
        self._broken = (SerialException, OSError, termios.error)
        self._sdk, self._packets = sdk, sdk.PacketHandler(2.0)
        self._handler = sdk.PortHandler(port)
        try:
            opened = self._handler.setBaudRate(baud)
        except self._broken as error:
            raise LeaderError(f"{port}: {_cause(error)}") from error
        if not opened:
            raise LeaderError(f"{port}: {baud} is no baud rate of the servos; 57600 is their factory setting")
        self._handler.ser.timeout = _READ_S
        self._group = sdk.GroupSyncRead(self._handler, self._packets, PRESENT_POSITION, LENGTH)
        for number in self.ids:
            self._group.addParam(number)

    def missing(self) -> list[int]:
        """Ids that do not answer a ping. Raises LeaderError for a lost port."""
        return [number for number in self.ids if not self._ping(number)]

    def _ping(self, number: int) -> bool:
        with self._lost_port():
            return any(self._packets.ping(self._handler, number)[1] == 0 for _ in range(2))

    def read(self) -> np.ndarray | None:
        """Counts [n] of the servos in the order of their ids; None when an answer was lost or damaged.

        Raises LeaderError for a lost port.
        """
        with self._lost_port():
            if self._group.txRxPacket() != self._sdk.COMM_SUCCESS:
                return None
        counts = [self._group.getData(number, PRESENT_POSITION, LENGTH) for number in self.ids]
        return np.array(counts, dtype=np.uint32).astype(np.int32).astype(int)

    def close(self) -> None:
        with contextlib.suppress(*self._broken):
            self._handler.closePort()

    @contextlib.contextmanager
    def _lost_port(self):
        try:
            yield
        except self._broken as error:
            raise LeaderError(f"{self.port}: connection lost: {_cause(error)}") from error

    def __enter__(self) -> "Servos":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _cause(error: Exception) -> str:
    """One line with the fix, for what people meet."""
    number = getattr(error, "errno", None)
    if number == errno.ENOENT:
        return "no such device: is the GELLO plugged in? ls /dev/serial/by-id"
    if isinstance(error, termios.error) or number == errno.EIO:
        return "the device is gone: plug it in again"
    if number == errno.EACCES:
        return "no permission: sudo usermod -aG dialout $USER, then log in again"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def ids_of(config: Dynamixel) -> tuple[int, ...]:
    """Ids in the order of the counts: seven joints, then the trigger if there is one."""
    return config.ids if config.gripper_id is None else (*config.ids, config.gripper_id)


class Reader:
    """Reads one GELLO in a thread of its own, and opens the port again when it was lost.

    `take` gives the samples since the last call; `problem` says why there are none. While not `coupled`,
    angles are those within the arm's ranges: a joint that was turned once round is where it looks to be.
    """

    def __init__(self, config: Dynamixel, rate_hz: float, clock: Callable[[], float]):
        """`clock`: executor time in s; `rate_hz`: at most this often, the baud rate may allow less."""
        self._config, self._period, self._clock = config, 1.0 / rate_hz, clock
        self._samples: deque[tuple[float, np.ndarray, float | None]] = deque(maxlen=100)
        self._closing = threading.Event()
        self.problem = f"{config.port}: not opened yet"
        self.coupled = False  # set by whoever uses the samples
        self.lost = 0  # answers that were damaged or did not come
        self._thread = threading.Thread(target=self._run, name=f"gello {config.port}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self) -> list[tuple[float, np.ndarray, float | None]]:
        """(executor time, joints [7] rad, opening or None), oldest first."""
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._samples.popleft())
        return taken

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(2.0)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                with Servos(self._config.port, self._config.baud, ids_of(self._config)) as servos:
                    self._read(servos)
            except LeaderError as error:
                self.problem = str(error)
            except Exception as error:  # the SDK takes some garbage for an answer and trips over it
                self.problem = (
                    f"{self._config.port}: garbage: {type(error).__name__}: {error}: check the cables"
                )
            self._closing.wait(RETRY_S)

    def _read(self, servos: Servos) -> None:
        """Until the port is lost (LeaderError), or no servo answers for a while."""
        unwrapped, due, answered = Unwrapped(self._config), time.monotonic(), time.monotonic()
        while not self._closing.is_set():
            asked = self._clock()
            counts = servos.read()
            if counts is not None:
                # The servos answer one after the other: the middle of the transfer.
                self._samples.append((0.5 * (asked + self._clock()), *unwrapped(counts, not self.coupled)))
                self.problem, answered = "", time.monotonic()
            else:
                self.lost += 1
                if time.monotonic() - answered > RETRY_S:
                    raise LeaderError(_silent(servos))
            due = max(due + self._period, time.monotonic() - self._period)
            self._closing.wait(max(0.0, due - time.monotonic()))


def _silent(servos: Servos) -> str:
    missing = servos.missing()
    if len(missing) == len(servos.ids):
        return f"{servos.port}: no servo answers: check the power supply and the baud rate"
    names = ", ".join(map(str, missing))
    if missing:
        return f"{servos.port}: servo {names} does not answer: check its cable and id"
    return f"{servos.port}: answers are damaged: check the cables, or lower the baud rate"


def median_counts(servos: Servos, samples: int = 15) -> np.ndarray:
    """Counts [n] of servos that are held still. Raises LeaderError (no answer), CalibrationError (moving)."""
    rows, lost = [], 0
    while len(rows) < samples:
        if (counts := servos.read()) is not None:
            rows.append(counts)
        elif (lost := lost + 1) > samples:
            raise LeaderError(_silent(servos))
    # One turn apart is the same place: a count at the end of a turn flickers between 0 and 4095.
    turns = np.array(rows) - rows[0]
    turns = (turns + 2048) % 4096 - 2048
    spread = np.ptp(turns, axis=0)
    if spread.max() > 40:
        moved = servos.ids[int(spread.argmax())]
        radians = spread.max() * 2 * math.pi / 4096
        raise CalibrationError(f"servo {moved} moved by {radians:.2f} rad: hold the GELLO still")
    return np.asarray(rows[0] + np.round(np.median(turns, axis=0)), dtype=int)
