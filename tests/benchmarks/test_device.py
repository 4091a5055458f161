"""The floor rests on counted FLOPs and bytes: they equal what torch counts while the model runs."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, device
from models.policy import Policy

CPU = torch.device("cpu")
TEXT = 20


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def checkpoint():
    return common.random_checkpoint(common.sized("tiny", 7), CPU)


def test_flops_of_encoding_prefill_and_a_step_are_what_torch_counts(checkpoint):
    config, policy, vqgan = checkpoint.config, checkpoint.policy, checkpoint.vqgan
    frame = torch.zeros(1, 3, config.vqgan.image_size, config.vqgan.image_size)
    assert counted(lambda: vqgan.encode(frame)) == device.vqgan_flops(config)

    bridge = list(range(device.BRIDGE))
    cache = policy.new_cache(1, bridge, text_slots=TEXT)
    text = policy.encode_text(list(range(TEXT)))
    codes, noise = torch.zeros(1, 2, config.frame_tokens, dtype=torch.int64), torch.zeros(1, 14, 7)
    made = {}

    def prefill():
        made["prefix"], _ = policy.prefill([text], codes, noise, cache, bridge)

    rows = device.prefill_rows(config)
    assert counted(prefill) == device.pass_flops(config, rows, cache.slots)
    step = counted(lambda: policy.step(made["prefix"], noise, 0.1))
    assert step == device.pass_flops(config, config.horizon, cache.slots)


def test_an_unequal_stem_and_shortcuts_are_counted():
    config = common.sized("tiny")
    vqgan = dataclasses.replace(config.vqgan, channels=(8, 24, 16), stem_channels=16, blocks_per_level=1)
    config = dataclasses.replace(config, vqgan=dataclasses.replace(vqgan, image_size=32))
    checkpoint = common.random_checkpoint(config, CPU)
    assert counted(lambda: checkpoint.vqgan.encode(torch.zeros(1, 3, 32, 32))) == device.vqgan_flops(config)


def test_bytes_of_a_pass_are_the_layers_weights_the_action_heads_and_the_cache(checkpoint):
    config, policy = checkpoint.config, checkpoint.policy
    layers = sum(p.numel() for p in policy.backbone.layers.parameters() if p.dim() == 2)
    heads = sum(
        p.numel() for m in (policy.action_encoder, policy.action_head) for p in m.parameters() if p.dim() == 2
    )
    cache = policy.new_cache(3, list(range(device.BRIDGE)), text_slots=TEXT)
    assert device.layer_weights(config) * config.layers == layers
    held = cache.k.numel() + cache.v.numel()
    assert device.pass_bytes(config, cache.slots, 3, "bf16") == 2 * (layers + heads + held)
    assert device.pass_bytes(config, cache.slots, 3, "fp8") == layers + 2 * (heads + held)
    assert device.pass_bytes(config, cache.slots, 3, "fp32") == 4 * (layers + heads + held)


def test_the_7b_floor_is_the_designs_at_the_designs_rates():
    """One H200, 4.3 TB/s and 780 TFLOP/s: 38 ms in bf16, 20 in fp8; with o_{t-1} known 33 and 17."""
    rates = device.Rates(4.3e12, {"bf16": {534: 780e12}, "fp8": {534: 1500e12}}, {})
    config = common.sized("7b", 8)
    floors = {
        (p, k): device.floor(config, rates, 60, p, prefetched=k).total_ms
        for p in ("bf16", "fp8")
        for k in (0, 1)
    }
    assert floors == pytest.approx({("bf16", 0): 38, ("bf16", 1): 33, ("fp8", 0): 20, ("fp8", 1): 17}, abs=1)
    with torch.device("meta"):
        backbone = Policy(config).backbone.layers
    assert sum(p.numel() for p in backbone.parameters()) * 2 / 1e9 == pytest.approx(12.95, abs=0.01)


def test_a_pass_is_bound_by_its_bytes_or_its_arithmetic():
    config = common.sized("tiny")
    slow_memory = device.Rates(1e6, {"fp32": {14: 1e15}}, {})
    slow_maths = device.Rates(1e15, {"fp32": {14: 1e6}}, {})
    keys = TEXT + device.prefill_rows(config)
    reading = 9e3 * device.pass_bytes(config, keys, 1, "fp32") / 1e6
    computing = 9e3 * device.pass_flops(config, 14, keys) / 1e6
    assert device.floor(config, slow_memory, TEXT, "fp32").integrate_ms == pytest.approx(reading)
    assert device.floor(config, slow_maths, TEXT, "fp32").integrate_ms == pytest.approx(computing)
    assert device.floor(config, slow_maths, TEXT, "fp32", batch=2).integrate_ms == pytest.approx(
        2 * computing
    )


def test_more_rows_are_at_least_as_fast_as_fewer():
    rates = device.Rates(1.0, {"bf16": {14: 5.0, 100: 9.0, 200: 7.0}}, {})
    assert [rates.at("bf16", rows) for rows in (1, 14, 120, 999)] == [5.0, 5.0, 9.0, 9.0]
