"""The policy server of an evaluation: started here for a policy, or running somewhere else at an address."""

import contextlib
import time
from pathlib import Path

import yaml

from config.embodiment import Embodiment
from policy_server.client import PolicyClient, ServerUnavailable
from policy_server.protocol import Metadata
from vipra_ros import bringup
from vipra_ros.evaluation.ledger import EvaluationError, Void
from vipra_ros.process import Child, ProcessError, free_port

ANSWER_S = 60.0  # wall time for one request
READY_S = 120.0  # wall time for a server that was started elsewhere


class Server:
    """`start`, and again when it died; `stop` at the end. `bind`: where to serve, or a free local port.

    threads: of torch on the CPU, where a checkpoint folder is served; None: torch's choice, every core.
    """

    def __init__(
        self,
        policy: str,
        embodiment: Embodiment,
        folder: Path,
        bind: str | None = None,
        threads: int | None = None,
    ):
        self._policy, self._embodiment, self._folder, self._bind = policy, embodiment, folder, bind
        self._threads = threads
        self._resources = contextlib.ExitStack()
        self._children: list[Child] = []
        self.address = ""
        self.client: PolicyClient | None = None
        self.metadata: Metadata | None = None

    def start(self) -> None:
        """Raises ProcessError, EvaluationError when it does not get ready, Mismatch for another robot's."""
        self.stop()
        self.address = self._policy
        if "://" not in self._policy:
            self.address = self._bind or f"tcp://127.0.0.1:{free_port()}"
            graph = bringup.describe("policy_server", {"policy": self._served(), "bind": self.address})
            logs = self._folder / "logs" / time.strftime("%Y%m%d-%H%M%S")  # that of a server that died stays
            self._children = self._resources.enter_context(bringup.running(graph, logs))
        client = PolicyClient(self.address, timeout_s=ANSWER_S, embodiment=self._embodiment)
        self._resources.callback(client.close)
        try:
            found = client.hello(READY_S)
        except ServerUnavailable as error:
            raise EvaluationError(f"no policy server: {error}") from error
        self._confirm(found)
        self.client, self.metadata = client, found

    def _confirm(self, found: Metadata) -> None:
        """Raises EvaluationError for another policy than the first one: trials of both do not mix."""
        for name in ("model", "checkpoint"):
            known, now = getattr(self.metadata or found, name), getattr(found, name)
            if now != known:
                raise EvaluationError(
                    f"the server now has {name} {now!r}, this evaluation's is {known!r}: serve that one and "
                    "give the same command again"
                )

    @property
    def lost(self) -> bool:
        """It must be started again; one that runs elsewhere is looked for again."""
        return all(child.returncode() is not None for child in self._children)

    def check(self) -> None:
        """Raises Void when the process has ended, EvaluationError when another policy is served."""
        try:
            for child in self._children:
                child.check()
        except ProcessError as error:
            raise Void(in_a_line(error)) from error
        if self.client.metadata is not None:  # None while it looks for the server again
            self._confirm(self.client.metadata)

    def _served(self) -> str:
        """What `vipra serve` is given; a checkpoint folder gets a policy file of its own."""
        folder = Path(self._policy).expanduser()
        if len(folder.parts) > 1 and not folder.exists():
            raise EvaluationError(f"--policy {self._policy}: no such checkpoint folder or policy file")
        if not (folder / "config.json").is_file():
            return self._policy
        path = self._folder / "policy.yaml"
        path.write_text(yaml.safe_dump({"checkpoint": str(folder.resolve()), "threads": self._threads}))
        return str(path.resolve())

    def stop(self) -> None:
        self._resources.close()
        self._children, self.client = [], None


def in_a_line(error: Exception) -> str:
    """What happened, and in which log the rest is, without the end of that log."""
    return str(error).splitlines()[0].replace("; end of ", "; see ").removesuffix(":")
