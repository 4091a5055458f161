"""Dynamixel X servos on a pseudo-terminal: protocol 2.0 as ROBOTIS's e-Manual describes it.

Answers ping, read and sync read; checks and makes CRC-16 (polynomial 0x8005, from 0, not reflected) and byte
stuffing. Can spoil or empty answers, fall silent and be unplugged.
"""

import contextlib
import os
import select
import struct
import threading
import tty
from pathlib import Path

HEADER = b"\xff\xff\xfd\x00"
PING, READ, STATUS, SYNC_READ = 0x01, 0x02, 0x55, 0x82
BROADCAST = 0xFE
PRESENT_POSITION = 132
MODEL_XL330_M288 = 1200


def crc16(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ 0x8005 if crc & 0x8000 else crc << 1
        crc &= 0xFFFF
    return crc


class Bus:
    """Servos at `path`, a link to the pseudo-terminal. `counts` may be set at any time, beyond a turn too."""

    def __init__(self, path: Path, counts: dict[int, int]):
        self.path, self.counts = path, dict(counts)
        self.silent: set[int] = set()
        self.spoil = None  # bytes of an answer -> bytes that are sent instead
        self.empty = False  # answers are whole, but hold no data
        self.bad_crc = 0  # instructions that were refused
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.plug()

    def plug(self) -> None:
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.path.unlink(missing_ok=True)
        self.path.symlink_to(os.ttyname(self._slave))
        self._stop.clear()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def unplug(self) -> None:
        """The device vanishes under whoever has it open."""
        self._stop.set()
        self._thread.join()
        self.path.unlink(missing_ok=True)
        os.close(self._master)
        os.close(self._slave)

    def __enter__(self) -> "Bus":
        return self

    def __exit__(self, *_) -> None:
        if not self._stop.is_set():
            self.unplug()

    def _serve(self) -> None:
        buffer = b""
        while not self._stop.is_set():
            if not select.select([self._master], [], [], 0.01)[0]:
                continue
            with contextlib.suppress(OSError):
                buffer += os.read(self._master, 4096)
            while (start := buffer.find(HEADER)) >= 0 and len(buffer) >= start + 7:
                (length,) = struct.unpack_from("<H", buffer, start + 5)
                if len(buffer) < start + 7 + length:
                    break
                packet, buffer = buffer[start : start + 7 + length], buffer[start + 7 + length :]
                self._answer(packet)

    def _answer(self, packet: bytes) -> None:
        if crc16(packet[:-2]) != struct.unpack("<H", packet[-2:])[0]:
            self.bad_crc += 1
            return
        number, instruction = packet[4], packet[7]
        parameters = packet[8:-2].replace(b"\xff\xff\xfd\xfd", b"\xff\xff\xfd")
        if instruction == PING:
            everybody = sorted(self.counts) if number == BROADCAST else [number]
            for one in everybody:
                self._status(one, struct.pack("<HB", MODEL_XL330_M288, 52))
        elif instruction == READ:
            self._read(number, *struct.unpack("<HH", parameters))
        elif instruction == SYNC_READ:
            for one in parameters[4:]:
                self._read(one, *struct.unpack("<HH", parameters[:4]))

    def _read(self, number: int, address: int, length: int) -> None:
        table = bytearray(256)
        struct.pack_into("<i", table, PRESENT_POSITION, self.counts.get(number, 0))
        self._status(number, bytes(table[address : address + length]))

    def _status(self, number: int, parameters: bytes) -> None:
        if number not in self.counts or number in self.silent:
            return
        body = bytes([STATUS, 0]) + (b"" if self.empty else parameters)
        body = body.replace(b"\xff\xff\xfd", b"\xff\xff\xfd\xfd")
        packet = HEADER + bytes([number]) + struct.pack("<H", len(body) + 2) + body
        packet += struct.pack("<H", crc16(packet))
        if self.spoil is not None:
            packet = self.spoil(packet)
        with contextlib.suppress(OSError):
            os.write(self._master, packet)
