import pytest
import torch

from models.checkpoint import CheckpointError, initialize
from models.config import SIZES
from models.fp8 import quantize
from models.policy import Policy
from policy_server.memory import GIB, estimate, require
from tests.models.sizes import small

BIG = SIZES["vipra_7b"]
BF16 = torch.bfloat16


def test_7b_in_bf16_for_one_robot_fits_20_gib_and_fp8_halves_its_weights():
    bf16, half = (estimate(BIG, BF16, kind, 1) for kind in ("none", "fp8"))
    assert 12.5 * GIB < bf16["weights"] < 13.5 * GIB and bf16["peak"] < 20 * GIB
    assert 6.2 * GIB < half["weights"] < 7.2 * GIB
    assert bf16["weights"] < half["peak"] < bf16["weights"] + 1.0 * GIB  # while loading
    assert estimate(BIG, BF16, "none", 16)["peak"] < 40 * GIB  # what vipra_7b.yaml says


@pytest.mark.parametrize("kind", ["none", "fp8"])
def test_weights_and_cache_are_those_of_the_real_thing(kind):
    config = small()
    policy = Policy(config, serving=True).to(BF16)
    initialize(policy, 0)
    sizes = estimate(config, BF16, kind, 3, vqgan_bytes=0)
    if kind == "fp8":
        quantize(policy)
    assert sizes["weights"] == sum(p.nbytes for p in policy.parameters())
    cache = policy.new_cache(3, [1] * 10)
    assert 0 <= sizes["cache"] - 2 * cache.k.nbytes < 0.2 * sizes["cache"]


def test_every_use_grows_with_the_batch_and_the_peak_is_their_sum():
    one, many = (estimate(BIG, BF16, "none", n) for n in (1, 16))
    assert many["cache"] == 16 * one["cache"] and many["graphs"] > one["graphs"]
    assert one["weights"] == many["weights"]
    assert many["peak"] == sum(many[key] for key in ("weights", "cache", "buffers", "graphs"))


def test_too_little_memory_names_what_is_missing_and_what_fits():
    needed = estimate(BIG, BF16, "none", 16)["peak"]
    require(needed, BIG, BF16, "none", 16)
    with pytest.raises(CheckpointError) as caught:
        require(needed - GIB, BIG, BF16, "none", 16)
    assert str(caught.value).startswith(
        f"vipra_7b at max_batch 16 needs {needed / GIB:.1f} GiB of GPU memory"
    )
    assert "1.0 GiB are missing. What fits: quantization: fp8 or max_batch: 8" in str(caught.value)
    with pytest.raises(
        CheckpointError, match="fits: quantization: fp8 with max_batch: 4 or quantization: fp8"
    ):
        require(14 * GIB, BIG, BF16, "none", 8)
    with pytest.raises(CheckpointError, match=r"What fits: max_batch: 4 or max_batch: 2$"):
        require(14 * GIB, BIG, BF16, "fp8", 8)
    with pytest.raises(CheckpointError, match="No option fits: free the GPU or use another"):
        require(8 * GIB, BIG, BF16, "none", 4)
