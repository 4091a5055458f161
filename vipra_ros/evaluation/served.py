"""Lockstep evaluations from the first trial to the last: the policy server, the trials, what is void."""

from collections.abc import Callable
from pathlib import Path

from config.embodiment import Embodiment
from config.loading import load
from config.robot import PolicyClient as PolicyConfig
from config.task import Task
from simulation.tasks.trial import Trial, make_trial
from vipra_ros.evaluation.ledger import Key, Ledger, Result, run_trials
from vipra_ros.evaluation.lockstep import Stage, Waiting, play_expert, play_policy
from vipra_ros.evaluation.server import Server


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
            client = Waiting(server.client, server.check)
            return play_policy(stage, trial, ledger, client, seeded, limit_s, video)

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
