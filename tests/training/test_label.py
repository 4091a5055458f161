"""`vipra label` leaves out what the other stages leave out, and begins nothing that it cannot finish."""

import dataclasses
import json
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from config.dataset import Mixture
from config.training import TokenizerRecipe
from models.config import SIZES, VQGANConfig
from models.latent_action import config as latent_config
from models.latent_action import folder as latent_folder
from models.latent_action.model import LatentActionModel
from models.vqgan import VQGAN
from tests.training.data import made
from training import distributed, label, start
from training.data.episode import DataError
from training.tokenizer import TokenizerStage, vocabulary

SMALL = dataclasses.replace(
    SIZES["vipra_tiny"], name="small", hidden=32, mlp_hidden=64, layers=1, heads=2, vision_vocab=66,
    vqgan=VQGANConfig(16, (8, 8, 16), 1, 8, 64, norm_groups=4), horizon=3,
)  # fmt: skip


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(options of the mixture, options of its dataset) -> the folder of labels of TMP_PATH/data."""
    monkeypatch.setitem(SIZES, "small", SMALL)
    monkeypatch.setattr(start, "SIZES", SIZES)
    torch.manual_seed(0)
    latent_folder.save(tmp_path / "latent", LatentActionModel(latent_config.SIZES["laq_tiny"]))
    fields = {"steps": 1, "global_batch": 1, "micro_batch": 1, "optimizer": {"learning_rate": 1}}
    plan = TokenizerRecipe(stage="tokenizer", model="small", validation={"every": 1}, **fields)
    stage = TokenizerStage(plan, VQGAN(SMALL.vqgan), torch.ones(1, 16, 16))
    stage.words = vocabulary(["move"], SMALL.text_vocab)
    stage.export(tmp_path / "tokenizer", SimpleNamespace(last=dict), SimpleNamespace(first=True))
    ranks = distributed.start("cpu")

    def call(mixture=(), **options):
        data = Mixture(datasets=[{"path": str(tmp_path / "data"), "rate_hz": 5, **options}], **dict(mixture))
        out = tmp_path / "labels"
        label.label(data, tmp_path / "latent", tmp_path / "tokenizer", out, 3, 2, 4, ranks, lambda _: None)
        return out

    yield call
    distributed.stop()


def test_nothing_is_begun_that_cannot_be_finished(write, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="no dataset found"):
        write()
    options = {"latent": "latent", "tokenizer": "tokenizer", "data": "data", "out": "labels"}
    line = [word for name, path in options.items() for word in (f"--{name}", str(tmp_path / path))]
    for option in ("--episodes-per-shard", "--batch", "--horizon"):
        assert label.main([*line, option, "0"]) == 2
        assert f"Invalid value for '{option}'" in capsys.readouterr().err
    assert not (tmp_path / "labels").exists()


def test_left_out_episodes_are_not_labelled(write, tmp_path):
    for number in range(3):
        made.pictures(tmp_path / f"data/episode_{number}", number, 3)
    (tmp_path / "data/episode_1/instruction.txt").write_text("move")
    out = write({"validation_share": 0.4}, instructed_only=True)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["keys"] == [[f"episode_{i}" for i in range(3)]] and manifest["validation_share"] == 0.4
    assert manifest["skipped"] == [[f"0/episode_{i}", f"episode_{i}: has no instruction"] for i in (0, 2)]
    keys = [key for path in sorted(out.glob("*.parquet")) for key in pq.read_table(path)["key"].to_pylist()]
    assert keys == ["0/episode_1"] * 3
