import dataclasses
import json

import pytest

from models.config import SIZES, ModelConfig, ModelConfigError, VQGANConfig
from tests.models.sizes import small


@pytest.mark.parametrize("name", SIZES)
def test_every_named_size_survives_json(name):
    config = SIZES[name].with_embodiment(16, 14, representation="relative")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.name == name


def test_7b_is_the_published_network():
    config = SIZES["vipra_7b"]
    assert (config.hidden, config.mlp_hidden, config.layers, config.heads) == (4096, 11008, 32, 32)
    assert (config.rope_theta, config.norm_eps, config.horizon) == (5e7, 1e-6, 14)
    assert (config.text_vocab, config.vision_vocab, config.end_of_frame, config.end_of_vision) == (
        32000,
        8448,
        8192,
        8193,
    )
    assert config.vision_tokens == 2 * (256 + 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": 30}, "hidden"),
        ({"layers": 0}, "layers: 0"),
        ({"heads": 3}, "heads"),
        ({"layers": 2.0}, "layers: expected int"),
        ({"layers": True}, "layers: expected int"),
        ({"vision_vocab": 33}, "vision_vocab"),
        ({"max_positions": 100}, "max_positions"),
        ({"dropout": 1.0}, "dropout"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_precision": "fp16"}, "rope_precision: 'fp16' is not one of fp32, bf16"),
        ({"activation": "relu"}, "activation"),
        ({"chunk_attention": "none"}, "chunk_attention"),
        ({"time_embedding": "sine"}, "time_embedding"),
        ({"objective": "ddpm"}, "objective"),
        ({"representation": "deltas"}, "representation"),
        ({"action_heads": "ar"}, "action_heads"),
        ({"latent_head": "conv"}, "latent_head"),
    ],
)
def test_impossible_choices_are_refused_by_name(change, message):
    with pytest.raises(ModelConfigError, match=message):
        small(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"channels": (8, 9)}, "norm_groups"),
        ({"image_size": 17}, "image_size"),
        ({"channels": ()}, "channels"),
        ({"codebook_size": 0}, "codebook_size"),
        ({"stem_channels": 3}, "norm_groups"),
    ],
)
def test_impossible_vqgans_are_refused_by_name(change, message):
    with pytest.raises(ModelConfigError, match=message):
        dataclasses.replace(VQGANConfig(16, (8, 16), 1, 8, 32, norm_groups=4), **change)


def test_unknown_and_missing_keys_are_refused_by_name():
    data = small().to_dict()
    with pytest.raises(ModelConfigError, match=r"unknown keys.*colour"):
        ModelConfig.from_dict(data | {"colour": "red"})
    del data["hidden"]
    with pytest.raises(ModelConfigError, match=r"missing keys.*hidden"):
        ModelConfig.from_dict(data)
    with pytest.raises(ModelConfigError, match="expected a map"):
        ModelConfig.from_dict([1])
