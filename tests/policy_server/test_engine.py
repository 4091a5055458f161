from pathlib import Path

import numpy as np
import pytest
import torch

from config.embodiment import Embodiment
from config.loading import ConfigError, load
from config.policy import Policy as PolicyConfig
from models import checkpoint as checkpoints
from models import fp8
from models.bins import fit as fit_bins
from models.checkpoint import CheckpointError
from models.normalization import fit, unfitted
from models.sequence import PROMPT
from models.tokenizer import Tokenizer
from policy_server.engine import CACHED_TASKS, FRAMES_PER_ROW, Engine, EngineError
from policy_server.scheduler import DeviceFailed, Request
from tests.models.sizes import small

ROOT = Path(__file__).resolve().parents[2]
TASK = "stack the red cup on the blue cup"


def write(folder: Path, normalizer=None, embodiment="franka_bimanual", bins=None, **choices) -> Path:
    """A small random checkpoint for two arms."""
    space = load(Embodiment, embodiment)
    config = small(action_dim=space.action_dim, horizon=space.horizon, **choices)
    kinds = tuple(dimension.kind for dimension in space.dimensions)
    normalizer = normalizer or unfitted(space.names, kinds, config.representation)
    tokenizer = Tokenizer.train([PROMPT.format(task=TASK), "<vision>", "</vision> <action>"], 300)
    text = (ROOT / "config" / "embodiments" / f"{embodiment}.yaml").read_text()
    parts = (None, None) if config.action_heads == "none" else (normalizer, text)
    checkpoints.init_checkpoint(config, folder, tokenizer, *parts, bins=bins)
    return folder


def start(folder: Path, **choices) -> Engine:
    return Engine.from_policy(PolicyConfig(checkpoint=str(folder), device="cpu", **choices))


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    return start(write(tmp_path_factory.mktemp("checkpoint") / "small"))


def frames(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


def test_metadata_describes_checkpoint_and_embodiment(engine):
    space, about = load(Embodiment, "franka_bimanual"), engine.metadata
    assert about.action_names == space.names and about.units == tuple(d.unit for d in space.dimensions)
    assert (about.action_dim, about.horizon, about.rate_hz) == (16, 14, 15.0)
    assert about.history_seconds == space.history_seconds and about.image_size == (16, 16)
    assert about.model == "small" and len(about.checkpoint) == 64 and not about.needs_state
    assert about.limits.action_low[7] == 0 and about.limits.action_high[7] == 1


def test_a_chunk_is_in_units_and_within_limits(engine):
    assert engine.warm_up() > 0
    (result,) = engine.infer([Request(frames(), TASK, seed=3)])
    assert result.actions.shape == (14, 16) and result.actions.dtype == np.float32
    limits = engine.metadata.limits
    assert (result.actions >= np.float32(limits.action_low)).all()
    assert (result.actions <= np.float32(limits.action_high)).all()
    assert set(result.timing) == {"encode", "prefill", "integrate"}
    assert all(ms > 0 for ms in result.timing.values())


def test_same_request_same_chunk_alone_or_in_a_batch(engine):
    requests = [Request(frames(i), TASK if i % 2 else "fold the cloth neatly", seed=10 + i) for i in range(4)]
    alone = [engine.infer([request])[0].actions for request in requests]
    again = [engine.infer([request])[0].actions for request in requests]
    for order in ([0, 1, 2, 3], [3, 1], [2, 2, 0]):
        for i, result in zip(order, engine.infer([requests[i] for i in order]), strict=True):
            np.testing.assert_allclose(result.actions, alone[i], atol=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(alone, again, strict=True))


def test_seed_frames_and_task_each_change_the_chunk(engine):
    base = engine.infer([Request(frames(), TASK, seed=1)])[0].actions
    for other in (
        Request(frames(), TASK, seed=2),
        Request(frames(5), TASK, seed=1),
        Request(frames(), "fold the cloth", seed=1),
    ):
        assert np.abs(engine.infer([other])[0].actions - base).max() > 1e-6


def test_engine_is_vqgan_plus_uncached_sampler(engine):
    """Against the parts used directly: pixels, codes, prompt ids, noise, network, statistics."""
    from models import sequence

    request = Request(frames(4), TASK, seed=7)
    with torch.inference_mode():
        vqgan = engine.runner.vqgan
        codes = vqgan.encode(vqgan.to_input(torch.from_numpy(request.images)))
    noise = torch.randn(14, 16, generator=torch.Generator().manual_seed(7))
    ids = sequence.encode_prompt(engine.tokenizer, TASK)
    bridge = sequence.encode_bridge(engine.tokenizer)
    chunk = engine.runner.policy.sample_recomputing([ids], codes[None], noise[None], bridge)
    wanted = engine.normalizer.denormalize(chunk[0].numpy())
    np.testing.assert_allclose(engine.infer([request])[0].actions, wanted, atol=1e-5)


def test_buffers_are_allocated_once(engine):
    def places() -> list[int]:
        runner = engine.runner
        return [buffer.data_ptr() for buffer in (runner.cache.k, runner.cache.v, *runner.buffers)]

    before = places()
    for n in (1, 4, 2):
        engine.infer([Request(frames(n), TASK, seed=n)] * n)
    assert places() == before


def test_a_prefetched_frame_gives_the_same_chunk_and_is_used_for_that_image_and_task_only(engine):
    request = Request(frames(11), TASK, seed=4)
    (wanted,) = engine.infer([request])
    assert not wanted.prefetched
    engine.prefetch(TASK, request.images[0].copy())
    (early,) = engine.infer([request])
    assert early.prefetched
    np.testing.assert_allclose(early.actions, wanted.actions, atol=1e-5)
    for other in (Request(frames(12), TASK, seed=4), Request(frames(11), "fold the cloth", seed=4)):
        assert not engine.infer([other])[0].prefetched


def test_prefetched_frames_of_several_robots_serve_one_batch(engine):
    requests = [Request(frames(20 + i), TASK if i % 2 else "fold the cloth", seed=i) for i in range(4)]
    wanted = [engine.infer([request])[0].actions for request in requests]
    for request in requests[:3]:
        engine.prefetch(request.task, request.images[0])
    for n in (3, 4):  # the fourth was not announced: all are computed whole
        results = engine.infer(requests[:n])
        assert [result.prefetched for result in results] == [n == 3] * n
        for result, actions in zip(results, wanted, strict=False):
            np.testing.assert_allclose(result.actions, actions, atol=1e-5)


def test_prefetched_frames_are_forgotten_used_ones_first(engine):
    engine._frames.clear()
    most = FRAMES_PER_ROW * engine.max_batch
    for i in range(most):
        engine.prefetch(TASK, frames(i)[0])
    engine.infer([Request(frames(5), TASK)])  # uses the sixth
    for i in range(most, most + 2):
        engine.prefetch(TASK, frames(i)[0])
    assert len(engine._frames) == most
    used = [engine.infer([Request(frames(i), TASK)])[0].prefetched for i in (5, 0, 1, most + 1)]
    assert used == [False, False, True, True]


def test_a_bad_prefetch_is_refused(engine):
    for task, image, code in (
        ("", frames()[0], "bad_task"),
        (TASK, frames(), "bad_image"),
        (TASK, 3, "bad_image"),
    ):
        with pytest.raises(EngineError) as caught:
            engine.prefetch(task, image)
        assert caught.value.code == code


def test_progress_and_memory_are_told(tmp_path):
    seen = []
    policy = PolicyConfig(checkpoint=str(write(tmp_path / "c")), device="cpu", quantization="fp8")
    engine = Engine.from_policy(policy, lambda *step: seen.append(step))
    engine.warm_up()
    for stage in ("reading checkpoint", "quantising", "warming up"):
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert steps and steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    used, runner = engine.memory(), engine.runner
    assert used["weights"] < 4 * engine.metadata.parameters and used["graphs"] == 0
    assert used["cache"] == 2 * runner.cache.k.nbytes and used["buffers"] > runner.images.nbytes
    assert engine.metadata.device == "cpu" and engine.metadata.supports_prefetch


def test_fp8_answers_close_to_float32_and_leaves_the_checkpoint_alone(tmp_path):
    loaded = checkpoints.load(write(tmp_path / "c"), serving=True)
    request = Request(frames(), TASK, seed=5)
    half = Engine(loaded, quantization="fp8").infer([request])[0].actions
    exact = Engine(loaded).infer([request])[0].actions
    assert 0 < np.abs(exact - half).max() < 0.05


def test_sizes_that_fp8_does_not_take_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="multiples of 16"):
        start(write(tmp_path / "c", mlp_hidden=72), quantization="fp8")


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("CUDA error: x"), RuntimeError("CUDA error: CUBLAS")]
)
def test_after_a_cuda_error_nothing_is_answered_any_more(engine, error, monkeypatch):
    def fail(*_):
        raise error

    request = Request(frames(), TASK)
    with monkeypatch.context() as broken:
        broken.setattr(engine.runner, "_integrate", fail)
        with pytest.raises(DeviceFailed, match="the GPU failed: CUDA error"):
            engine.infer([request])
    for again in (lambda: engine.infer([request]), lambda: engine.prefetch(TASK, frames()[0])):
        with pytest.raises(DeviceFailed, match="the GPU failed"):
            again()
    engine._lost = None
    assert np.isfinite(engine.infer([request])[0].actions).all()


def test_other_failures_and_lack_of_memory_concern_one_request_only(engine, monkeypatch):
    for error, kind in ((torch.OutOfMemoryError("x"), EngineError), (RuntimeError("shape"), RuntimeError)):

        def fail(*_, error=error):
            raise error

        with monkeypatch.context() as broken:
            broken.setattr(engine.runner, "_prefill", fail)
            with pytest.raises(kind) as caught:
                engine.infer([Request(frames(), TASK)])
        assert getattr(caught.value, "code", "inference_failed") == "inference_failed"
        assert np.isfinite(engine.infer([Request(frames(), TASK)])[0].actions).all()


def test_discrete_actions_are_served_by_the_same_engine(tmp_path):
    space = load(Embodiment, "franka_single")
    kinds = tuple(dimension.kind for dimension in space.dimensions)
    raw = np.random.default_rng(0).uniform(-0.5, 0.5, (200, 8))
    bins = fit_bins(np.where(np.array(kinds) == "gripper", np.round(raw + 0.5), raw), space.names, kinds, 9)
    choices = {"action_heads": "ar", "action_vocab": bins.vocab}
    engine = start(write(tmp_path / "c", embodiment=space.name, bins=bins, **choices), max_batch=2)
    assert not engine.metadata.supports_prefetch
    requests = [Request(frames(i), TASK, seed=i) for i in range(2)]
    alone = [engine.infer([request])[0].actions for request in requests]
    for result, actions in zip(engine.infer(requests), alone, strict=True):
        assert np.array_equal(result.actions, actions)
        for d, centres in enumerate(bins.centres):
            assert np.isin(result.actions[:, d], np.float32(centres)).all()
    engine.prefetch(TASK, frames()[0])
    assert not engine.infer(requests[:1])[0].prefetched
    assert len(np.unique(alone)) > 2
    with torch.no_grad():  # seen when the frames are read, long before the last code is chosen
        engine.runner.policy.backbone.layers[0].down.weight[0, 0] = torch.nan
    with pytest.raises(EngineError) as caught:
        engine.infer(requests)
    assert caught.value.code == "non_finite"


def test_prompts_are_computed_once_and_forgotten_oldest_first(engine):
    engine.prefetch("wave to the camera", frames()[0])
    kept = engine._texts["wave to the camera"]
    engine.infer([Request(frames(), "wave to the camera")])
    assert engine._texts["wave to the camera"] is kept
    for i in range(CACHED_TASKS):
        engine.prefetch(f"task {i}", frames()[0])
    assert len(engine._texts) == CACHED_TASKS and "wave to the camera" not in engine._texts


@pytest.mark.parametrize(
    "change, code",
    [
        ({"images": np.zeros((2, 16, 17, 3), np.uint8)}, "bad_image"),
        ({"images": np.zeros((2, 16, 16, 3), np.float32)}, "bad_image"),
        ({"images": np.zeros((1, 16, 16, 3), np.uint8)}, "bad_image"),
        ({"images": [[0]]}, "bad_image"),
        ({"task": ""}, "bad_task"),
        ({"task": " \n"}, "bad_task"),
        ({"task": "x" * 10_000}, "bad_task"),
        ({"task": "ab " * 150}, "bad_task"),
        ({"task": "half a \ud83d surrogate"}, "bad_task"),
        ({"task": None}, "bad_task"),
        ({"seed": -1}, "invalid"),
        ({"seed": 2**63}, "invalid"),
        ({"seed": 1.5}, "invalid"),
        ({"prefix": np.zeros((3, 16), np.float32)}, "unsupported"),
        ({"delay_steps": 2}, "unsupported"),
    ],
)
def test_bad_requests_are_refused_with_their_code_and_the_next_one_works(engine, change, code):
    fields = {"images": frames(), "task": TASK} | change
    with pytest.raises(EngineError) as caught:
        engine.infer([Request(frames(), TASK), Request(**fields)])
    assert caught.value.code == code and str(caught.value)
    assert np.isfinite(engine.infer([Request(frames(), TASK)])[0].actions).all()


def test_too_many_requests_are_refused(engine):
    for n in (0, 5):
        with pytest.raises(EngineError, match="takes 1 to 4"):
            engine.infer([Request(frames(), TASK)] * n)


def test_non_finite_output_is_an_error_never_a_chunk(tmp_path):
    engine = start(write(tmp_path / "c"))
    with torch.no_grad():
        engine.runner.policy.action_head.bias[2] = torch.inf
    with pytest.raises(EngineError) as caught:
        engine.infer([Request(frames(), TASK)])
    assert caught.value.code == "non_finite"
    with torch.no_grad():
        engine.runner.policy.action_head.bias[2] = 0
    assert np.isfinite(engine.infer([Request(frames(), TASK)])[0].actions).all()


def test_relative_chunks_are_undone_from_the_requests_own_state(tmp_path):
    space = load(Embodiment, "franka_bimanual")
    kinds = tuple(dimension.kind for dimension in space.dimensions)
    chunks = np.random.default_rng(0).uniform(0.2, 0.8, (50, 14, 16))
    normalizer = fit(chunks, space.names, kinds, states=chunks[:, 0])
    engine = start(write(tmp_path / "c", normalizer, representation="relative"))
    assert engine.metadata.needs_state and engine.warm_up() > 0
    a, b = np.full(16, 0.4, np.float32), np.full(16, 0.41, np.float32)
    first, second = (
        r.actions for r in engine.infer([Request(frames(), TASK, 1, a), Request(frames(), TASK, 1, b)])
    )
    limits = engine.metadata.limits
    low, high = np.array(limits.action_low), np.array(limits.action_high)
    inside = (first > low + 0.02) & (first < high - 0.02)
    gripper = np.array([kind == "gripper" for kind in kinds])
    assert inside[:, ~gripper].any()
    np.testing.assert_allclose((second - first)[inside & ~gripper], 0.01, atol=1e-5)
    np.testing.assert_allclose(second[:, gripper], first[:, gripper], atol=1e-6)
    for bad in (None, np.zeros(15, np.float32), np.full(16, np.nan, np.float32), np.zeros(16, int)):
        with pytest.raises(EngineError) as caught:
            engine.infer([Request(frames(), TASK, 1, bad)])
        assert caught.value.code == "bad_state"


def test_heun_and_more_steps_are_one_setting_away(tmp_path):
    folder = write(tmp_path / "c")
    request = Request(frames(), TASK, seed=5)
    chunks = [
        start(folder, **c).infer([request])[0].actions for c in ({}, {"sampler": "heun"}, {"steps": 50})
    ]
    assert not np.allclose(chunks[0], chunks[1], atol=1e-7)
    assert np.abs(chunks[1] - chunks[2]).max() < np.abs(chunks[0] - chunks[2]).max()


def test_less_noise_leaves_less_to_the_seed(tmp_path):
    folder = write(tmp_path / "c")
    requests = [Request(frames(), TASK, seed=seed) for seed in (5, 6)]

    def apart(scale: float) -> float:
        a, b = (found.actions for found in start(folder, noise_scale=scale).infer(requests))
        return float(np.abs(a - b).max())

    assert apart(0.0) == 0.0 < apart(0.5) < apart(1.0)
    with pytest.raises(ValueError, match="noise_scale"):
        PolicyConfig(checkpoint="c", noise_scale=1.5)


def test_bfloat16_answers_close_to_float32(tmp_path):
    folder = write(tmp_path / "c")
    request = Request(frames(), TASK, seed=5)
    exact, rounded = (start(folder, dtype=d).infer([request])[0].actions for d in ("float32", "bfloat16"))
    assert 0 < np.abs(exact - rounded).max() < 0.05


def test_pretrained_checkpoint_is_refused_and_names_finetuning(tmp_path):
    folder = write(tmp_path / "c", action_heads="none")
    with pytest.raises(CheckpointError, match="vipra train finetune"):
        Engine(checkpoints.load(folder))
    (folder / "model-00001-of-00001.safetensors").unlink()  # not even looked at
    with pytest.raises(CheckpointError, match="vipra train finetune"):
        start(folder)


def test_checkpoint_of_another_embodiment_is_refused(tmp_path):
    folder = write(tmp_path / "c")
    loaded = checkpoints.load(folder)
    single = (ROOT / "config" / "embodiments" / "franka_single.yaml").read_text()
    for text, message in (
        (single, "action_dim is 16, embodiment franka_single says 8"),
        (loaded.embodiment.replace("horizon: 14", "horizon: 7"), "horizon is 14"),
        (loaded.embodiment.replace("left_fr3_joint3", "left_fr3_joint9"), "normalization names"),
        ("{", "not YAML"),
    ):
        loaded.embodiment = text
        with pytest.raises(CheckpointError, match=message):
            Engine(loaded)
    loaded.embodiment = "name: x\n"
    with pytest.raises(ConfigError, match=r"embodiment\.yaml: dimensions: missing"):
        Engine(loaded)


def test_cuda_without_a_gpu_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(CheckpointError, match="device: auto or cpu"):
        Engine.from_policy(PolicyConfig(checkpoint=str(tmp_path), device="cuda"))


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "policies").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_policy_files_are_valid_and_shipped_checkpoints_load(path):
    policy = load(PolicyConfig, str(path))
    folder = ROOT / policy.checkpoint
    if not folder.is_dir():
        pytest.skip(f"{policy.checkpoint} is not part of this checkout")
    engine = Engine.from_policy(policy)
    size = engine.metadata.image_size
    state = np.zeros(len(engine.normalizer.names), np.float32) if engine.metadata.needs_state else None
    (result,) = engine.infer([Request(np.zeros((2, *size, 3), np.uint8), TASK, 0, state)])
    assert np.isfinite(result.actions).all()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("quantization", ["none", "fp8"])
def test_cuda_graphs_serve_what_eager_serves_and_memory_is_told(tmp_path, quantization):
    if quantization == "fp8" and not fp8.supported(torch.device("cuda")):
        pytest.skip("this GPU does not multiply fp8 row-wise")
    folder, request = write(tmp_path / "c"), Request(frames(3), TASK, seed=2)
    recorded, eager = (
        Engine.from_policy(
            PolicyConfig(checkpoint=str(folder), device="cuda", quantization=quantization, cuda_graphs=graphs)
        )
        for graphs in (True, False)
    )
    for engine in (recorded, eager):
        assert engine.warm_up() > 0
    assert len(recorded.runner.graphs) == 2 + 5 * len(recorded.runner.batches)  # no more while serving
    np.testing.assert_array_equal(*(e.infer([request])[0].actions for e in (recorded, eager)))
    recorded.prefetch(TASK, request.images[0]), eager.prefetch(TASK, request.images[0])
    early = [e.infer([request])[0] for e in (recorded, eager)]
    assert all(result.prefetched for result in early)
    np.testing.assert_array_equal(*(result.actions for result in early))
    assert len(recorded.runner.graphs) == 2 + 5 * len(recorded.runner.batches)
    assert recorded.memory()["graphs"] > 0


@needs_gpu
def test_cuda_in_fp32_answers_as_the_cpu_does(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # TF32 may choose another image token
    folder, request = write(tmp_path / "c"), Request(frames(3), TASK, seed=2)
    policies = (PolicyConfig(checkpoint=str(folder), device=d, dtype="float32") for d in ("cpu", "cuda"))
    cpu, gpu = (Engine.from_policy(policy).infer([request])[0].actions for policy in policies)
    np.testing.assert_allclose(gpu, cpu, atol=1e-3)
