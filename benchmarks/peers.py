"""Other processes of a benchmark: servers and clients, ready when they say so, killed at the end."""

import json
import subprocess
import sys


class Peer:
    """`python -m MODULE ROLE {options}`: prints `ready...` and, once told `go`, one line of JSON."""

    def __init__(self, module: str, role: str, **options):
        command = [sys.executable, "-m", module, role, json.dumps(options)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said = ""

    def wait(self) -> "Peer":
        """Until it is ready. Raises RuntimeError if it ends instead."""
        self.said = self.process.stdout.readline()
        if not self.said.startswith("ready"):
            raise RuntimeError(f"a peer did not start: {' '.join(self.process.args)}")
        return self

    def go(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def result(self):
        """What it prints at the end. Raises RuntimeError if it fails."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a peer failed: {' '.join(self.process.args)}")
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> "Peer":
        return self.wait()

    def __exit__(self, *_) -> None:
        self.kill()


def together(peers: list[Peer]) -> list:
    """Start client peers, let all go at once when every one is ready, and return their results."""
    try:
        for peer in peers:
            peer.wait()
        for peer in peers:
            peer.go()
        return [peer.result() for peer in peers]
    finally:
        for peer in peers:
            peer.kill()


def ready() -> None:
    """In a client peer: say so and wait for the word."""
    print("ready", flush=True)
    sys.stdin.readline()
