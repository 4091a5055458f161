"""What we write has, field by field, the layout of what lerobot writes."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from episodes import layout
from episodes.writer import Writer
from tests.episodes import samples


@pytest.fixture(scope="module", params=["video", "images"])
def pair(request, tmp_path_factory):
    """(a dataset by lerobot, one by us with the same features)."""
    theirs, ours = samples.reference(request.param), tmp_path_factory.mktemp("layout") / "ours"
    info = json.loads((theirs / layout.INFO).read_text())
    recorded = {
        k: {n: v for n, v in info["features"][k].items() if n != "info"} for k in layout.recorded(info)
    }
    with Writer.create(ours, info["fps"], recorded, info["robot_type"]) as writer:
        rng = np.random.default_rng(0)
        for _ in range(3):
            for _ in range(4):
                values = {
                    key: rng.integers(0, 255, f["shape"], np.uint8)
                    if len(f["shape"]) == 3
                    else rng.random(f["shape"])
                    for key, f in recorded.items()
                }
                writer.add(values, "stack the cups")
            writer.save()
    return theirs, ours


def test_the_same_files_are_there(pair):
    theirs, ours = ({p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} for root in pair)
    assert ours - {".lock"} == theirs


def test_info_has_the_same_entries_in_the_same_order(pair):
    theirs, ours = (json.loads((root / layout.INFO).read_text()) for root in pair)
    assert list(ours) == list(theirs)
    assert ours["features"] == theirs["features"]
    assert list(ours["features"]) == list(theirs["features"])
    sized = ("total_frames",)
    assert {k: v for k, v in ours.items() if k not in sized} == {
        k: v for k, v in theirs.items() if k not in sized
    }


@pytest.mark.parametrize("name", ["data", "meta/episodes"])
def test_parquet_schemas_are_equal(pair, name):
    theirs, ours = (pq.ParquetFile(root / name / "chunk-000" / "file-000.parquet") for root in pair)
    assert ours.schema_arrow.names == theirs.schema_arrow.names
    for mine, other in zip(ours.schema_arrow, theirs.schema_arrow, strict=True):
        assert mine.type == other.type, mine.name
    assert ours.num_row_groups in (1, 3)
    column = ours.metadata.row_group(0).column(0)
    assert column.compression == theirs.metadata.row_group(0).column(0).compression
    metadata = [
        json.loads((f.schema_arrow.metadata or {}).get(b"huggingface", b"{}")) for f in (ours, theirs)
    ]
    assert metadata[0].get("info") == metadata[1].get("info")


def test_tasks_table_is_equal(pair):
    theirs, ours = (pd.read_parquet(root / layout.TASKS) for root in pair)
    pd.testing.assert_frame_equal(ours, theirs)


def test_statistics_have_the_same_shapes(pair):
    theirs, ours = (json.loads((root / layout.STATS).read_text()) for root in pair)
    assert set(ours) == set(theirs)
    for key, row in theirs.items():
        assert {n: np.shape(v) for n, v in ours[key].items()} == {n: np.shape(v) for n, v in row.items()}, key


def test_statistics_of_vectors_agree_with_lerobots():
    root = samples.reference("images")
    theirs = layout.stats_from_json(layout.read_json(root / layout.STATS))["action"]
    table = pq.read_table(root / "data/chunk-000/file-000.parquet").to_pandas()
    episodes = [np.stack(rows["action"]) for _, rows in table.groupby("episode_index")]
    ours = layout.merge_stats([{"action": layout.vector_stats(values)} for values in episodes])["action"]
    for name in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)
    for name in layout.STATISTICS[5:]:  # lerobot's come from a histogram
        np.testing.assert_allclose(ours[name], theirs[name], atol=0.02, err_msg=name)


def test_statistics_of_colours_are_those_of_the_pixels():
    rgb = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    stats = layout.colour_stats(layout.colour_histogram(rgb), 1)
    flat = rgb.reshape(-1, 3) / 255
    for name, expected in {
        "min": flat.min(0),
        "max": flat.max(0),
        "mean": flat.mean(0),
        "std": flat.std(0),
    }.items():
        np.testing.assert_allclose(stats[name].ravel(), expected, atol=1e-9)
    np.testing.assert_allclose(stats["q50"].ravel(), np.median(flat, axis=0), atol=1 / 255)


@pytest.mark.parametrize(
    "feature", [{"dtype": "string", "shape": [1]}, {"dtype": "float32", "shape": [2, 2]}]
)
def test_features_this_format_does_not_hold_are_refused(feature):
    with pytest.raises(layout.EpisodesError, match="gripper_map"):
        layout.new_info(10, {"gripper_map": {**feature, "names": None}}, None)
