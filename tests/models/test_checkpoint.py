import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import bins, normalization
from models.checkpoint import CheckpointError, init_checkpoint, load, random_tensor, read_hash, save
from models.config import SIZES
from models.folder import digest as folder_digest
from models.folder import shards
from models.policy import Policy
from models.tokenizer import Tokenizer
from tests.models.sizes import small

NAMES = (*(f"j{i}" for i in range(7)), "gripper")
KINDS = ("joint",) * 7 + ("gripper",)
EMBODIMENT = "name: anything, this package does not look\n"


def parts(**choices) -> tuple:
    config = small(**choices)
    normalizer = normalization.unfitted(NAMES, KINDS, config.representation)
    return config, Tokenizer.train(["stack the cups"], 300), normalizer, EMBODIMENT


def written(folder, shard_bytes=4 << 30, **choices):
    config, *rest = parts(**choices)
    init_checkpoint(config, folder, *rest, shard_bytes=shard_bytes)
    return folder


def reseal(folder) -> None:
    """Make the manifest agree with the files again, as a writer of damaged weights would."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    for name in data["files"]:
        file = folder / name
        data["files"][name] = {"bytes": file.stat().st_size, "sha256": folder_digest(file)}
    path.write_text(json.dumps(data))


def change_tensors(folder, change) -> None:
    (path,) = folder.glob("model-*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    reseal(folder)


def test_saving_what_was_loaded_gives_the_same_folder(tmp_path):
    first = load(written(tmp_path / "a"))
    assert save(tmp_path / "b", first) == first.hash == read_hash(tmp_path / "b")
    second = load(tmp_path / "b")
    assert second.config == first.config and second.normalizer == first.normalizer
    assert second.embodiment == EMBODIMENT
    assert second.tokenizer.encode("stack the cups") == first.tokenizer.encode("stack the cups")
    for name, tensor in first.policy.state_dict().items():
        assert torch.equal(tensor, second.policy.state_dict()[name]), name
    for name, tensor in first.vqgan.state_dict().items():
        assert torch.equal(tensor, second.vqgan.state_dict()[name]), name


def test_shards_hold_every_tensor_once_and_stay_under_the_limit(tmp_path):
    limit = 20_000
    folder = written(tmp_path / "a", shard_bytes=limit)
    shards = [load_file(path) for path in sorted(folder.glob("model-*.safetensors"))]
    assert len(shards) > 3
    names = [name for shard in shards for name in shard]
    assert sorted(names) == sorted(dict(Policy(small()).named_parameters()))
    for shard in shards:
        assert len(shard) == 1 or sum(t.numel() * 4 for t in shard.values()) <= limit
    whole = load(written(tmp_path / "b"))
    assert all(
        torch.equal(p, dict(whole.policy.named_parameters())[n])
        for n, p in load(folder).policy.named_parameters()
    )


def test_other_accounts_can_read_every_file(tmp_path):
    for path in written(tmp_path / "a").iterdir():
        assert path.stat().st_mode & 0o444 == 0o444, path.name


def test_hash_follows_the_content(tmp_path):
    a, b = written(tmp_path / "a"), written(tmp_path / "b")
    assert read_hash(a) == read_hash(b)
    loaded = load(b)
    with torch.no_grad():
        loaded.policy.action_head.bias[0] += 1
    assert save(b, loaded) != read_hash(a)
    assert load(b).policy.action_head.bias[0] == 1


def test_serving_leaves_unused_heads_out_and_computes_the_same(tmp_path):
    folder = written(tmp_path / "a")
    full, serving = load(folder), load(folder, serving=True)
    assert serving.policy.backbone.text_head is None and serving.policy.latent_head is None
    codes, noise = torch.zeros(1, 2, 16, dtype=torch.long), torch.ones(1, 14, 8)
    chunks = [
        p.sample([p.encode_text([1, 1, 5])], codes, noise, p.new_cache(1, [3]), [3])
        for p in (full.policy, serving.policy)
    ]
    assert torch.equal(*chunks)
    with pytest.raises(CheckpointError, match="serving=False"):
        save(tmp_path / "b", serving)


def test_bf16_on_disk_and_in_memory(tmp_path):
    loaded = load(written(tmp_path / "a"))
    save(tmp_path / "b", loaded, dtype=torch.bfloat16)
    half = load(tmp_path / "b", dtype=torch.bfloat16)
    assert half.policy.dtype == torch.bfloat16 and half.vqgan.quant_conv.weight.dtype == torch.float32
    again = load(tmp_path / "b")
    weight = loaded.policy.backbone.layers[0].qkv.weight
    assert torch.equal(again.policy.backbone.layers[0].qkv.weight, weight.bfloat16().float())
    assert (tmp_path / "b/model-00001-of-00001.safetensors").stat().st_size < 0.6 * (
        tmp_path / "a/model-00001-of-00001.safetensors"
    ).stat().st_size


def test_random_weights_depend_on_seed_and_name_only():
    shape = torch.Size([8, 8])
    assert torch.equal(random_tensor("a.weight", shape, 0), random_tensor("a.weight", shape, 0))
    assert not torch.equal(random_tensor("a.weight", shape, 0), random_tensor("a.weight", shape, 1))
    assert not torch.equal(random_tensor("a.weight", shape, 0), random_tensor("b.weight", shape, 0))


def test_7b_has_the_sizes_of_llama_and_fits_its_shards():
    with torch.device("meta"):
        policy = Policy(SIZES["vipra_7b"].with_embodiment(16, 14))
    shapes = {name: p.shape for name, p in policy.named_parameters()}
    assert shapes["backbone.layers.31.qkv.weight"] == (12288, 4096)
    assert shapes["backbone.layers.31.gate_up.weight"] == (22016, 4096)
    assert shapes["action_encoder.linear_1.weight"] == (2048, 16)
    groups = shards(((n, s.numel() * 2) for n, s in shapes.items()), 4 << 30)
    assert [name for group in groups for name in group] == list(shapes)
    assert max(sum(shapes[n].numel() * 2 for n in group) for group in groups) <= 4 << 30


def test_wrong_tensors_are_refused_by_name(tmp_path):
    def case(change, message):
        folder = written(tmp_path / "a")
        change_tensors(folder, change)
        with pytest.raises(CheckpointError, match=message):
            load(folder)

    case(lambda t: t.pop("backbone.norm.weight"), r"missing tensors \['backbone.norm.weight'\]")
    case(lambda t: t.update({"extra": torch.ones(1)}), r"unknown tensors \['extra'\]")
    case(
        lambda t: t.update({"action_head.bias": torch.ones(3)}),
        r"action_head.bias is \[3\], the model needs \[8\]",
    )
    case(
        lambda t: t.update({"action_head.bias": torch.full((8,), torch.nan)}),
        "action_head.bias holds NaN or infinite",
    )
    case(
        lambda t: t.update({"action_head.bias": torch.ones(8, dtype=torch.int32)}),
        "action_head.bias is torch.int32",
    )


def test_tensor_in_two_shards_is_refused(tmp_path):
    folder = written(tmp_path / "a", shard_bytes=40_000)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    tensors, other = load_file(first), load_file(second)
    name = next(iter(other))
    save_file({**tensors, name: other[name]}, first)
    reseal(folder)
    with pytest.raises(CheckpointError, match=f"{name} appears twice"):
        load(folder)


def test_a_shard_that_is_not_there_is_refused_whether_or_not_the_manifest_knows(tmp_path):
    folder = written(tmp_path / "a", shard_bytes=40_000)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    names = sorted(load_file(shard))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][shard.name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"missing tensors .*{names[0]}"):
        load(folder)


def test_damaged_files_are_refused_by_name(tmp_path):
    def case(name, change, message, seal=False):
        folder = written(tmp_path / "a")
        change(folder / name)
        if seal:
            reseal(folder)
        with pytest.raises(CheckpointError, match=message):
            load(folder)

    model = "model-00001-of-00001.safetensors"
    case(model, lambda p: p.unlink(), f"{model} is missing")
    case("vqgan.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-7]), "vqgan.safetensors has .* bytes")

    def flip(path):
        data = bytearray(path.read_bytes())
        data[-3] ^= 0xFF
        path.write_bytes(bytes(data))

    case(model, flip, f"{model} differs from its manifest")
    case(model, lambda p: p.write_bytes(b"junk" * 10), f"{model} is damaged", seal=True)
    case("manifest.json", lambda p: p.unlink(), "manifest.json is missing")
    case("manifest.json", lambda p: p.write_text("[]"), "manifest.json is damaged")
    case("config.json", lambda p: p.write_text("{}"), "format and model", seal=True)
    case("config.json", lambda p: p.write_text("{"), "Expecting", seal=True)
    case("tokenizer.json", lambda p: p.write_text("{}"), r"not a tokenizer\.json", seal=True)
    case("normalization.json", lambda p: p.write_text("{}"), "normalization must hold", seal=True)
    case("embodiment.yaml", lambda p: p.write_bytes(b"\xff\xfe\xff"), "not readable", seal=True)


def test_missing_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match="vipra init-checkpoint"):
        load(tmp_path / "nowhere")


def test_manifest_cannot_point_outside_its_folder(tmp_path):
    folder = written(tmp_path / "a")
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    (tmp_path / "model-x.safetensors").write_bytes(b"x")
    data["files"]["../model-x.safetensors"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"model-x\.safetensors is missing"):
        load(folder)


def test_pickle_in_place_of_weights_is_never_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "executed").touch, ()

    folder = written(tmp_path / "a")
    (path,) = folder.glob("model-*.safetensors")
    path.write_bytes(pickle.dumps(Evil()))
    reseal(folder)
    with pytest.raises(CheckpointError, match="damaged"):
        load(folder)
    assert not (tmp_path / "executed").exists()


def test_parts_that_do_not_fit_are_refused(tmp_path):
    config, tokenizer, normalizer, text = parts()
    with pytest.raises(CheckpointError, match="8 dimensions, the model 7"):
        init_checkpoint(config.with_embodiment(7, 14), tmp_path / "a", tokenizer, normalizer, text)
    relative = dataclasses.replace(config, representation="relative")
    with pytest.raises(CheckpointError, match="absolute joints, the model for relative"):
        init_checkpoint(relative, tmp_path / "a", tokenizer, normalizer, text)
    wide = Tokenizer.train([f"word{i}" for i in range(400)], 400)
    with pytest.raises(CheckpointError, match="text table 300"):
        init_checkpoint(config, tmp_path / "a", wide, normalizer, text)
    assert not (tmp_path / "a").exists()


def test_writing_never_replaces_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    config, *rest = parts()
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        init_checkpoint(config, tmp_path, *rest)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_pretrained_checkpoint_has_neither_action_heads_nor_an_embodiment(tmp_path):
    config, tokenizer, normalizer, _ = parts(action_heads="none")
    init_checkpoint(config, tmp_path / "a", tokenizer, None, None)
    loaded = load(tmp_path / "a")
    assert loaded.policy.action_head is None and loaded.normalizer is None and loaded.embodiment is None
    assert save(tmp_path / "b", loaded) == loaded.hash
    with pytest.raises(CheckpointError, match="none must not have normalization"):
        init_checkpoint(config, tmp_path / "c", tokenizer, normalizer, None)
    with pytest.raises(CheckpointError, match="flow needs embodiment"):
        init_checkpoint(parts()[0], tmp_path / "c", tokenizer, normalizer, None)


def test_bins_travel_with_discrete_heads_and_only_with_them(tmp_path):
    rng = np.random.default_rng(0)
    cut = bins.fit(rng.uniform(0, 1, (50, 14, 8)), NAMES, KINDS, 15)
    config, *rest = parts(action_heads="ar", action_vocab=cut.vocab)
    init_checkpoint(config, tmp_path / "a", *rest, bins=cut)
    loaded = load(tmp_path / "a")
    assert loaded.bins == cut and save(tmp_path / "b", loaded) == loaded.hash
    with pytest.raises(CheckpointError, match="ar needs bins"):
        init_checkpoint(config, tmp_path / "c", *rest)
    with pytest.raises(CheckpointError, match="flow must not have bins"):
        init_checkpoint(parts()[0], tmp_path / "c", *rest, bins=cut)
    with pytest.raises(CheckpointError, match=f"bins need {cut.vocab} action ids, the model has 5"):
        init_checkpoint(dataclasses.replace(config, action_vocab=5), tmp_path / "c", *rest, bins=cut)
    other = dataclasses.replace(cut, names=NAMES[::-1])
    with pytest.raises(CheckpointError, match="bins are of"):
        init_checkpoint(config, tmp_path / "c", *rest, bins=other)


def test_progress_ends_at_the_whole_and_never_goes_back(tmp_path):
    seen = []
    load(written(tmp_path / "a"), progress=lambda stage, done, total: seen.append((stage, done, total)))
    counts = [done for _, done, _ in seen]
    assert counts == sorted(counts) and counts[0] > 0
    total = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors"))
    assert seen[-1] == ("reading checkpoint", total, total)


def test_what_we_write_is_safetensors_own_format(tmp_path):
    folder = written(tmp_path / "a")
    (path,) = folder.glob("model-*.safetensors")
    tensors = load_file(path)
    save_file(tensors, tmp_path / "theirs.safetensors")
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert set(tensors) == set(theirs) and all(torch.equal(tensors[n], theirs[n]) for n in theirs)
    assert path.stat().st_size == pytest.approx((tmp_path / "theirs.safetensors").stat().st_size, rel=1e-3)


def test_full_disk_says_how_much_is_missing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    config, *rest = parts()
    with pytest.raises(CheckpointError, match=r"the disk has 0\.00 GiB free: free .* GiB; then run it again"):
        init_checkpoint(config, tmp_path / "a", *rest)


def test_a_wrong_checksum_is_named_rather_than_what_it_led_to(tmp_path):
    folder = written(tmp_path / "a")
    (path,) = folder.glob("model-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"  # a NaN
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="differs from its manifest"):
        load(folder)
    with pytest.raises(CheckpointError, match="NaN"):
        load(folder, verify=False)
