"""Lockstep evaluations from the first trial to the last: the policy server, the trials, what is void."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import yaml

from config.embodiment import Embodiment
from config.loading import load
from config.robot import PolicyClient as PolicyConfig
from config.task import Task
from policy_server.client import PolicyClient, ServerUnavailable
from policy_server.protocol import Metadata
from simulation.tasks.trial import Trial, make_trial
from vipra_ros import bringup
from vipra_ros.evaluation.ledger import EvaluationError, Key, Ledger, Result, Void, run_trials
from vipra_ros.evaluation.lockstep import Stage, Waiting, play_expert, play_policy
from vipra_ros.process import Child, ProcessError, free_port

ANSWER_S = 60.0  # wall time for one request
READY_S = 120.0  # wall time for a server that was started elsewhere


class Server:
    """The policy server of an evaluation: started here for a policy, or somewhere else at an address."""

    def __init__(self, policy: str, embodiment: Embodiment, folder: Path):
        self._policy, self._embodiment, self._folder = policy, embodiment, folder
        self._resources = contextlib.ExitStack()
        self._children: list[Child] = []
        self.client: Waiting | None = None
        self.metadata: Metadata | None = None

    def start(self) -> None:
        """Raises ProcessError, EvaluationError when it does not get ready, Mismatch for another robot's."""
        self.stop()
        address = self._policy
        if "://" not in address:
            address = f"tcp://127.0.0.1:{free_port()}"
            graph = bringup.describe("policy_server", {"policy": self._served(), "bind": address})
            self._children = self._resources.enter_context(bringup.running(graph, self._folder / "logs"))
        client = PolicyClient(address, timeout_s=ANSWER_S, embodiment=self._embodiment)
        self._resources.callback(client.close)
        try:
            self.metadata = client.hello(READY_S)
        except ServerUnavailable as error:
            raise EvaluationError(f"no policy server: {error}") from error
        self.client = Waiting(client, self._alive)

    def _alive(self) -> None:
        try:
            for child in self._children:
                child.check()
        except ProcessError as error:
            raise Void(str(error).splitlines()[0]) from error

    def _served(self) -> str:
        """What `vipra serve` is given; a checkpoint folder gets a policy file of its own."""
        folder = Path(self._policy).expanduser()
        if not (folder / "config.json").is_file():
            return self._policy
        path = self._folder / "policy.yaml"
        path.write_text(yaml.safe_dump({"checkpoint": str(folder.resolve())}))
        return str(path.resolve())

    def stop(self) -> None:
        self._resources.close()
        self._children, self.client = [], None


def run_policy(
    stage: Stage,
    task: Task,
    which: str,
    policy: PolicyConfig,
    out: Path,
    settings: dict,
    wanted: list[Key],
    limit_s: float,
    video: bool,
    tell: Callable[[str], None],
) -> Ledger:
    """Play what is missing of `wanted`; the ledger knows the checkpoint, so that no other goes on there."""
    out.mkdir(parents=True, exist_ok=True)
    server = Server(which, load(Embodiment, stage.robot.embodiment), out)
    try:
        server.start()
        metadata = server.metadata
        known = {"model": metadata.model, "checkpoint": metadata.checkpoint}
        ledger = Ledger(out, settings | known)

        def play(key: Key) -> Result:
            seeded = policy.model_copy(update={"seed": key.seed})
            trial = _trial(task, key)
            return play_policy(stage, trial, ledger, server.client, seeded, limit_s, video)

        run_trials(ledger, wanted, play, server.start, tell)
        return ledger
    finally:
        server.stop()


def run_expert(
    stage: Stage,
    task: Task,
    ledger: Ledger,
    wanted: list[Key],
    limit_s: float,
    video: bool,
    tell: Callable[[str], None],
) -> None:
    """The scripted expert plays what is missing of `wanted`."""
    run_trials(
        ledger,
        wanted,
        lambda key: play_expert(stage, _trial(task, key), ledger, limit_s, video),
        tell=tell,
    )


def _trial(task: Task, key: Key) -> Trial:
    return make_trial(task, key.seed, key.split)
