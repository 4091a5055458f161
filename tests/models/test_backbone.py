import numpy as np
import pytest
import torch

from models.backbone import Backbone, KVCache, rope, rotate, turns
from models.config import SIZES, ModelConfig, VQGANConfig
from tests.models.golden import backbone_state, folder, read_json
from tests.models.sizes import small


def causal(length: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def golden_model(file: str) -> tuple[Backbone, dict, dict]:
    path = folder("lwm")
    source = read_json(path / "config.json")
    config = ModelConfig(
        name="golden",
        hidden=source["hidden_size"],
        mlp_hidden=source["intermediate_size"],
        layers=source["num_hidden_layers"],
        heads=source["num_attention_heads"],
        text_vocab=source["vocab_size"],
        vision_vocab=source["vision_vocab_size"],
        vqgan=VQGANConfig(64, (32, 32, 32), 1, 8, source["vision_vocab_size"] - 2),
        max_positions=2048,
        norm_eps=source["rms_norm_eps"],
        rope_theta=float(source["theta"]),
    )
    model = Backbone(config)
    model.load_state_dict(backbone_state(path / file, config.heads))
    return model.eval(), np.load(path / "inputs.npz"), np.load(path / "expected.npz")


@pytest.mark.parametrize(
    "file, suffix", [("streaming_params", ""), ("streaming_params_bf16", "_bf16_params")]
)
@torch.no_grad()
def test_logits_equal_lwms_on_mixed_text_and_vision_with_left_padding(file, suffix):
    model, inputs, expected = golden_model(file)
    ids, vision, real, positions = (
        torch.from_numpy(inputs[key]).long()
        for key in ("input_ids", "vision_masks", "attention_mask", "position_ids")
    )
    vision, real = vision.bool(), real.bool()
    text = model.text_embedding(torch.where(vision, 0, ids))
    x = torch.where(vision[..., None], model.vision_embedding(torch.where(vision, ids, 0)), text)
    length = ids.shape[1]
    mask = causal(length) & real[:, None, None, :] | torch.eye(length, dtype=torch.bool)
    hidden = model(x, rope(model.config, positions), mask)
    for name, head in (("text", model.text_head), ("vision", model.vision_head)):
        wanted = torch.from_numpy(expected[f"{name}_logits{suffix}"])
        torch.testing.assert_close(head(hidden)[real], wanted[real], atol=2e-5, rtol=0)


@torch.no_grad()
def test_logits_equal_those_of_transformers_llama():
    import transformers

    config = small(layers=3)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.text_vocab,
            hidden_size=config.hidden,
            intermediate_size=config.mlp_hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    ).eval()
    weights = theirs.state_dict()
    ours = Backbone(config).eval()
    state = {
        "text_embedding.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
        "text_head.weight": weights["lm_head.weight"],
    }
    for i in range(config.layers):
        w = {key.split(f"layers.{i}.")[1]: v for key, v in weights.items() if f"layers.{i}." in key}
        state |= {
            f"layers.{i}.attention_norm.weight": w["input_layernorm.weight"],
            f"layers.{i}.mlp_norm.weight": w["post_attention_layernorm.weight"],
            f"layers.{i}.qkv.weight": torch.cat([w[f"self_attn.{n}_proj.weight"] for n in "qkv"]),
            f"layers.{i}.out.weight": w["self_attn.o_proj.weight"],
            f"layers.{i}.gate_up.weight": torch.cat([w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"]]),
            f"layers.{i}.down.weight": w["mlp.down_proj.weight"],
        }
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == {"vision_embedding.weight", "vision_head.weight"}
    ids = torch.randint(0, config.text_vocab, (2, 40))
    hidden = ours(ours.text_embedding(ids), rope(config, torch.arange(40).expand(2, -1)), causal(40))
    torch.testing.assert_close(ours.text_head(hidden), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cached_pieces_equal_one_pass_and_tail_equals_its_last_rows():
    torch.manual_seed(0)
    config = small()
    model = Backbone(config).eval()
    x, positions = torch.randn(2, 20, config.hidden), torch.arange(20).expand(2, -1)
    whole = model(x, rope(config, positions), causal(20))
    cache = KVCache(config, 3, 20)
    pieces = [
        model(x[:, a:b], rope(config, positions[:, a:b]), causal(20)[:, :, a:b], cache, start=a)
        for a, b in ((0, 7), (7, 8), (8, 20))
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=0)
    tail = model(x, rope(config, positions), causal(20), tail=5)
    torch.testing.assert_close(tail, whole[:, -5:], atol=1e-6, rtol=0)


@torch.no_grad()
def test_without_a_tail_the_same_keys_and_values_are_cached():
    torch.manual_seed(0)
    config = small()
    model, caches = Backbone(config).eval(), [KVCache(config, 2, 20) for _ in range(2)]
    x, rotation = torch.randn(2, 20, config.hidden), rope(config, torch.arange(20).expand(2, -1))
    for cache, tail in zip(caches, (None, 0), strict=True):
        hidden = model(x, rotation, causal(20), cache, tail=tail)
    assert hidden.shape == (2, 0, config.hidden)
    torch.testing.assert_close(caches[0].k, caches[1].k, atol=1e-6, rtol=0)
    torch.testing.assert_close(caches[0].v, caches[1].v, atol=1e-6, rtol=0)


def test_rotation_keeps_norms_and_depends_on_distance_only():
    config = small()
    q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 4, 1, 8)

    def score(a: int, b: int) -> torch.Tensor:
        at_a, at_b = (turns(*rope(config, torch.tensor([[n]]))) for n in (a, b))
        return (rotate(q, *at_a) * rotate(k, *at_b)).sum(-1)

    torch.testing.assert_close(score(5, 2), score(105, 102), atol=1e-4, rtol=1e-4)
    assert (score(5, 2) - score(5, 3)).abs().max() > 1e-3
    cos, sin = rope(config, torch.arange(50)[None])
    torch.testing.assert_close(
        rotate(q.expand(1, 4, 50, 8), *turns(cos, sin)).norm(dim=-1), q.norm(dim=-1).expand(1, 4, 50)
    )


def test_bf16_rope_rounds_positions_together_as_upstream():
    config = SIZES["vipra_7b"].with_embodiment(8, 14, rope_precision="bf16")
    cos, sin = rope(config, torch.arange(768)[None])
    pairs = torch.stack([cos[0, 0, :, 0], sin[0, 0, :, 0]], -1)
    distinct = len({tuple(pair) for pair in pairs.tolist()})
    assert distinct == 435
