"""Static buffers: what a GPU records and replays, called here as it is."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import fp8
from models.checkpoint import initialize
from models.graphs import Graphs, Mirror
from models.policy import Policy
from models.runner import Runner, batch_sizes
from models.vqgan import VQGAN
from tests.models.sizes import small

BRIDGE = [3, 4, 5]
TEXTS = [[1, 1, *range(10, 24)], [1, 1, 40, 41, 42], [1, 1, *range(60, 89)]]
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 16, 3), dtype=np.uint8)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def parts(device="cpu", dtype=torch.float32, **choices) -> tuple[Policy, VQGAN]:
    config = small(**choices)
    policy, vqgan = Policy(config, serving=True), VQGAN(config.vqgan)
    for module in (policy, vqgan):
        initialize(module, 0)
    with torch.no_grad():  # large enough that attention matters
        for layer in policy.backbone.layers:
            for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down):
                matrix.weight.mul_(8)
        vqgan.quantize.embedding.weight.mul_(32)
    policy.to(device, dtype).eval(), vqgan.to(device).eval()
    if torch.device(device).type == "cuda" and dtype == torch.bfloat16:
        vqgan.set_encoder(torch.bfloat16)
    return policy, vqgan


def make(max_batch=4, device="cpu", dtype=torch.float32, graphs=True, sampler="euler", **choices) -> Runner:
    policy, vqgan = parts(device, dtype, **choices)
    return Runner(policy, vqgan, BRIDGE, max_batch, sampler, 10, graphs)


@torch.inference_mode()
def chunk(runner: Runner, rows, ahead: bool = False) -> torch.Tensor:
    """The chunks of some of the three requests above; `ahead`: o_{t-1} computed before o_t is known."""
    texts = [runner.policy.encode_text(TEXTS[i]) for i in rows]
    frames = None
    if ahead:
        frames = [runner.prefill_frame(text, IMAGES[i, 0]) for text, i in zip(texts, rows, strict=True)]
    for row, i in enumerate(rows):
        runner.set_row(row, IMAGES[i], seed=i)
        if ahead:
            runner.images.host[row, 0] = 0  # not needed any more
    runner.run(texts, frames)
    if runner.device.type == "cuda":
        torch.cuda.synchronize()
    return runner.chunk.host[: len(rows)].clone()


@torch.inference_mode()
def plain(runner: Runner, rows) -> torch.Tensor:
    """The same without buffers, slots, batches or cache."""
    images = torch.from_numpy(IMAGES[list(rows)]).to(runner.device)
    codes = runner.vqgan.encode(runner.vqgan.to_input(images.flatten(0, 1))).view(len(rows), 2, -1)
    shape = runner.noise.host.shape[1:]
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in rows])
    texts, steps, sampler = [TEXTS[i] for i in rows], runner.steps, runner.sampler
    noise = noise.to(runner.device)
    return runner.policy.sample_recomputing(texts, codes, noise, BRIDGE, steps, sampler).cpu()


def test_batches_are_powers_of_two_where_each_is_a_graph():
    assert batch_sizes(1, True) == (1,) and batch_sizes(16, True) == (1, 2, 4, 8, 16)
    assert batch_sizes(6, True) == (1, 2, 4, 6) and batch_sizes(3, False) == (1, 2, 3)


def test_images_take_many_codes():
    runner = make()
    chunk(runner, range(3))
    assert len(runner.codes[:3].unique()) > 4  # else the tests below would miss a frame that is not used


@pytest.mark.parametrize(
    "choices",
    [{}, {"sampler": "heun"}, {"chunk_attention": "bidirectional"}, {"objective": "paper_literal"}],
    ids=str,
)
@pytest.mark.parametrize("ahead", [False, True], ids=["whole", "ahead"])
def test_static_buffers_give_the_plain_chunk(choices, ahead):
    runner = make(**choices)
    wanted = plain(runner, range(3))
    assert (wanted - wanted[[1, 2, 0]]).abs().amin(0).mean() > 1e-3
    for rows in ([0, 1, 2], [2], [1, 0]):  # each finds what the one before left in the buffers
        torch.testing.assert_close(chunk(runner, rows, ahead), wanted[rows], atol=1e-5, rtol=1e-5)


def test_a_padded_batch_gives_the_same_chunks():
    runner = make()
    runner.batches = (1, 2, 4)
    torch.testing.assert_close(chunk(runner, [0, 1, 2]), plain(runner, range(3)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chunk(runner, [2, 0, 1], True), plain(runner, [2, 0, 1]), atol=1e-5, rtol=1e-5)


def test_slots_that_are_skipped_on_the_cpu_change_nothing(monkeypatch):
    wanted = chunk(make(), [1]), chunk(make(), [1], True)
    monkeypatch.setattr(Runner, "_skip_empty_slots", lambda *_: None)
    runner = make()
    torch.testing.assert_close(chunk(runner, [1]), wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(chunk(runner, [1], True), wanted[1], atol=1e-5, rtol=1e-5)
    assert runner.cache.first == 0


def test_recorded_functions_may_run_again_without_changing_the_result():
    """Recording warms up by running them; a replay must not add to what that left."""
    runner = make()

    def thrice(function, *sizes):
        for _ in range(3):
            function(*sizes)

    wanted = chunk(runner, [0, 1]), chunk(runner, [0, 1], True)
    runner.graphs = SimpleNamespace(run=thrice)
    assert torch.equal(chunk(runner, [0, 1]), wanted[0]) and torch.equal(
        chunk(runner, [0, 1], True), wanted[1]
    )


@pytest.mark.parametrize("skipped", ["_encode", "_prefill", "_integrate"])
def test_a_step_that_does_not_run_can_not_leave_the_last_chunk_as_the_answer(skipped):
    runner = make()
    assert chunk(runner, [0]).isfinite().all()

    def run(function, *sizes):
        if function.__name__ != skipped:
            function(*sizes)

    runner.graphs = SimpleNamespace(run=run)
    if skipped == "_encode":
        with pytest.raises(IndexError):  # on a GPU: a device-side assertion
            chunk(runner, [0])
    else:
        assert chunk(runner, [0]).isnan().all()


class OnlyOnTheGpu(TorchDispatchMode):
    """Refuses every operation with a tensor that is not on the GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            assert not isinstance(leaf, torch.Tensor) or leaf.is_cuda, f"{function} with a tensor on the host"
        return function(*args, **(kwargs or {}))


def move_to_pretended_gpu(module: nn.Module) -> None:
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, t in tensors.items():
                if t is not None:
                    fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                    tensors[name] = nn.Parameter(fake, requires_grad=False)


@pytest.mark.parametrize("quantised", [False, True], ids=["bf16", "fp8"])
def test_what_is_recorded_never_touches_or_waits_for_the_host(quantised):
    """Traced on a pretended GPU: shapes, types and devices are checked, nothing is computed. Reading a value
    there raises.
    """
    policy, vqgan = parts(dtype=torch.bfloat16)
    vqgan.set_encoder(torch.bfloat16)
    if quantised:
        fp8.quantize(policy)
    with FakeTensorMode(), torch.inference_mode():
        move_to_pretended_gpu(policy), move_to_pretended_gpu(vqgan)
        runner = Runner(policy, vqgan, BRIDGE, 4, steps=2, cuda_graphs=False)
        assert policy.device.type == "cuda" and runner.cache.k.dtype == torch.bfloat16
        with OnlyOnTheGpu():
            for done in (0, 1):
                runner._encode(3, done, 2)
                runner._prefill(3, done)
            runner._integrate(3)
            runner._encode(1, 0, 1)
            runner._prefill_frame()


def test_on_the_cpu_functions_are_called_and_buffers_are_one():
    graphs, seen = Graphs(torch.device("cpu")), []
    graphs.run(lambda *sizes: seen.append(sizes), 1, 2)
    graphs.drop()
    assert seen == [(1, 2)] and not graphs.enabled and len(graphs) == 0
    mirror = Mirror((2, 3), torch.int64, torch.device("cpu"))
    mirror.host[1] = 5
    mirror.upload(slice(2))
    assert mirror.device is mirror.host and mirror.nbytes == 48


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ahead", [False, True], ids=["whole", "ahead"])
def test_cuda_replay_equals_eager_bitwise(dtype, ahead):
    recorded, eager = make(device="cuda", dtype=dtype), make(device="cuda", dtype=dtype, graphs=False)
    eager.batches = recorded.batches  # the same shapes choose the same kernels
    for rows in ([0, 1, 2], [1], [2, 0]):
        for _ in range(2):
            assert torch.equal(chunk(recorded, rows, ahead), chunk(eager, rows, ahead))
    assert len(recorded.graphs) > 0 and len(eager.graphs) == 0


@needs_gpu
def test_cuda_equals_the_cpu_in_fp32():
    torch.backends.cudnn.allow_tf32 = False
    try:
        gpu, cpu = make(device="cuda"), make()
        for ahead in (False, True):
            torch.testing.assert_close(
                chunk(gpu, range(3), ahead), chunk(cpu, range(3)), atol=1e-4, rtol=1e-4
            )
    finally:
        torch.backends.cudnn.allow_tf32 = True


@needs_gpu
def test_cuda_batch_and_frame_ahead_stay_close_in_bf16():
    runner = make(device="cuda", dtype=torch.bfloat16)
    batch = chunk(runner, range(3))
    bound = 0.05 * batch.std()
    for i in range(3):
        assert (chunk(runner, [i]) - batch[i : i + 1]).abs().mean() < bound
    assert (chunk(runner, range(3), True) - batch).abs().mean() < bound


@needs_gpu
def test_cuda_graphs_survive_other_tasks_and_sizes_in_between():
    runner = make(device="cuda", dtype=torch.bfloat16)
    first = chunk(runner, [0])
    for rows in ([1, 2], [2], [0, 1, 2], [1]):
        chunk(runner, rows), chunk(runner, rows, True)
    assert torch.equal(chunk(runner, [0]), first)
