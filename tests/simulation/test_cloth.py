"""The cloth keeps its shape, falls over objects, is gripped by friction, and its cover is measured."""

import itertools

import numpy as np
import pytest

from config.loading import load
from config.task import Task
from simulation import cloth
from simulation.demonstrate import Demonstrator
from simulation.lockstep import Lockstep, judge_for, things
from simulation.tasks.trial import make_trial
from simulation.workcell import place_prop, top_points

TASK = load(Task, "cover_object")


def test_cover_is_the_share_of_the_top_under_the_cloth_and_not_above_it():
    top = top_points("box")
    height = top[0, 2]
    over = np.add(cloth.grid(0.28), (0, 0, height + 0.004))
    assert cloth.coverage(over, top) == 1.0
    assert cloth.coverage(np.add(over, (0.14, 0, 0)), top) == 0.5
    assert cloth.coverage(np.add(over, (0.3, 0, 0)), top) == 0.0
    assert cloth.coverage(over - (0, 0, height), top) == 0.0, "it lies under the object"
    assert cloth.coverage(over[:, [0, 2, 1]], top) == 0.0, "it stands on its edge"


@pytest.mark.parametrize(("split", "seeds"), [("seen", 8), ("unseen", 8)])
def test_trials_name_the_object_and_vary_shapes_textures_and_the_unseen_cloths_size(split, seeds):
    choices, drawn = getattr(TASK, split), []
    for seed in range(seeds):
        trial = make_trial(TASK, seed, split)
        fabric, target = trial.workcell.props
        assert trial.instruction.endswith(target.kind) and "cloth" in trial.instruction
        drawn.append((target.kind, target.pattern, fabric.pattern, fabric.size_m))
    kinds, patterns, fabrics, sizes = (set(column) for column in zip(*drawn, strict=True))
    assert kinds == set(choices.shapes) and patterns == fabrics == set(choices.patterns)
    assert sizes == set(choices.cloth_sizes_m)


@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_a_cloth_dropped_on_the_object_drapes_counts_as_success_and_keeps_its_edges(split):
    world = Lockstep(make_trial(TASK, 0, split))
    world.reset(trial := make_trial(TASK, 1, split))
    fabric, target = trial.workcell.props
    table = trial.workcell.table.centre_xyz[2]
    height = top_points(target.kind)[0, 2]
    home = {arm: world.joints(arm) for arm in world.arms}
    world.advance(0.1, home)
    assert not world.judge.success
    place_prop(world.model, world.data, fabric, np.array(target.xy), 0.3, table + height)
    for _ in range(12):
        world.advance(0.1, home)
    found = things(world.model, world.data, trial.workcell)[fabric.name].surface
    assert found[:, 2].min() < table + height - 0.05, "its sides hang"
    flat = cloth.grid(fabric.size_m)
    for a, b, c in cloth.triangles():
        for i, j in itertools.combinations((a, b, c), 2):
            stretch = np.linalg.norm(found[i] - found[j]) / np.linalg.norm(flat[i] - flat[j])
            assert 0.9 < stretch < 1.1
    assert world.judge.success
    # The same cloth beside it, and the same one while the hand is at its knob, count for nothing.
    state, tcp = world.things(), np.array([0.0, 0.0, table + 0.5])
    aside = dict(state, **{fabric.name: _moved(state[fabric.name], (0.0, 0.15, 0.0))})
    for seen, hand in ((aside, tcp), (state, np.add(state[fabric.name].xyz, (0, 0, 0.03)))):
        judge = judge_for(trial)
        for t in np.arange(0.0, 1.0, 0.1):
            judge.update(t, seen, {judge.task.arm: hand})
        assert not judge.success


def test_the_expert_lifts_the_cloth_by_its_knob_with_friction_alone():
    trial = make_trial(TASK, 1)
    demonstrator = Demonstrator(trial)
    world = demonstrator.world
    for _ in demonstrator.play(trial, seed=0):
        if world.judge.partial:
            break
    assert world.judge.partial and world.judge.drops == 0
    tcp, held = world.tcp("right")[0], world.things()["cloth"].xyz
    assert np.linalg.norm(tcp - held) < 0.03


def _moved(thing, by):
    return type(thing)(thing.xyz + by, thing.quat, thing.velocity, thing.surface + by)
