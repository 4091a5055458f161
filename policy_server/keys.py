"""CURVE certificates: who may talk to a policy server that listens beyond this machine.

One folder on the server: `server.key_secret` is its own, every other `*.key` (public) in it is a robot that
may connect. A robot holds its own `<name>.key_secret` and the server's `server.key`. Encryption and
authentication are ZeroMQ's (RFC 26, CurveZMQ).
"""

import logging
import os
import re
import tempfile
from pathlib import Path

import zmq
import zmq.auth

SERVER = "server"
log = logging.getLogger("policy_server")


class KeyFileError(ValueError):
    """A key file is missing, not a key, or readable by others; the message names it and the fix."""


def generate(folder: str | Path, name: str) -> tuple[Path, Path]:
    """Write `<name>.key` (public) and `<name>.key_secret` (mode 0600) into `folder`; returns both paths.

    Raises KeyFileError if the name is unfit, a file exists already or ZeroMQ was built without CURVE.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise KeyFileError(f"key name {name!r}: use 1 to 64 letters, digits, - or _")
    if not zmq.has("curve"):
        raise KeyFileError("this ZeroMQ has no CURVE support: install pyzmq from PyPI")
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    public, secret = folder / f"{name}.key", folder / f"{name}.key_secret"
    for path in (public, secret):
        if path.exists():
            raise KeyFileError(f"{path} exists: move it away first; a new key locks out users of the old")
    # in a private folder first: the secret is never readable by others, not even for a moment
    with tempfile.TemporaryDirectory(dir=folder) as private:
        made_public, made_secret = map(Path, zmq.auth.create_certificates(private, name))
        made_secret.chmod(0o600)
        made_public.rename(public)
        made_secret.rename(secret)
    return public, secret


def load_public(path: str | Path) -> bytes:
    """Z85 public key of a certificate file. Raises KeyFileError."""
    return _load(path)[0]


def load_secret(path: str | Path) -> tuple[bytes, bytes]:
    """Z85 (public, secret) of a secret certificate file. Raises KeyFileError, also if others may read it."""
    public, secret = _load(path)
    if secret is None:
        raise KeyFileError(f"{path} holds no secret key: give the .key_secret file")
    if os.name == "posix" and Path(path).expanduser().stat().st_mode & 0o077:
        raise KeyFileError(f"{path} can be read by others: chmod 600 {path}")
    return public, secret


class AllowedClients:
    """The robots whose public keys lie in a folder; read at each connection, so adding a file is enough."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self._told: set[Path] = set()

    def names(self) -> dict[bytes, str]:
        """Public key -> name. Raises KeyFileError."""
        return {load_public(path): path.stem for path in self._paths()}

    def callback(self, domain: str, key: bytes) -> bool:
        """ZAP's question: may the client with this Z85 public key connect?

        A file that cannot be read lets nobody in, and keeps nobody else out; it is told once.
        """
        for path in self._paths():
            try:
                if load_public(path) == key:
                    return True
            except KeyFileError as error:
                if path not in self._told:
                    self._told.add(path)
                    log.error("%s", error)
        return False

    def _paths(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("*.key")) if path.stem != SERVER]


def _load(path: str | Path) -> tuple[bytes, bytes | None]:
    path = Path(path).expanduser()
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise KeyFileError(f"{path}: not a key file ({error}); make one with: vipra keys") from error
    if public is None or len(public) != 40:
        raise KeyFileError(f"{path}: holds no public key; make one with: vipra keys")
    return public, secret
