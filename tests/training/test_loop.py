"""A run can be killed, stopped, moved to more ranks, and lose its disk, without losing its numbers."""

import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer

from tests.training import replicated
from training import cli, distributed
from training.run import Run, TrainingError, read_config

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
spec = importlib.util.spec_from_file_location("toy", HERE / "toy.py")
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def script(*arguments, ranks: int = 1) -> subprocess.CompletedProcess:
    head = [sys.executable]
    if ranks > 1:
        head += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*head, str(HERE / "toy.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=ROOT)


def losses(folder: Path) -> dict[int, float]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """20 undisturbed steps on one rank: (weights, loss by step)."""
    folder = tmp_path_factory.mktemp("reference")
    torch.set_num_threads(1)
    _, weights = toy.run(folder, 20, toy.Toy())
    return weights, losses(folder)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.live
def test_a_run_killed_and_restarted_ends_bitwise_where_an_undisturbed_one_does(reference, tmp_path):
    killed = script(tmp_path, 20, 13)
    assert killed.returncode == -9, killed.stderr
    assert max(losses(tmp_path)) == 12
    finished, weights = toy.run(tmp_path, 20, toy.Toy())
    assert finished and same(weights, reference[0])
    assert losses(tmp_path) == reference[1]


@pytest.mark.live
def test_two_ranks_follow_the_same_curve_and_continue_a_run_of_one(reference, tmp_path, monkeypatch):
    toy.run(tmp_path, 20, toy.Toy(stop_at=10))
    latent = tmp_path / "latent"
    with toy.started() as ranks:
        once = replicated.run(tmp_path / "once", ranks)
        replicated.run(latent, ranks, stop_at=3)  # between two refreshes of the codebook
    monkeypatch.setenv("LATENT", str(latent))
    done = script(tmp_path, 20, ranks=2)
    assert done.returncode == 0, done.stderr
    curve = losses(tmp_path)
    assert curve.keys() == reference[1].keys()
    assert all(abs(curve[k] - v) <= 1e-4 * abs(v) for k, v in reference[1].items())
    skipped = json.loads((tmp_path / "skipped.json").read_text())  # 10 before, then 10 of rank 1
    assert {line["episode"]: line["times"] for line in skipped} == {"0/torn": 20, "0/lost": 1}
    assert "20 x 0/torn: cut off" in done.stderr and " 1 x 0/lost: no such file" in done.stderr
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.allclose(weights[name], w, atol=1e-5) for name, w in reference[0].items())

    # replicated: gradients averaged, codes counted on all ranks and refreshed alike
    weights = torch.load(latent / "weights.pt", weights_only=True)
    assert all(torch.allclose(weights[name], w, atol=1e-4) for name, w in once.items())
    lines = [json.loads(line) for line in (latent / "metrics.jsonl").read_text().splitlines()]
    replaced = {line["step"]: line["codes_replaced"] for line in lines if "codes_replaced" in line}
    assert replaced.keys() == {2, 4} and min(replaced.values()) > 0


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_from_there(reference, tmp_path, capfd):
    finished, _ = toy.run(tmp_path, 20, toy.Toy(stop_at=7))
    assert not finished
    said = "".join(capfd.readouterr().err.split())
    assert f"stoppedbySIGTERMafterstep7:thesamecommandwith--run{tmp_path}goeson" in said
    assert "7x0/torn" in said
    assert [step for step, _ in distributed.checkpoints(tmp_path / "checkpoints")] == [5, 7]
    _, weights = toy.run(tmp_path, 20, toy.Toy())
    assert same(weights, reference[0])


def test_a_stopped_command_exits_with_the_signals_status_and_writes_no_result(tmp_path):
    stage = toy.Toy(stop_at=3)
    stage.samples = toy.Samples
    module = SimpleNamespace(build=lambda *_: stage)
    plan = toy.recipe(20, data={"datasets": [{"path": "unused"}]})
    options = {"dry_run": False, "device": "cpu", "run": tmp_path / "run", "wandb": False}
    with pytest.raises(typer.Exit) as stopped:
        cli.execute(plan, module, tmp_path / "out", options)
    assert stopped.value.exit_code == 143 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["pretrain pretrain_paper", "finetune finetune_lora"])
def test_a_7b_run_is_planned_without_any_folder(command, capsys):
    """Adapters on a bf16 backbone fit a 24 GB card; all weights and AdamW's moments do not."""
    planned = [*command.split(), "--dry-run", "--gpu-memory", "24", "--gpu-tflops", "165"]
    status = cli.main(planned)
    shown = capsys.readouterr().out
    assert status == (0 if "lora" in command else 1)
    assert ("DOES NOT FIT" in shown) == ("lora" not in command)
    parameters = float(re.search(r"parameters\D+([\d,.]+) M", shown)[1].replace(",", ""))
    assert 6.7e3 < parameters < 7.0e3


def test_a_stage_under_autocast_is_planned_too(capsys):
    assert cli.main(["latent", "latent_sim", "--dry-run", "--gpu-memory", "24", "--gpu-tflops", "165"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"activations\W+[\d.]+ GiB", shown) and "Not counted" not in shown


def test_the_papers_latent_model_fits_its_gpus_before_what_is_not_counted(capsys):
    eight = ["--dry-run", "--gpus", "8", "--gpu-memory", "80", "--gpu-tflops", "989"]
    assert cli.main(["latent", "latent_paper", *eight]) == 0
    assert "Not counted, in memory or time: LPIPS, RAFT." in capsys.readouterr().out


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_full_disk_leaves_the_previous_checkpoint_loadable(log_every, reference, tmp_path):
    toy.run(tmp_path, 20, toy.Toy(stop_at=5))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fills(toy.Toy):
        def after_step(self, step, ranks):
            if step == 9:  # from here on no file may grow past 3 kB, the log not at all
                full = (tmp_path / "metrics.jsonl").stat().st_size if log_every == 1 else 3000
                resource.setrlimit(resource.RLIMIT_FSIZE, (full, hard))
            return {}

    file = "metrics.jsonl" if log_every == 1 else "step-00000010"  # its weights' shard is larger
    try:
        with pytest.raises(TrainingError, match=rf"{file} was not written .*step-00000005 is intact"):
            toy.run(tmp_path, 20, Fills(), log_every=log_every)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    _, weights = toy.run(tmp_path, 20, toy.Toy(), log_every=1)
    assert same(weights, reference[0])


def test_another_configuration_is_refused_in_the_same_folder(tmp_path):
    toy.run(tmp_path, 2, toy.Toy())
    with pytest.raises(TrainingError, match="global_batch 8, now it is 16"):
        toy.run(tmp_path, 2, toy.Toy(), global_batch=16)


def test_later_weights_are_not_exported_as_those_of_fewer_steps(tmp_path):
    toy.run(tmp_path, 4, toy.Toy())
    assert toy.run(tmp_path, 4, toy.Toy())[0], "the same again is finished"
    with pytest.raises(TrainingError, match=r"already at step 4, 2 are asked for: .* or steps=4 or more"):
        toy.run(tmp_path, 2, toy.Toy())


def test_a_start_that_failed_can_be_corrected_in_the_same_folder(tmp_path):
    for batch in (8, 16):
        Run(tmp_path, toy.recipe(2, global_batch=batch)).close()
    assert read_config(tmp_path)["global_batch"] == 16


def test_a_device_that_is_none_does_not_train_on_the_cpu(capsys):
    assert cli.main(["latent", "latent_tiny", "--device", "gpu"]) == 2
    assert "gpu" in capsys.readouterr().err
    with pytest.raises(TrainingError, match="--device gpu: choose auto, cpu or cuda"):
        distributed.start("gpu")


def test_data_is_a_folder_or_a_mixture_by_name(tmp_path):
    chosen = cli.resolve("latent", "latent_paper", None, ["vipra_pretrain", str(tmp_path)]).data
    assert [d.weight for d in chosen.datasets] == [198, 87, 25.4, 85.6, 1] and chosen.validation_share == 0.01
    assert cli.resolve("latent", "latent_paper", None, [str(tmp_path)]).data.validation_share == 0.1


def test_pretraining_without_labels_says_so(tmp_path):
    with pytest.raises(TrainingError, match="give --labels FOLDER"):
        cli.main(["pretrain", "pretrain_tiny", "--out", str(tmp_path), "--run", str(tmp_path / "run")])


def test_a_batch_that_ranks_cannot_share_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="micro_batch"):
        toy.train(toy.Toy(), toy.recipe(1), None, distributed.Ranks(0, 3, torch.device("cpu"), None), None)


def test_weights_and_biases_gets_the_run_where_it_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is optional: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = Run(tmp_path, toy.recipe(2), wandb=True)
    run.log(1, {"loss": 0.5, "samples_per_s": 1.0})
    run.picture(1, "frame", np.zeros((8, 8, 3), np.uint8))
    run.close()
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert written.stat().st_size > 0


def test_weights_and_biases_is_asked_for_by_name_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(TrainingError, match="pip install wandb"):
        Run(tmp_path, toy.recipe(2), wandb=True)
