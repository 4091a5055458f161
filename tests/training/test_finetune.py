"""Stage 3 learns what demonstrations say: both modes, one episode exactly, and nothing from another robot."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from config.dataset import DatasetConfig, Mixture
from config.loading import ConfigError
from config.training import FinetuneRecipe, Lora, TokenizerRecipe, load_recipe
from models import checkpoint, sequence
from models.checkpoint import CheckpointError
from models.config import SIZES, VQGANConfig
from models.flow import integrate
from models.policy import Policy
from models.tokenizer import Tokenizer
from models.vqgan import VQGAN
from policy_server.engine import Engine, Request
from tests.training.data import made
from tests.training.data.made import ROBOT
from training import distributed, estimate, finetune, loop, start
from training.actions import Corpus, Demonstration, chunk
from training.data import index
from training.data.augment import prepare
from training.data.episode import DataError
from training.data.loader import collate
from training.data.open import open_dataset
from training.finetune import Finetune, shared_prefix_loss
from training.run import Run, TrainingError
from training.tokenizer import TokenizerStage, vocabulary

ROOT = Path(__file__).parents[2]
BRIDGE = ROOT.parent / "shared" / "data" / "bridge_v2_sample"
LEROBOT = ROOT.parent / "shared" / "data" / "lerobot_v3_video"
VQ = VQGANConfig(32, (8, 8, 8, 16), 1, 8, 64, norm_groups=4)  # 16 tokens a frame
SMALL = dataclasses.replace(
    SIZES["vipra_tiny"], name="small", hidden=64, mlp_hidden=128, layers=2, heads=2, vision_vocab=66, vqgan=VQ
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "small", SMALL)
    monkeypatch.setattr(start, "SIZES", SIZES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ranks():
    yield distributed.start("cpu")
    distributed.stop()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """What a short training comes to depends on the order in which threads add up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def frame_tokenizer(tmp_path_factory) -> str:
    """A checkpoint folder with a VQGAN that tells the frames of one episode apart."""
    frames = np.random.default_rng(0).integers(256, size=(10, 32, 32, 3)).astype(np.uint8)
    if BRIDGE.is_dir():
        episode = open_dataset(DatasetConfig(path=str(BRIDGE))).episode(0)
        frames = prepare(episode.frames(episode.views[0], range(10)), 32)
    torch.manual_seed(0)
    vqgan = VQGAN(VQ)
    x, optimizer = vqgan.to_input(torch.from_numpy(frames)), torch.optim.AdamW(vqgan.parameters(), 4e-3)
    for i in range(1000):
        out = vqgan(x)
        optimizer.zero_grad()
        ((out.reconstruction - x).abs().mean() + out.loss).backward()
        optimizer.step()
        if i % 10 == 0:
            vqgan.restart_codes(out.latents, out.codes)
        if i % 10 == 9 and i > 30:
            codes = copy.deepcopy(vqgan).bfloat16().float().encode(x)
            if len(torch.cat([codes[[0, *range(9)]], codes], 1).unique(dim=0)) == 10:
                break  # every pair (o_{t-1}, o_t) is told from every other
    else:
        pytest.fail("the tokenizer gives two pairs of pictures the same codes")
    plan = TokenizerRecipe(**{**recipe("").model_dump(include=SHARED), "stage": "tokenizer"})
    stage = TokenizerStage(plan, vqgan, torch.ones(1, 32, 32))
    stage.words = vocabulary(["put the cup away", "move"], SMALL.text_vocab)
    folder = tmp_path_factory.mktemp("tokenizer") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "small", SMALL)
        stage.export(folder, SimpleNamespace(last=dict), SimpleNamespace(first=True))
    return str(folder)


SHARED = {"model", "steps", "global_batch", "micro_batch", "optimizer", "validation"}


def recipe(tokenizer: str, **changes) -> FinetuneRecipe:
    fields = {
        "stage": "finetune",
        "model": "small",
        "tokenizer": tokenizer or None,
        "embodiment": "unused",
        "steps": 2,
        "global_batch": 4,
        "micro_batch": 4,
        "optimizer": {"learning_rate": 1e-3},
        "validation": {"every": 1000, "samples": 4},
    }
    return FinetuneRecipe(**{**fields, **changes})


def demonstration(length: int = 12, seed: int = 0) -> Demonstration:
    rng = np.random.default_rng(seed)
    actions = rng.uniform(0, 1, (length, 7)).astype(np.float32)
    codes = rng.integers(64, size=(length, SMALL.frame_tokens)).astype(np.uint16)
    return Demonstration("e", "move", codes, actions, actions)


def stage_for(plan: FinetuneRecipe, *demos: Demonstration, robot=(ROBOT, "name: bridge\n")) -> Finetune:
    stage = Finetune(plan, *robot)
    corpus = Corpus({(0, i): demo for i, demo in enumerate(demos)}, (1.0,))
    stage.fit(corpus, corpus)
    return stage


def trained(plan, ranks, folder, *demos, **robot) -> tuple[Finetune, Run]:
    stage, run = stage_for(plan, *demos, **robot), Run(folder, plan)
    try:
        assert loop.train(stage, plan, run, ranks, stage.samples())
    finally:
        run.close()
    return stage, run


def inputs(dim: int = 4, **choices):
    config = SMALL.with_embodiment(action_dim=dim, horizon=4, **choices)
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["move both hands", "wave"], 300)
    texts = [sequence.encode_prompt(tokenizer, task) for task in ("move both hands", "wave")]
    codes = torch.randint(64, (2, 2, config.frame_tokens))
    bridge = torch.tensor(sequence.encode_bridge(tokenizer))
    return Policy(config), texts, codes, torch.randn(2, 4, dim), bridge


def test_samples_of_one_prefix_do_not_see_each_other():
    policy, texts, codes, actions, bridge = inputs()
    torch.manual_seed(1)
    shared = shared_prefix_loss(policy, texts, codes, actions, bridge, samples=3)["flow"]
    torch.manual_seed(1)
    repeated = policy.loss(
        [text for text in texts for _ in range(3)],
        codes.repeat_interleave(3, 0),
        actions.repeat_interleave(3, 0),
        bridge,
    )
    assert torch.allclose(shared, repeated, atol=1e-5)


def test_masked_actions_do_not_count():
    policy, texts, codes, actions, bridge = inputs()
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    changed = actions.clone()
    changed[0, 2:] = 50.0
    losses = []
    for a in (actions, changed):
        torch.manual_seed(1)
        losses.append(shared_prefix_loss(policy, texts, codes, a, bridge, valid=mask)["flow"])
    assert losses[0] < 10 and torch.allclose(*losses, atol=1e-4)  # causal chunk: padding comes last


def test_the_flow_head_learns_both_modes_and_not_their_mean():
    policy, texts, codes, _, bridge = inputs(dim=2, chunk_attention="bidirectional")
    checkpoint.initialize(policy, 0)
    text, codes = texts[:1], codes[:1]
    mode = torch.tensor([[1.0, -1.0]]).expand(4, 2)
    both, twice = torch.stack([mode, -mode]), codes.expand(2, -1, -1)
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-3)
    torch.manual_seed(0)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        loss = shared_prefix_loss(policy, text * 2, twice, both, bridge, samples=16)["flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(64, 4, 2)

    def velocity(u, s):
        return policy.velocity(text * 64, codes.expand(64, -1, -1), u, torch.full((64,), s), bridge)

    with torch.no_grad():
        sampled = integrate(velocity, noise)
    near = [(sampled - m).square().mean((1, 2)) < 0.3 for m in (mode, -mode)]
    assert sum(n.float().mean() for n in near) > 0.8
    assert all(n.float().mean() > 0.2 for n in near)


@pytest.mark.skipif(not BRIDGE.is_dir(), reason="needs ../shared/data/bridge_v2_sample")
def test_one_real_episode_is_learned_exactly_and_the_checkpoint_acts_so(ranks, frame_tokenizer, tmp_path):
    plan = recipe(
        frame_tokenizer,
        data={"datasets": [{"path": str(BRIDGE), "max_episodes": 1}]},
        steps=540,
        global_batch=10,
        micro_batch=10,
        samples=8,
        optimizer={"learning_rate": 5e-3, "betas": (0.9, 0.95)},
        schedule={"kind": "cosine", "warmup": 30},
        chunk_attention="bidirectional",
        ema=0.97,
        checkpoint_every=10_000,
        validation={"every": 10_000, "samples": 10},
    )
    vqgan = start.open_start(plan.tokenizer).vqgan()
    run = Run(tmp_path / "run", plan)
    corpus, _ = finetune.read_corpus(plan.data, ROBOT, vqgan, ranks, run)
    stage = Finetune(plan, ROBOT, "name: bridge\n")
    stage.fit(corpus, corpus)
    loop.train(stage, plan, run, ranks, stage.samples())
    last = run.last()
    assert last["validation/action_mse"] < 1e-3 < 0.5 < last["validation/mean_action_mse"]
    (episode,) = corpus.episodes.values()
    cut = [chunk(episode.actions, t, ROBOT.horizon) for t in range(len(episode.actions))]
    chunks, masks = np.array([c for c, _ in cut]), np.array([m for _, m in cut])
    off = (chunks - chunks.mean(0)) / stage.normalizer.scale
    measured = [t for _, t in corpus.spread(10)]
    squared = off[measured][masks[measured]] ** 2
    assert last["validation/mean_action_mse"] == pytest.approx(squared.mean(), rel=1e-3)
    assert (tmp_path / "run" / "images" / "open_loop-000540.png").is_file()
    stage.export(tmp_path / "out", run, ranks)
    run.close()

    loaded = checkpoint.load(tmp_path / "out", serving=True)
    demo = corpus.episodes[0, 0]
    text = [sequence.encode_prompt(loaded.tokenizer, demo.instruction)]
    codes = torch.from_numpy(demo.codes[[1, 2]].astype(np.int64))[None]
    noise = torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(0))
    bridge = torch.tensor(sequence.encode_bridge(loaded.tokenizer))
    sampled = loaded.policy.sample_recomputing(text, codes, noise, bridge)
    error = sampled - torch.from_numpy(loaded.normalizer.normalize(chunk(demo.actions, 2, 4)[0]))
    assert error.square().mean() < 0.01  # weights are stored in bf16


def test_adapters_merge_into_the_function_they_computed(ranks, frame_tokenizer, tmp_path):
    before, run = trained(recipe(frame_tokenizer), ranks, tmp_path / "base", demonstration())
    before.export(tmp_path / "start", run, ranks)
    plan = recipe(
        "", start=str(tmp_path / "start"), lora=Lora(rank=4, alpha=8), dropout=0.0,
        optimizer={"learning_rate": 2e-2}, steps=3,
    )  # fmt: skip
    stage, run = trained(plan, ranks, tmp_path / "lora", demonstration())
    assert not [n for n, p in stage.module.named_parameters() if p.requires_grad and "base_layer" in n]
    stage.export(tmp_path / "merged", run, ranks)
    merged, base = (checkpoint.load(tmp_path / name).policy for name in ("merged", "start"))
    batch = stage.prepare(collate([stage.samples()[n] for n in range(4)]), ranks.device)
    bridge = torch.tensor(stage.module.bridge)
    arguments = (batch["texts"], batch["codes"], batch["actions"], torch.full((4,), 0.5), bridge)
    with torch.no_grad():
        stage.module.unshard()
        adapted = finetune.shared_prefix(stage.module.policy, *arguments)[0]
        plain, untouched = merged.velocity(*arguments), base.velocity(*arguments)
    assert torch.allclose(adapted, plain, atol=3e-2) and not torch.allclose(plain, untouched, atol=0.1)


def test_adapters_with_discrete_actions_measure_the_loss_alone_and_say_so(
    ranks, frame_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(index, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(ROBOT.model_dump(mode="json")))
    data = {"datasets": [{"path": str(made.bridge(tmp_path / "data"))}], "validation_share": 0.3}
    robot = str(tmp_path / "robot.yaml")
    plan = recipe(frame_tokenizer, data=data, embodiment=robot, head="ar", lora=Lora(rank=4))
    said = []
    log = SimpleNamespace(say=said.append, track=lambda items, _: items)
    stage = finetune.build(plan, ranks, log)
    assert any("validation measures the loss alone" in line for line in said)
    loop.set_up(stage, plan, ranks)
    assert stage.validate(1, log, ranks, plan).keys() == {"loss"}


@pytest.mark.parametrize("head", ["flow", "ar"])
def test_a_joint_that_never_moves_trains_and_saves(head, ranks, frame_tokenizer, tmp_path):
    demo = demonstration()
    demo.actions[:, 2] = 0.3
    stage, run = trained(recipe(frame_tokenizer, head=head), ranks, tmp_path / "run", demo)
    assert np.isfinite(run.last()["loss"]) and 0 < run.last()["validation/action_mse"] < 100
    stage.export(tmp_path / "out", run, ranks)
    loaded = checkpoint.load(tmp_path / "out")
    assert loaded.normalizer.scale[2] > 0 and (loaded.bins is not None) == (head == "ar")


@pytest.mark.parametrize("head", ["flow", "ar"])
def test_one_action_in_place_of_a_chunk_is_trained_and_served(head, ranks, frame_tokenizer, tmp_path):
    """-AC at finetuning."""
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(ROBOT.model_dump(mode="json")))
    plan = recipe(frame_tokenizer, head=head, horizon=1, embodiment=str(tmp_path / "robot.yaml"))
    stage, run = trained(plan, ranks, tmp_path / "run", demonstration(), robot=finetune.embodiment(plan))
    assert stage.module.policy.config.horizon == 1 and np.isfinite(run.last()["validation/action_mse"])
    stage.export(tmp_path / "out", run, ranks)
    engine = Engine(checkpoint.load(tmp_path / "out", serving=True))
    request = Request(np.zeros((2, 32, 32, 3), np.uint8), "move", 0, None)
    assert engine.infer([request])[0].actions.shape == (1, 7) and engine.metadata.horizon == 1


@pytest.mark.parametrize("head", ["flow", "ar"])
def test_a_predicted_frame_before_the_actions_trains_and_is_not_served(
    head, ranks, frame_tokenizer, tmp_path
):
    """+SP3: the actions follow the real o_{t+H} in training, and the imagined one when they are sampled."""
    demo = demonstration()
    plan = recipe(frame_tokenizer, head=head, future_weight=0.5)
    stage, run = trained(plan, ranks, tmp_path / "run", demo)
    last = run.last()
    actions = last["flow" if head == "flow" else "action"]
    assert last["loss"] == pytest.approx(actions + 0.5 * last["vision"], rel=1e-4)
    rows = [stage.chunks(stage.held_out).read((0, 0), t) for t in (3, 10)]
    assert (rows[0]["codes"][2] == demo.codes[7]).all() and (rows[1]["codes"][2] == demo.codes[11]).all()

    batch = stage.prepare(collate(rows), ranks.device)
    other = {**batch, "codes": batch["codes"].clone()}
    other["codes"][:, 2] = (other["codes"][:, 2] + 1) % 64
    stage.module.eval()

    def computed(what, batch):
        torch.manual_seed(0)
        with torch.no_grad():
            return what(batch, 1)

    kind = "flow" if head == "flow" else "action"
    assert computed(stage.module, batch)[kind] != computed(stage.module, other)[kind]
    assert torch.equal(computed(stage.sampled, batch), computed(stage.sampled, other))

    stage.module.unshard()
    policy, codes = stage.module.policy, batch["codes"]
    given = sequence.vision_ids(policy.config, codes[:, :2], more=True)
    future = sequence.close_each(codes[:, 2:], policy.config.end_of_vision)
    counted = torch.ones_like(future, dtype=torch.bool)
    segments = [sequence.Segment("vision", given), sequence.Segment("vision", future, counted)]
    with torch.no_grad():
        alone = policy.token_losses(batch["texts"], segments)["vision"]
    torch.testing.assert_close(computed(stage.module, batch)["vision"], alone, atol=1e-5, rtol=1e-5)

    stage.export(tmp_path / "out", run, ranks)
    with pytest.raises(CheckpointError, match=r"\+SP3: before each chunk it draws a frame of 16 tokens"):
        checkpoint.load(tmp_path / "out", serving=True)


def test_augmentation_changes_both_frames_of_a_pair_alike_and_nothing_held_out(
    ranks, frame_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(index, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "robot.yaml").write_text(yaml.safe_dump(ROBOT.model_dump(mode="json")))
    data = {"datasets": [{"path": str(made.bridge(tmp_path / "data"))}], "validation_share": 0.3}
    measured = {}
    for name, augmentation in {"plain": None, "augmented": {}}.items():
        plan = recipe(
            frame_tokenizer, data=data, embodiment=str(tmp_path / "robot.yaml"), steps=1,
            augmentation=augmentation, optimizer={"learning_rate": 1e-12},
        )  # fmt: skip
        run = Run(tmp_path / name, plan)
        stage = finetune.build(plan, ranks, run)
        samples = stage.samples()
        assert loop.train(stage, plan, run, ranks, samples)
        run.close()
        measured[name] = run.last()
    assert measured["plain"]["loss"] != measured["augmented"]["loss"]
    for key in ("validation/loss", "validation/action_mse"):
        assert measured["plain"][key] == measured["augmented"][key]
    seen = [samples[n] for n in range(30)]
    first = [s["frames"] for s in seen if s["frame"] == 0]  # there o_{t-1} is o_t
    assert first and all((pair[0] == pair[1]).all() for pair in first)
    episodes = [f"0/{samples.readers[0].key(i)}" for i in range(4)]
    for sample in seen:
        plain = samples.read(0, episodes.index(sample["key"]), int(sample["frame"]))["frames"]
        assert (plain != sample["frames"]).any((1, 2, 3)).all()


def test_episodes_with_actions_that_are_not_numbers_are_skipped_and_said(
    ranks, frame_tokenizer, tmp_path, monkeypatch
):
    actions = made.actions

    def broken(episode):
        values = actions(episode)
        values[4, 2] = np.nan if episode == 1 else values[4, 2]
        return values

    monkeypatch.setattr(made, "actions", broken)
    data = {"datasets": [{"path": str(made.bridge(tmp_path / "data", 3))}]}
    vqgan, said = start.open_start(frame_tokenizer).vqgan(), []
    log = SimpleNamespace(say=said.append, track=lambda items, _: items)
    train, _ = finetune.read_corpus(Mixture(**data), ROBOT, vqgan, ranks, log)
    assert list(train.episodes) == [(0, 0), (0, 2)] and len(said) == 1
    assert "action of frame 4 is not finite" in said[0]
    with pytest.raises(DataError, match="not finite"):
        finetune.read_corpus(Mixture(**data, on_error="raise"), ROBOT, vqgan, ranks, log)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rate_hz": 10.0}, "recorded at 5 Hz, embodiment bridge says 10 Hz"),
        ({"dimensions": ROBOT.dimensions[1:]}, r"actions are \[10, 7\], embodiment bridge has 6 dimensions"),
    ],
)
def test_demonstrations_of_another_rate_or_size_are_refused(change, says, ranks, tmp_path):
    mixture = Mixture(datasets=[{"path": str(made.bridge(tmp_path / "data"))}])
    log = SimpleNamespace(track=lambda items, _: items)
    with pytest.raises(TrainingError, match=says):
        finetune.read_corpus(mixture, ROBOT.model_copy(update=change), None, ranks, log)


def test_starts_and_tokenizers_of_another_model_are_refused(frame_tokenizer):
    with pytest.raises(TrainingError, match="is a small, the recipe is for model vipra_tiny"):
        start.parts(recipe("", model="vipra_tiny", start=frame_tokenizer))
    with pytest.raises(TrainingError, match="4x4 codes of 64, model vipra_tiny needs 8x8 of 512"):
        start.parts(recipe(frame_tokenizer, model="vipra_tiny"))
    with pytest.raises(TrainingError, match="no frame tokenizer: give --start CHECKPOINT, or --tokenizer"):
        start.parts(recipe(""))


def test_demonstrations_without_words_are_counted_aloud(ranks, frame_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "cache_folder", lambda: tmp_path / "cache")
    said, vqgan = [], start.open_start(frame_tokenizer).vqgan()
    log = SimpleNamespace(say=said.append, track=lambda items, _: items)
    for words in ("stack", " "):
        data = {"datasets": [{"path": str(made.bridge(tmp_path / f"data{len(words)}", 3, words))}]}
        finetune.read_corpus(Mixture(**data), ROBOT, vqgan, ranks, log)
    assert said == ["3 of 3 episodes have no instruction: they are learned for no words"]


def test_instructions_may_be_empty_and_in_any_writing_but_not_too_long(ranks, frame_tokenizer, tmp_path):
    words = ("", "把红色杯子叠起来", "ضع الكوب جانبًا", "🤖 pick")
    demos = [dataclasses.replace(demonstration(seed=i), instruction=w) for i, w in enumerate(words)]
    stage, run = trained(recipe(frame_tokenizer), ranks, tmp_path, *demos)
    assert np.isfinite(run.last()["loss"]) and len({tuple(stage.prompts(w)) for w in words}) == 4
    wordy = dataclasses.replace(demonstration(), instruction="杯" * 100)
    with pytest.raises(
        TrainingError, match=r"is \d+ tokens with its prompt, the model takes 128: shorten it"
    ):
        stage_for(recipe(frame_tokenizer), demos[0], wordy)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_the_estimate_of_weights_and_optimiser_is_what_they_take(lora, ranks, frame_tokenizer):
    plan = recipe(frame_tokenizer, lora=lora, precision="bfloat16" if lora else "float32")
    stage = stage_for(plan, demonstration())
    planned = estimate.memory(stage, plan, 1, 0)
    optimizer = loop.set_up(stage, plan, ranks)
    batch = collate([stage.samples()[n] for n in range(4)])
    loop.optimise(stage, plan, ranks, optimizer, batch, 1)
    moments = [t for s in optimizer.state.values() for key, t in s.items() if key != "step"]
    assert planned["optimiser"] == sum(t.nbytes for t in moments) == 2 * planned["gradients"]
    assert planned["weights"] == sum(p.nbytes for p in stage.module.parameters())


@pytest.mark.skipif(not LEROBOT.is_dir(), reason="needs ../shared/data/lerobot_v3_video")
def test_demonstrations_of_another_robot_are_refused_before_training(ranks, tmp_path):
    plan = recipe("", data={"datasets": [{"path": str(LEROBOT)}]})
    run = Run(tmp_path, plan)
    with pytest.raises(TrainingError, match="action 0 of 16 is a0, embodiment bridge has x0"):
        finetune.read_corpus(plan.data, ROBOT, None, ranks, run)
    run.close()


def test_recipes_that_ship_are_valid_and_mistakes_are_named():
    for path in sorted((ROOT / "config" / "training").glob("*.yaml")):
        load_recipe(str(path))
    with pytest.raises(ConfigError, match=r"finetune_tiny.yaml: optimizer.momentum: unknown key"):
        load_recipe("finetune_tiny", ["optimizer.momentum=0.9"])
    with pytest.raises(ConfigError, match="global_batch 24 is not a multiple of micro_batch 7"):
        load_recipe("finetune_tiny", ["micro_batch=7"])
    with pytest.raises(ConfigError, match="history_lags need augmentation: null"):
        load_recipe("finetune_sim", ["history_lags=[0.15,0.85]"])
    assert load_recipe("finetune_tiny", ["optimizer.learning_rate=1e-4"]).optimizer.learning_rate == 1e-4


def test_a_new_vision_table_keeps_the_codebooks_distances(frame_tokenizer):
    frames = start.open_start(frame_tokenizer)
    source, fresh = start.weights_source(SMALL, None, frames, 0)
    table = source("backbone.vision_embedding.weight")[: VQ.codebook_size]
    codes = frames.codebook()
    assert "backbone.vision_embedding.weight" in fresh and 0.005 < table.std() < 0.04
    near, far = torch.pdist(codes), torch.pdist(table)
    assert torch.corrcoef(torch.stack([near, far]))[0, 1] > 0.8
    again, _ = start.weights_source(SMALL, frames, frames, 0)
    known = frames.tensor("backbone.vision_embedding.weight")
    assert torch.equal(again("backbone.vision_embedding.weight"), known), "what was trained stays"
