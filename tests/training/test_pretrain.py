"""Labels survive a kill byte for byte, and pretraining reads them, learns from them, and hands on."""

import dataclasses
import functools
import hashlib
import json
import os
import signal
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from config.dataset import DatasetConfig, Mixture
from config.training import PretrainRecipe, TokenizerRecipe
from models import checkpoint
from models.config import SIZES, VQGANConfig
from models.latent_action import config as latent_config
from models.latent_action import folder as latent_folder
from models.latent_action.model import LatentActionModel
from models.vqgan import VQGAN
from tests.training.ranks import forked
from training import distributed, label, loop, pretrain, start
from training.data.sampling import held_out
from training.run import Run, TrainingError
from training.tokenizer import TokenizerStage, vocabulary

VQ = VQGANConfig(16, (8, 8, 16), 1, 8, 64, norm_groups=4)  # 16 tokens a frame
SMALL = dataclasses.replace(
    SIZES["vipra_tiny"], name="small", hidden=32, mlp_hidden=64, layers=1, heads=2, vision_vocab=66, vqgan=VQ,
    horizon=3,
)  # fmt: skip
COMMON = {
    "model": "small",
    "steps": 12,
    "global_batch": 8,
    "micro_batch": 8,
    "optimizer": {"learning_rate": 1e-2},
    "validation": {"every": 1000, "samples": 4},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "small", SMALL)
    monkeypatch.setattr(start, "SIZES", SIZES)


@pytest.fixture
def ranks():
    yield distributed.start("cpu")
    distributed.stop()


@pytest.fixture
def made(tmp_path) -> SimpleNamespace:
    """Four short videos, a latent action model and a frame tokenizer, both random."""
    rng = np.random.default_rng(0)
    for e in range(4):
        (tmp_path / "data" / f"episode_{e}").mkdir(parents=True)
        for t in range(4 + e):
            picture = rng.integers(256, size=(16, 16, 3)).astype(np.uint8)
            cv2.imwrite(str(tmp_path / "data" / f"episode_{e}" / f"{t:04d}.png"), picture)
    torch.manual_seed(0)
    latent_folder.save(tmp_path / "latent", LatentActionModel(latent_config.SIZES["laq_tiny"]))
    stage = TokenizerStage(TokenizerRecipe(stage="tokenizer", **COMMON), VQGAN(VQ), torch.ones(1, 16, 16))
    stage.words = vocabulary(["move"], SMALL.text_vocab)
    stage.export(tmp_path / "tokenizer", SimpleNamespace(last=dict), SimpleNamespace(first=True))
    data = Mixture(datasets=(DatasetConfig(path=str(tmp_path / "data"), rate_hz=5),))
    return SimpleNamespace(data=data, latent=tmp_path / "latent", tokenizer=tmp_path / "tokenizer")


def write(made, out, ranks) -> dict[str, str]:
    """Label with one episode a shard; SHA-256 by file name."""
    label.label(made.data, made.latent, made.tokenizer, out, 3, 1, 4, ranks, lambda _: None)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


def test_labelling_killed_in_the_middle_resumes_to_the_same_bytes(made, tmp_path, monkeypatch):
    """Two ranks, one of them killed while it writes its second shard; then two again."""
    write_shard = label.write_shard

    def killed(path, rows, about):
        if "000003" in path.name:
            path.with_suffix(".partial").write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        write_shard(path, rows, about)

    def work():
        ranks = distributed.start("cpu")
        label.label(
            made.data, made.latent, made.tokenizer, tmp_path / "again", 3, 1, 4, ranks, lambda _: None
        )
        distributed.stop()

    monkeypatch.setattr(label, "write_shard", killed)
    first, second = forked(2, work)
    assert (first, second) == (1, -9)  # who is left does not call the folder finished
    written = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "again").glob("*.parquet")}
    assert sorted(written) == [f"shard-00-00000{i}.parquet" for i in range(3)]
    assert not (tmp_path / "again" / "manifest.json").exists()

    monkeypatch.setattr(label, "write_shard", write_shard)
    assert forked(2, work) == [0, 0]
    assert all((tmp_path / "again" / name).stat().st_mtime_ns == at for name, at in written.items())
    ranks = distributed.start("cpu")
    try:
        assert write(made, tmp_path / "whole", ranks) == write(made, tmp_path / "again", ranks)
        with pytest.raises(TrainingError, match="begun with another horizon"):
            label.label(made.data, made.latent, made.tokenizer, tmp_path / "again", 5, 1, 4, ranks, print)
    finally:
        distributed.stop()


def test_datasets_come_by_their_weights_and_each_row_once_an_epoch():
    """Three datasets of 3, 50 and 5 rows, weighed 3, 1 and 0.001: the last has been left out."""
    labels = SimpleNamespace(
        keys=np.array(["0/a", "0/b", "1/a", "2/a"]),
        episode=np.repeat(np.arange(4), (1, 2, 50, 5)),
        manifest={"datasets": [{"weight": w} for w in (3.0, 1.0, 0.001)]},
        row=lambda i: {"row": i},
    )
    order = [pretrain.Rows(labels, np.arange(53), 0)[n]["row"] for n in range(4096)]
    first, second = ([i for i in order if (i < 3) == inside] for inside in (True, False))
    assert (len(first), len(second)) == (3072, 1024)
    assert all(sorted(first[i : i + 3]) == [0, 1, 2] for i in range(0, 3072, 3))
    assert sorted(second[:50]) == list(range(3, 53)) and second[:50] != second[50:100]
    alone = pretrain.Rows(labels, np.arange(3, 53), 0)
    assert sorted(alone[n]["row"] for n in range(50, 100)) == list(range(3, 53))


def test_an_episode_that_was_skipped_moves_no_other_out():
    names = [f"e{i}" for i in range(40)]
    labelled = np.array([f"0/{name}" for name in names[::2]])
    everywhere = set(np.array(names)[held_out(names, 0.3)])  # as the other stages, which count the skipped
    found = pretrain.held_out_episodes(labelled, 0.3, [names])
    assert [key.split("/")[1] in everywhere for key in labelled] == found.tolist() and 0 < found.sum() < 20


def test_windows_end_with_their_clip():
    index, valid = label.windows(4, 1, 3)
    assert index[0].tolist() == [0, 0, 1, 2, 3] and index[3].tolist() == [2, 3, 3, 3, 3]
    assert valid.tolist() == [[True] * 3, [True, True, False], [True, False, False], [False] * 3]


@pytest.mark.parametrize("variant", ["full", "la", "sp2"])
def test_pretraining_learns_its_labels_and_hands_on_a_checkpoint(variant, made, ranks, tmp_path):
    write(made, tmp_path / "labels", ranks)
    plan = PretrainRecipe(
        stage="pretrain", labels=str(tmp_path / "labels"), tokenizer=str(made.tokenizer), variant=variant,
        validation_share=0.3, log_every=1, **COMMON,
    )  # fmt: skip
    run = Run(tmp_path / "run", plan)
    stage = pretrain.build(plan, ranks, run)
    row = stage.labels.row(4)  # the second episode's first frame
    assert (row["frames"][0] == row["frames"][1]).all() and row["valid"].tolist() == [True] * 3
    assert (row["frames"][2] == stage.labels.codes[7]).all()
    assert loop.train(stage, plan, run, ranks, stage.samples())
    curve = [
        line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"loss"' in line
    ]
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in curve]
    assert losses[-1] < 0.8 * losses[0]
    assert bool(list((tmp_path / "run" / "images").glob("now_future*.png"))) == (variant != "sp2")
    stage.export(tmp_path / "out", run, ranks)
    run.close()
    assert checkpoint.load(tmp_path / "out").config.action_heads == "none"


def test_how_a_step_is_computed_changes_no_loss(made, ranks, tmp_path, monkeypatch):
    """Micro-batches, packed rows, recomputed layers (with dropout too) and compiled ones: one loss curve."""
    write(made, tmp_path / "labels", ranks)
    traced = functools.partialmethod(nn.Module.compile, backend="aot_eager")  # inductor needs minutes
    monkeypatch.setattr(nn.Module, "compile", traced)

    def curve(**changes) -> list[float]:
        fields = {**COMMON, "steps": 3, "log_every": 1, "labels": str(tmp_path / "labels"), **changes}
        plan = PretrainRecipe(stage="pretrain", tokenizer=str(made.tokenizer), validation_share=0, **fields)
        run = Run(tmp_path / str(changes), plan)
        stage = pretrain.build(plan, ranks, run)
        assert loop.train(stage, plan, run, ranks, stage.samples())
        run.close()
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)[key] for line in lines for key in ("loss", "gradient_norm")]

    plain, dropped = curve(), curve(dropout=0.1)
    for changes in ({"micro_batch": 2}, {"pack": 500}, {"compile": True}):
        assert curve(**changes) == pytest.approx(plain, rel=1e-4), changes
    assert curve(dropout=0.1, activation_checkpointing=True) == pytest.approx(dropped, rel=1e-6)
    assert dropped != pytest.approx(plain, rel=1e-4)


def test_rows_too_short_for_one_sequence_are_refused(made):
    with pytest.raises(TrainingError, match="pack: 100 is less than one sequence can have, 2"):
        pretrain.Pretrain(PretrainRecipe(stage="pretrain", tokenizer=str(made.tokenizer), pack=100, **COMMON))


def test_labels_of_another_tokenizer_are_refused(made, ranks, tmp_path):
    write(made, tmp_path / "labels", ranks)
    begun = start.open_start(made.tokenizer)
    with pytest.raises(TrainingError, match="label again"):
        pretrain.Labels(tmp_path / "labels", dataclasses.replace(begun, hash="0" * 64), begun.config)


def test_damaged_labels_are_refused_by_name(made, ranks, tmp_path):
    write(made, tmp_path / "labels", ranks)
    begun = start.open_start(made.tokenizer)
    shard, manifest = tmp_path / "labels" / "shard-00-000001.parquet", tmp_path / "labels" / "manifest.json"
    whole, other = shard.read_bytes(), (tmp_path / "labels" / "shard-00-000002.parquet").read_bytes()
    for damaged in (whole[:-50], other):
        shard.write_bytes(damaged)
        with pytest.raises(
            TrainingError, match=r"000001.parquet is not what was labelled .* `vipra label` again"
        ):
            pretrain.Labels(tmp_path / "labels", begun, begun.config)
    shard.unlink()
    with pytest.raises(TrainingError, match=r"000001.parquet cannot be read"):
        pretrain.Labels(tmp_path / "labels", begun, begun.config)
    for text in ("{", "[]", "{}"):
        manifest.write_text(text)
        with pytest.raises(TrainingError, match=r"manifest.json is damaged .* run `vipra label` again"):
            pretrain.Labels(tmp_path / "labels", begun, begun.config)


def test_an_instruction_too_long_is_refused_before_training(made, ranks, tmp_path, monkeypatch):
    write(made, tmp_path / "labels", ranks)

    class Wordy(pretrain.Labels):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.instructions[self.keys[-1]] = "杯" * 100

    monkeypatch.setattr(pretrain, "Labels", Wordy)
    plan = PretrainRecipe(
        stage="pretrain", labels=str(tmp_path / "labels"), tokenizer=str(made.tokenizer), **COMMON
    )
    with pytest.raises(TrainingError, match=r"is \d+ tokens with its prompt, the model takes 128"):
        pretrain.build(plan, ranks, None)
