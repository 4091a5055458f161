"""Each script runs at its smallest and writes the rows it promises. No time is judged."""

import contextlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import accuracy, batching, chunk_latency, device, gpu, kv_cache, startup

FAST = ["--device", "cpu", "--repeats", "1"]
HEADER = {"benchmark", "date", "commit", "device", "cores", "threads", "load_1min", "torch", "rows"}


def result(script, folder, *options) -> dict:
    path = folder / "result.json"
    assert script.main([*FAST, *options, "--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def chunks(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("chunks")
    return result(chunk_latency, folder, "--dims", "7", "--prompts", "20", "60")


def test_chunk_latency_has_a_row_for_every_variant_and_says_why_one_is_empty(chunks):
    assert set(chunks) >= HEADER
    rows = {(row["variant"], row["prompt_tokens"]): row for row in chunks["rows"]}
    assert set(rows) == {(variant, prompt) for variant in chunk_latency.VARIANTS for prompt in (20, 60)}
    for (variant, _), row in rows.items():
        assert set(row) >= set(chunk_latency.TITLES) and row["action_dim"] == 7
        if variant in ("graph", "fp8", "fp8_prefetch"):
            assert row["skipped"] and row["p50_ms"] is None
        else:
            assert 0 < row["p50_ms"] <= row["p99_ms"] and row["floor_ms"] > 0
            assert row["of_floor"] == pytest.approx(row["p50_ms"] / row["floor_ms"])
            stages = row["encode_ms"] + row["prefill_ms"] + row["integrate_ms"]
            assert 0 < stages <= row["p99_ms"] + 0.1


def test_every_way_computes_the_same_actions(chunks):
    differences = [row["difference"] for row in chunks["rows"] if "skipped" not in row]
    assert len(differences) == 12 and max(differences) <= chunk_latency.TOLERANCE
    assert any(difference > 0 for difference in differences)  # they are different computations


def test_a_way_that_computes_something_else_is_an_error(monkeypatch, tmp_path):
    true = chunk_latency.growing
    monkeypatch.setattr(chunk_latency, "growing", lambda prompt: lambda *given: true(prompt)(*given) + 2e-4)
    with pytest.raises(RuntimeError, match="growing differs from eager by 2"):
        result(chunk_latency, tmp_path, "--dims", "7", "--prompts", "20")


def test_batching_has_a_row_a_batch_size(tmp_path):
    report = result(batching, tmp_path, "--batch", "1", "3")
    assert set(report) >= HEADER
    eager = [row for row in report["rows"] if row["variant"] == "eager"]
    assert [row["batch"] for row in eager] == [1, 3]
    assert all(set(row) == set(batching.TITLES) and row["chunks_per_s"] > 0 for row in eager)
    assert {row["variant"] for row in report["rows"] if "skipped" in row} == {"graph", "fp8"}


def test_device_reports_rates_and_floors(tmp_path):
    path = tmp_path / "device.json"
    assert device.main([*FAST, "--batch", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["bandwidth_bytes_per_s"] > 0 and report["missing"] == {}
    assert {row["rows"] for row in report["matmul"]} == {14, 85, 150}
    assert all(row["tflop_per_s"] > 0 for row in report["matmul"])
    for row in report["floors"]:
        parts = row["encode_ms"] + row["prefill_ms"] + row["integrate_ms"]
        assert row["floor_ms"] == pytest.approx(parts) and parts > 0


def test_accuracy_ranks_the_precisions(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "TRAINED", accuracy.TRAINED[:1])
    report = result(accuracy, tmp_path)
    error = {(row["weights"], row["compared"]): row["relative"] for row in report["rows"]}
    for name in accuracy.TRAINED:
        assert 0 < error[name, "bf16 against fp32"] < error[name, "fp8 against fp32"] < 1
    assert 0 < error["random tiny", "fp8 against fp32"] < 1


def test_startup_loads_what_it_wrote_with_and_without_fp8(tmp_path):
    report = result(startup, tmp_path, "--folder", str(tmp_path / "checkpoint"))
    plain, small = report["rows"]
    assert (plain["quantization"], small["quantization"]) == ("none", "fp8")
    assert all(row["load_s"] > 0 and row["host_gib"] > 0 for row in report["rows"])
    assert 0 < small["weights_gib"] < plain["weights_gib"]


def test_kv_cache_gives_equal_actions(tmp_path, monkeypatch):
    monkeypatch.setitem(kv_cache.ROWS, "tiny", ((20, 64),))
    (row,) = result(kv_cache, tmp_path)["rows"]
    assert row["max_difference"] < 1e-5 and row["ratio"] > 0 and row["prefix_tokens"] == 156


def test_the_gpu_command_runs_its_steps_once_and_sums_up(tmp_path, capfd):
    options = ["--out", str(tmp_path), "--model", "tiny", "--device", "cpu", "--repeats", "1"]
    assert gpu.main([*options, "--only", "device"]) == 0
    first = (tmp_path / "device.json").stat().st_mtime_ns
    assert gpu.main([*options, "--only", "device", "fleet_fp8"]) == 0
    assert (tmp_path / "device.json").stat().st_mtime_ns == first
    said = capfd.readouterr().out
    assert "device: done in" in said and "device: done before" in said and "fleet_fp8: skipped" in said
    text = (tmp_path / "summary.md").read_text()
    assert "| chunk p50, bf16, ms | 50 | - | - |" in text and "## device" in text


def test_the_gpu_command_reports_a_failed_step_and_the_time_that_is_left(tmp_path, monkeypatch, capfd):
    broken = gpu.Step("device", "json.tool", 60)  # knows none of the options
    monkeypatch.setattr(gpu, "STEPS", (broken, gpu.Step("batching", "benchmarks.batching", 60)))
    options = ["--out", str(tmp_path), "--model", "tiny", "--device", "cpu"]
    assert gpu.main([*options, "--only", "device"]) == 1
    assert "device: failed with status 2" in capfd.readouterr().out
    assert gpu.main([*options, "--only", "batching", "--minutes", "0"]) == 1
    assert "batching: out of time: run this command again" in capfd.readouterr().out


def test_on_a_gpu_no_step_starts_that_might_not_end_in_time(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "STEPS", (gpu.Step("device", "benchmarks.device", 121),))
    assert gpu.main(["--out", str(tmp_path), "--minutes", "2"]) == 1
    assert "device: out of time: run this command again" in capfd.readouterr().out


def test_a_step_that_is_stopped_takes_along_what_it_started(tmp_path, monkeypatch):
    child = tmp_path / "child"
    code = f"sleep 60 & echo $! > {child}; wait"
    monkeypatch.setattr(gpu, "command", lambda *_: ["sh", "-c", code])
    arguments = SimpleNamespace(out=tmp_path)
    assert gpu.run(gpu.STEPS[1], arguments, 2.0, tmp_path / "site") == "stopped after 2 s"
    state = Path(f"/proc/{child.read_text().strip()}/stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # gone
        for _ in range(500):
            if state.read_text().rpartition(")")[2].split()[0] == "Z":  # waits to be reaped
                return
            time.sleep(0.02)
        raise AssertionError("the child of a stopped step still runs")


def test_targets_are_read_from_results():
    rows = [
        {
            "variant": "graph",
            "prompt_tokens": 60,
            "action_dim": 8,
            "p50_ms": 40.0,
            "p99_ms": 42.0,
            "floor_ms": 38.0,
        }
    ]
    found = gpu.targets({"chunk_latency": {"rows": rows}, "fleet": {"largest_fleet": 17}})
    measured = {row["what"]: row["measured"] for row in found}
    assert measured["chunk p50, bf16, ms"] == 40.0 and measured["p99 / p50, bf16"] == pytest.approx(1.05)
    assert measured["robots at 22 Hz, 7/14, p99 at most 280 ms, bf16"] == 17
    assert measured["chunk p50, fp8, ms"] is None and measured["GPU memory, bf16, batch 1, GiB"] is None
