"""What each episode of a sitting shows: what the operator says, or a task's trials one after the other."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from config.loading import ConfigError, load
from config.recording import Recording, names_task
from config.robot import Robot
from config.task import Task
from config.workcell import Workcell
from simulation.tasks.trial import make_trial, placing


@dataclass(frozen=True)
class Setup:
    """One episode's instruction, and what the operator lays out for it (nothing where words were given)."""

    instruction: str
    lines: tuple[str, ...] = ()


Setups = Callable[[int], Setup]  # of the episode with this number in the dataset, from 0


def read(config: Recording, robot: Robot) -> Setups:
    """Episode n of a task file is trial `first_seed` + n of its seen split, as in `vipra dataset generate`.

    Raises ConfigError for a task file that cannot be read, is for other arms or has trials up to
    `target` whose objects do not fit, and in simulation, where nobody lays out its objects.
    """
    if not names_task(config.task):
        said = Setup(config.task)
        return lambda number: said
    task = load(Task, config.task)
    needed = load(Workcell, task.workcell).arms
    if set(needed) != set(robot.arms):
        raise ConfigError(
            f"task {task.name} is for arms {', '.join(needed)}, the robot has {', '.join(robot.arms)}: name "
            "another robot, or copy the task's file and set its `workcell` and `arm`"
        )
    if robot.simulation:
        raise ConfigError(
            f"task {task.name}: a person lays out its objects, and this robot is simulated: give the words "
            f"themselves, or vipra dataset generate {config.task}"
        )

    @functools.lru_cache(maxsize=2)
    def setup(number: int) -> Setup:
        trial = make_trial(task, config.first_seed + number, template=None)
        return Setup(trial.instruction, (task.protocol.set_up, *placing(trial), task.protocol.reset))

    for number in range(config.target + 1):  # not in the middle of a sitting; the one after it is told
        setup(number)
    return setup
