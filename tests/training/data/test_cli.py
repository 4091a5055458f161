"""`vipra data` tells what a dataset holds and what is wrong with it."""

import json

import numpy as np
import pytest
from PIL import Image

from config.loading import ConfigError
from tests.training.data import made
from training.data.cli import main
from training.data.episode import DataError


def test_check_reports_what_is_there_and_what_is_broken(tmp_path, capsys):
    made.bridge(tmp_path / "bridge", 3)
    root = made.something(tmp_path / "ssv2", ["push a cup", ""])
    (root / "20bn-something-something-v2/101.webm").write_bytes(b"")
    spec = tmp_path / "mixture.yaml"
    spec.write_text(f"datasets:\n  - {{path: {tmp_path}/bridge}}\n  - {{path: {root}, stride: 2}}\n")
    assert main(["check", str(spec), "--json", str(tmp_path / "report.json"), "--every-frame"]) == 1
    bridge, ssv2 = json.loads((tmp_path / "report.json").read_text())
    assert (bridge["episodes"], bridge["frames"], bridge["lengths"]) == (3, 30, [10, 10, 10])
    assert bridge["rates_hz"] == {"5.00": 3}
    assert bridge["resolutions"] == {"image_0": {"40x32": 3}, "image_1": {"40x32": 3}}
    assert bridge["action_dimensions"] == [7]
    assert bridge["constant_action_dimensions"] == []
    assert (ssv2["episodes"], ssv2["instructions"], ssv2["uninstructed"]) == (1, 1, 0)
    assert [name for name, _ in ssv2["broken"]] == ["101"]
    assert "101.webm" in capsys.readouterr().out.replace("\n", "")


def test_mixed_rates_and_resolutions_are_counted(tmp_path):
    made.video(tmp_path / "d/a.mp4", 0, 4, rate=12, codec="libx264")
    made.video(tmp_path / "d/b.mp4", 1, 4, rate=24, codec="libx264")
    made.pictures(tmp_path / "d/c", 2, 4)
    (tmp_path / "spec.yaml").write_text(f"datasets: [{{path: {tmp_path}/d, rate_hz: 5}}]")
    assert main(["check", str(tmp_path / "spec.yaml"), "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())[0]
    assert report["rates_hz"] == {"12.00": 1, "24.00": 1, "5.00": 1}
    assert report["resolutions"] == {"video": {"80x64": 2, "40x32": 1}}


def test_constant_dimensions_are_named(tmp_path):
    made.lerobot(tmp_path / "d", 1, 5)
    import pyarrow.parquet as pq

    path = next((tmp_path / "d/data").rglob("*.parquet"))
    table = pq.read_table(path).to_pandas()
    table["action"] = [np.array([k, 1.0, *row[2:]], np.float32) for k, row in enumerate(table["action"])]
    table.to_parquet(path)
    assert main(["check", str(tmp_path / "d"), "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())[0]
    assert report["constant_action_dimensions"] == [1]
    assert report["action_names"] == list("abcdefg")


def test_preview_is_a_picture_of_the_episodes(tmp_path):
    made.bridge(tmp_path / "bridge", 3)
    arguments = ["--episodes", "2", "--frames", "4", "--size", "40", "--out", str(tmp_path / "p.png")]
    assert main(["preview", str(tmp_path / "bridge"), *arguments]) == 0
    sheet = np.asarray(Image.open(tmp_path / "p.png"))
    assert sheet.shape == (2 * 56, 4 * 40, 3)
    row = sheet[16:56].reshape(40, 4, 40, 3).transpose(1, 0, 2, 3)
    assert [made.index_of(f) for f in row] == [0, 3, 6, 9]


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        main(["check", str(tmp_path / "none")])
    (tmp_path / "bad.yaml").write_text("datasets:\n  - {path: x, wieght: 2}\n")
    with pytest.raises(ConfigError, match="wieght: unknown key"):
        main(["check", str(tmp_path / "bad.yaml")])
