"""Whole conversions of small files in the released byte formats, through the command, to a loaded folder.

What the converted model computes is compared with upstream's own numbers where they are at hand, and with an
independent numpy forward in the source's conventions (source_numpy.py).
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models import sequence
from models.checkpoint import CheckpointError, load
from models.convert import ConvertError, cli
from models.convert.streaming import Stream
from models.tokenizer import Tokenizer
from tests.models.convert import released
from tests.models.convert.source_numpy import Network
from tests.models.golden import folder as golden_folder

HEADS = 4
TASK = "stack the cups"
ROBOT = "franka_single"  # 8 dimensions, the last one a gripper
STATISTICS = {"mean": [0.1 * i for i in range(7)] + [0], "std": [0.5 + 0.1 * i for i in range(7)] + [1]}


@pytest.fixture(scope="module")
def beside(tmp_path_factory) -> Path:
    """A download without its weights: vqgan and tokenizer.json."""
    path = tmp_path_factory.mktemp("download")
    released.write_vqgan(path / "vqgan", released.vqgan(np.random.default_rng(0)))
    texts = [sequence.PROMPT, "<vision>", "</vision> <action>"]
    (path / "tokenizer.json").write_text(Tokenizer.train(texts, 400).to_json())
    (path / "action_stats.json").write_text(json.dumps(STATISTICS))
    return path


def run(verb: str, source: Path, out: Path, beside: Path, *more: str) -> None:
    arguments = [verb, source, out, "--vqgan", beside / "vqgan", "--tokenizer", beside / "tokenizer.json"]
    arguments += ["--image-size", "64", "--heads", HEADS, *more]
    assert cli.main([str(a) for a in arguments]) == 0


def finetuned(beside: Path) -> list[str]:
    return ["--embodiment", ROBOT, "--statistics", str(beside / "action_stats.json"), "--gripper", "signed"]


def weights(latent=None, actions=None, seed=0, **sizes) -> dict[str, np.ndarray]:
    return released.llama(np.random.default_rng(seed), latent=latent, actions=actions, **sizes)


@torch.no_grad()
def logits(policy, ids, vision, latent, positions, real) -> dict[str, np.ndarray]:
    """Our network's logits over one mixed sequence [B, T]."""
    from models.backbone import rope

    b = policy.backbone
    x = b.text_embedding(torch.where(vision, 0, ids))
    x = torch.where(vision[..., None], b.vision_embedding(torch.where(vision, ids, 0)), x)
    x = torch.where(latent[..., None], policy.latent_embedding(torch.where(latent, ids, 0)), x)
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & real[:, None, None, :] | torch.eye(length, dtype=torch.bool)
    hidden = b(x, rope(policy.config, positions), mask)
    heads = {"text": b.text_head, "vision": b.vision_head, "latent": policy.latent_head}
    return {name: head(hidden).numpy() for name, head in heads.items()}


def sequence_of(rng: np.random.Generator, length: int = 60):
    """Ids, modality masks, positions and real tokens of two rows, the second left-padded by 7."""
    kind = rng.integers(0, 3, (2, length))
    ids = rng.integers(0, 1 << 30, (2, length)) % np.array([512, 320, 9])[kind]
    real = np.arange(length)[None] >= np.array([0, 7])[:, None]
    positions = np.clip(real.cumsum(1) - 1, 0, None)
    return ids, kind == 1, kind == 2, positions, real


def assert_logits_equal_numpys(policy, network: Network, positions_from: int = 0) -> None:
    ids, vision, latent, positions, real = sequence_of(np.random.default_rng(1))
    positions = positions + positions_from
    ours = logits(policy, *map(torch.from_numpy, (ids, vision, latent, positions, real)))
    hidden = network.hidden(network.embed(ids, vision, latent), positions, real)
    for name, head in (("text", "lm_head"), ("vision", "vision_head"), ("latent", "latent_actions_head")):
        wanted = hidden @ network[f"{head}/kernel"]
        assert np.abs(ours[name] - wanted)[real].max() < 2e-5, name


@pytest.mark.parametrize(
    "file, suffix", [("streaming_params", ""), ("streaming_params_bf16", "_bf16_params")]
)
@torch.no_grad()
def test_golden_lwm_and_vqgan_make_a_folder_that_computes_upstreams_numbers(tmp_path, beside, file, suffix):
    lwm, frames = golden_folder("lwm"), golden_folder("vqgan")
    both = tmp_path / "both"
    both.mkdir()
    shutil.copy(frames / "vqgan_params.pkl", both / "vqgan")
    shutil.copy(beside / "tokenizer.json", both)
    run("lwm", lwm / file, tmp_path / "out", both)
    found = load(tmp_path / "out")
    inputs, expected = np.load(lwm / "inputs.npz"), np.load(lwm / "expected.npz")
    ids, vision, real, positions = (
        torch.from_numpy(inputs[key]).long()
        for key in ("input_ids", "vision_masks", "attention_mask", "position_ids")
    )
    nowhere = torch.zeros_like(vision, dtype=torch.bool)
    ours = logits(found.policy, ids, vision.bool(), nowhere, positions, real.bool())
    for name in ("text", "vision"):
        error = np.abs(ours[name] - expected[f"{name}_logits{suffix}"])[real.bool().numpy()]
        assert error.max() < 2e-5
    images, golden = np.load(frames / "inputs.npz")["images_uint8"], np.load(frames / "expected.npz")
    codes = found.vqgan.encode(found.vqgan.to_input(torch.from_numpy(images)))
    assert np.array_equal(codes.view(2, 16, 16).numpy(), golden["codes"])
    picture = found.vqgan.decode(codes).clamp(-1, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(picture - golden["reconstruction"]).max() < 2e-5


def test_golden_lwm_with_rope_rounded_as_upstream_does_in_bf16(tmp_path, beside):
    file = golden_folder("lwm") / "streaming_params"
    run("lwm", file, tmp_path / "o", beside, "--rope", "bf16")
    found = load(tmp_path / "o")
    assert found.config.rope_precision == "bf16"
    with Stream(file) as stream:
        source = {name: stream.read(name).numpy() for name in stream.names}
    source["transformer/late/embedding"] = found.policy.latent_embedding.weight.detach().numpy()
    source["latent_actions_head/kernel"] = found.policy.latent_head.layers[0].weight.detach().numpy().T
    assert_logits_equal_numpys(found.policy, Network(source, HEADS, precision="bf16"), positions_from=600)


def test_lwm_begins_latent_actions_at_random_and_says_so(tmp_path, beside, capsys):
    run("lwm", released.write_stream(tmp_path / "params", weights()), tmp_path / "out", beside)
    assert "begins random: latent_embedding.weight" in capsys.readouterr().out
    found = load(tmp_path / "out")
    source = json.loads((tmp_path / "out" / "source.json").read_text())
    fresh = ["latent_embedding.weight", "latent_head.layers.0.weight"]
    assert source["random"] == {"seed": 0, "tensors": fresh}
    assert 0.01 < found.policy.latent_embedding.weight.std() < 0.03
    assert found.config.rope_precision == "fp32" and found.config.action_heads == "none"


@pytest.mark.parametrize("chunk_bytes", [1 << 30, 9_000])
def test_pretrained_computes_what_numpy_does_with_the_released_rope(tmp_path, beside, chunk_bytes):
    source = weights(latent=9)
    run(
        "vipra", released.write_stream(tmp_path / "vipra_params", source, chunk_bytes), tmp_path / "o", beside
    )
    found = load(tmp_path / "o")
    assert (found.config.rope_precision, found.config.action_heads) == ("bf16", "none")
    assert found.normalizer is None and found.embodiment is None
    # far along, where rounding the angles matters most
    assert_logits_equal_numpys(found.policy, Network(source, HEADS, precision="bf16"), positions_from=600)
    with pytest.raises(AssertionError):
        assert_logits_equal_numpys(found.policy, Network(source, HEADS, precision="fp32"), positions_from=600)


def test_bf16_files_stay_bf16_and_lose_nothing(tmp_path, beside):
    source = {name: released.bf16(value) for name, value in weights(latent=9).items()}
    run("vipra", released.write_stream(tmp_path / "vipra_params", source), tmp_path / "o", beside)
    wide = {name: released.widen(value) for name, value in source.items()}
    assert_logits_equal_numpys(load(tmp_path / "o").policy, Network(wide, HEADS, precision="bf16"))
    size = sum(value.nbytes for value in source.values())
    shards = sum(path.stat().st_size for path in (tmp_path / "o").glob("model-*"))
    assert size < shards < 1.1 * size


def test_finetuned_draws_the_chunk_that_numpy_draws_in_ten_steps(tmp_path, beside, capsys):
    source = weights(latent=9, actions=8)
    run(
        "vipra",
        released.train_state(tmp_path / "streaming_train_state", source),
        tmp_path / "o",
        beside,
        *finetuned(beside),
        "--image-size",
        "32",  # 8 x 8 tokens a frame: numpy is slow
    )
    assert "ignored, not weights: opt_state" in capsys.readouterr().out
    found = load(tmp_path / "o", serving=True)
    config, policy, words = found.config, found.policy, found.tokenizer
    assert (config.action_heads, config.time_embedding, config.horizon) == ("flow", "official", 14)
    rng = np.random.default_rng(2)
    codes = torch.from_numpy(rng.integers(0, 256, (1, 2, 64)))
    noise = rng.standard_normal((1, 14, 8)).astype(np.float32)
    text, bridge = sequence.encode_prompt(words, TASK), sequence.encode_bridge(words)
    cache = policy.new_cache(1, bridge)
    ours = policy.sample([policy.encode_text(text)], codes, torch.from_numpy(noise), cache, bridge)

    frames = [*codes[0, 0].tolist(), 256, *codes[0, 1].tolist(), 257]
    ids = np.array([text + frames + list(bridge)])
    vision = np.array([[False] * len(text) + [True] * len(frames) + [False] * len(bridge)])
    network = Network(source, HEADS, precision="bf16")
    wanted = network.sample(network.embed(ids, vision), noise)
    assert np.abs(wanted - noise).max() > 0.5  # the network did something
    assert np.abs(ours.numpy() - wanted).max() < 1e-4

    actions = found.normalizer.denormalize(np.zeros((14, 8), np.float32))[0]
    assert np.allclose(actions[:7], STATISTICS["mean"][:7], atol=1e-6) and actions[7] == 0.5
    assert found.normalizer.scale[:7] == tuple(STATISTICS["std"][:7])


def test_chunks_prefix_and_optimiser_change_nothing_in_the_folder(tmp_path, beside):
    source = weights(latent=9, actions=8)
    files = [
        released.write_stream(tmp_path / "a", source),
        released.write_stream(tmp_path / "b", source, 5_000),
        released.train_state(tmp_path / "c", source, 5_000),
    ]
    folders = []
    for file in files:
        folders.append(tmp_path / f"out_{file.name}")
        run("vipra", file, folders[-1], beside, *finetuned(beside))
    for name in sorted(path.name for path in folders[0].iterdir()):
        if name not in ("source.json", "manifest.json"):
            assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    source = json.loads((folders[2] / "source.json").read_text())
    assert source["ignored"] == {"opt_state": 2 * len(weights(latent=9, actions=8)) + 1, "step": 1}
    assert source["files"]["c"]["bytes"] == files[2].stat().st_size


def test_pretrained_is_not_served_and_the_error_names_the_way(tmp_path, beside):
    from policy_server.engine import Engine

    run("vipra", released.write_stream(tmp_path / "p", weights(latent=9)), tmp_path / "o", beside)
    with pytest.raises(CheckpointError, match="vipra train finetune"):
        Engine(load(tmp_path / "o", serving=True))


def test_every_tensor_is_accounted_for_in_one_error(tmp_path, beside):
    def case(change, message, verb="vipra", more=(), **heads):
        arrays = weights(**({"latent": 9} | heads))
        change(arrays)
        with pytest.raises(ConvertError, match=message):
            run(verb, released.write_stream(tmp_path / "s", arrays), tmp_path / "o", beside, *more)
        assert not (tmp_path / "o").exists()

    def swap(arrays):
        arrays["transformer/extra"] = arrays.pop("transformer/ln_f/kernel")
        arrays["proprio_encoder/kernel"] = arrays.pop("lm_head/kernel")

    case(swap, r"unknown tensors \['proprio.*extra'\]; missing tensors \['lm_head/kernel', 'transformer/ln_f")
    stack = "transformer/h/scan_decoder/"
    cut = f"{stack}attention/wk/kernel"
    case(lambda a: a.update({cut: a[cut][:, :, :32]}), r"\(64, 32\).* do not make backbone.layers.0.qkv")
    case(lambda a: a.update({cut: a[cut][:2]}), "expected 3 layers")
    norm = f"{stack}ffn_norm/kernel"
    case(lambda a: a.update({norm: np.full_like(a[norm], np.nan)}), r"ffn_norm.*layer 0.*NaN")
    case(lambda a: None, "finetuned for 8 action dimensions: name the robot", actions=8)
    case(lambda a: None, "finetuned for 7", more=finetuned(beside), actions=7)
    case(lambda a: None, "no action heads: leave --embodiment", more=finetuned(beside))
    case(lambda a: a.pop("action_head/bias"), "missing tensors", more=finetuned(beside), actions=8)
    case(lambda a: None, "is a ViPRA file: use `vipra convert vipra`", verb="lwm")
    case(lambda a: a.pop("transformer/late/embedding"), "is an LWM file: use `vipra convert lwm`")
    case(lambda a: a.pop("transformer/wte/embedding"), "not an LWM or ViPRA file")


def test_statistics_that_do_not_fit_are_refused(tmp_path, beside):
    file = released.write_stream(tmp_path / "s", weights(latent=9, actions=8))
    for content, message in (
        ("{", "Expecting"),
        ("[]", "expected"),
        (json.dumps({"mean": [0.0] * 8}), "expected"),
        (json.dumps(STATISTICS | {"std": [1.0] * 7}), "std must hold 8 finite numbers"),
        (json.dumps(STATISTICS | {"std": [0.0] * 8}), "scale must be positive"),
        (json.dumps(STATISTICS | {"mask": [True] * 8}), r"unknown keys \['mask'\]"),
    ):
        (tmp_path / "stats.json").write_text(content)
        with pytest.raises(ConvertError, match=message):
            run(
                "vipra",
                file,
                tmp_path / "o",
                beside,
                "--embodiment",
                ROBOT,
                "--statistics",
                str(tmp_path / "stats.json"),
            )


def test_our_own_normalization_is_taken_as_it_is(tmp_path, beside):
    file = released.write_stream(tmp_path / "s", weights(latent=9, actions=8))
    run("vipra", file, tmp_path / "a", beside, *finetuned(beside))
    ours = str(tmp_path / "a" / "normalization.json")
    run("vipra", file, tmp_path / "b", beside, "--embodiment", ROBOT, "--statistics", ours)
    assert load(tmp_path / "a").normalizer == load(tmp_path / "b").normalizer


SHARD = 40_000


def convert(source: Path, out: Path, beside: Path, progress=None) -> str:
    return cli.convert(
        "vipra",
        source,
        out,
        beside / "vqgan",
        beside / "tokenizer.json",
        heads=HEADS,
        image_size=64,
        shard_bytes=SHARD,
        progress=progress,
    )[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KILLED = """
import os, sys
from pathlib import Path
from tests.models.convert.test_convert import convert
source, out, beside = map(Path, sys.argv[1:])
def progress(stage, done, total):
    if stage == "writing checkpoint" and done > 300_000:
        os._exit(9)
convert(source, out, beside, progress)
"""


def test_a_killed_conversion_goes_on_at_its_next_shard_to_the_same_bytes(tmp_path, beside):
    source = released.write_stream(tmp_path / "s", weights(latent=9))
    convert(source, tmp_path / "whole", beside)
    command = [sys.executable, "-c", KILLED, source, tmp_path / "out", beside]
    killed = subprocess.run(command, cwd=Path(__file__).parents[3], check=False, timeout=280)
    assert killed.returncode == 9 and not (tmp_path / "out").exists()
    partial = tmp_path / "out.partial"
    finished = json.loads((partial / "resume.json").read_text())["files"]
    assert 3 < len(finished) < len(list((tmp_path / "whole").glob("model-*")))
    first, second, *_ = sorted(finished)
    data = bytearray((partial / first).read_bytes())
    data[-1] ^= 1  # a finished shard that went bad meanwhile
    (partial / first).write_bytes(data)
    times = {name: (partial / name).stat().st_mtime_ns for name in finished}
    convert(source, tmp_path / "out", beside)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    kept = (tmp_path / "out" / second).stat().st_mtime_ns
    assert kept == times[second] and (tmp_path / "out" / first).stat().st_mtime_ns != times[first]
    assert not partial.exists()


def test_what_was_begun_from_another_file_is_not_continued(tmp_path, beside):
    def stop(stage, done, total):
        if stage == "writing checkpoint" and done > 300_000:
            raise KeyboardInterrupt

    a = released.write_stream(tmp_path / "a", weights(latent=9))
    b = released.write_stream(tmp_path / "b", weights(latent=9, seed=1))
    with pytest.raises(KeyboardInterrupt):
        convert(a, tmp_path / "out", beside, stop)
    convert(b, tmp_path / "out", beside)
    convert(b, tmp_path / "whole", beside)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_disk_that_fills_up_keeps_what_is_finished(tmp_path, beside, monkeypatch):
    import errno
    import os

    source = released.write_stream(tmp_path / "s", weights(latent=9))
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"GiB more.*finished shards are kept, run the same command again"
    ):
        convert(source, tmp_path / "out", beside)
    monkeypatch.undo()
    assert len(json.loads((tmp_path / "out.partial" / "resume.json").read_text())["files"]) == 3
    convert(source, tmp_path / "out", beside)
    convert(source, tmp_path / "whole", beside)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


MEASURE = """
import sys
from pathlib import Path
from models.convert import cli
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
def convert(source, out):
    beside = Path(sys.argv[3])
    cli.convert("vipra", source, out, beside / "vqgan", beside / "tokenizer.json", heads=4, image_size=64)
convert(Path(sys.argv[1]), Path(sys.argv[4]) / "warm")  # so that imports and buffers are there
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
convert(Path(sys.argv[2]), Path(sys.argv[4]) / "out")
print(memory("VmHWM") - before)
"""


def test_memory_stays_below_the_largest_tensor_of_the_file(tmp_path, beside):
    """Required: 1.3 x the largest tensor and the shard being written. A stacked tensor of the 7B model has
    2.9 GB; here it has 12 MB in a file of 55 MB, cut into chunks of 5 MB (measured: 3 MB).
    """
    small = released.write_stream(tmp_path / "small", weights(latent=9))
    arrays = weights(latent=9, hidden=256, mlp=768, layers=32)
    arrays = {name: released.bf16(value) for name, value in arrays.items()}
    largest = max(value.nbytes for value in arrays.values())
    big = released.write_stream(tmp_path / "big", arrays, chunk_bytes=5 << 20)
    assert largest > 12e6 and big.stat().st_size > 4 * largest
    command = [sys.executable, "-c", MEASURE, small, big, beside, tmp_path]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parents[3], check=True, timeout=280, capture_output=True, text=True
        )
    except subprocess.CalledProcessError as error:
        if "clear_refs" in error.stderr:
            pytest.skip("this machine does not let a process reset its peak memory")
        raise
    assert int(done.stdout.split()[-1]) < 1.3 * largest
    load(tmp_path / "out")


def test_a_downloaded_folder_is_enough(tmp_path, beside):
    for name, verb, arrays in (("params", "lwm", weights()), ("vipra_params", "vipra", weights(latent=9))):
        download = tmp_path / name
        shutil.copytree(beside, download)
        released.write_stream(download / name, arrays)
        out = tmp_path / f"out_{name}"
        assert cli.main([verb, str(download), str(out), "--heads", "4", "--image-size", "64"]) == 0
        assert load(out).config.layers == 3
    with pytest.raises(ConvertError, match=r"no file \(params, streaming_params\)"):
        cli.main(["lwm", str(beside), str(tmp_path / "o")])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        cli.main(["lwm", str(tmp_path / "params"), str(tmp_path / "thesis")])
    (tmp_path / "params" / "vqgan").unlink()
    with pytest.raises(ConvertError, match=r"no file \(vqgan\): name the file with --vqgan"):
        cli.main(["lwm", str(tmp_path / "params"), str(tmp_path / "o")])


def test_a_frame_tokenizer_alone_serves_training_and_holds_no_policy(tmp_path, beside):
    assert cli.main(["vqgan", str(beside), str(tmp_path / "frames"), "--image-size", "64"]) == 0
    with pytest.raises(CheckpointError, match="a frame tokenizer and no policy"):
        load(tmp_path / "frames")
    from models.checkpoint import read_config
    from models.folder import fill
    from models.vqgan import VQGAN

    model = VQGAN(read_config(tmp_path / "frames").vqgan)
    fill(model, [tmp_path / "frames" / "vqgan.safetensors"])
    assert model.encode(model.to_input(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))).shape == (1, 256)


def test_help_names_the_released_files(capsys):
    for arguments in (["--help"], ["lwm", "--help"], ["vipra", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        shown = capsys.readouterr().out
        for name in (
            "LargeWorldModel/LWM-Chat-1M-Jax",
            "params",
            "vqgan",
            "tokenizer.model",
            "vipra-project/vipra-7b-pretrained",
            "vipra_params",
            "streaming_train_state",
            "vipra-project/vipra-laq",
        ):
            assert name in shown
