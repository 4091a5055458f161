import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import sequence
from models.sequence import Layout
from models.tokenizer import Tokenizer, TokenizerError
from tests.models.sizes import small


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    prompts = [sequence.PROMPT.format(task=task) for task in ("stack the cups", "fold the cloth")]
    return Tokenizer.train([*prompts, "<vision>", "</vision> <action>"], 300)


def test_prompt_starts_with_two_bos_and_ends_with_vision(tokenizer):
    ids = sequence.encode_prompt(tokenizer, "stack the cups")
    assert ids[:2] == [tokenizer.bos, tokenizer.bos]
    assert tokenizer.bos not in ids[2:]
    text = tokenizer.decode(ids)
    assert text.endswith("ASSISTANT:<vision>")
    assert "robot take to `stack the cups` ASSISTANT:" in text
    assert tokenizer.decode(sequence.encode_bridge(tokenizer)) == "</vision> <action>"


def test_vision_ids_close_frames_with_eof_and_eov():
    config = small()
    codes = torch.arange(32).view(1, 2, 16)
    ids = sequence.vision_ids(config, codes)[0].tolist()
    assert ids == [*range(16), config.end_of_frame, *range(16, 32), config.end_of_vision]


def test_positions_count_real_tokens_only():
    layout = Layout(text_slots=4, vision=2, bridge=1, horizon=2)
    rows = sequence.positions(torch.tensor([4, 2]), layout)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 1, 2, 3, 4, 5, 6]]
    assert sequence.positions(torch.tensor([4, 2]), layout, start=4).tolist() == rows[:, 4:].tolist()


@pytest.mark.parametrize("chunk", ["causal", "bidirectional"])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_mask_says_exactly_who_sees_whom(chunk, length):
    layout = Layout(text_slots=4, vision=3, bridge=2, horizon=3)
    mask = sequence.attention_mask(torch.tensor([length]), layout, chunk)[0, 0]
    first_real, first_action = 4 - length, layout.first_action
    for query in range(layout.slots):
        for key in range(layout.slots):
            both_actions = query >= first_action and key >= first_action
            wanted = key >= first_real and (key <= query or (chunk == "bidirectional" and both_actions))
            assert mask[query, key] == (wanted or key == query), (query, key)
    later = sequence.attention_mask(torch.tensor([length]), layout, chunk, start=4)[0, 0]
    assert torch.equal(later, mask[4:])


def test_text_longer_than_its_slots_is_refused():
    ids, lengths = sequence.pad_left([[5, 6], [7, 8, 9]], 4)
    assert ids.tolist() == [[0, 0, 5, 6], [0, 7, 8, 9]] and lengths.tolist() == [2, 3]
    with pytest.raises(ValueError, match="3 tokens does not fit 2 slots"):
        sequence.pad_left([[1, 2, 3]], 2)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives_the_byte_level_tokenizer(text):
    tokenizer = Tokenizer.train(["stack the cups"], 300)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_tokenizer_file_is_the_tokenizer(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    again = Tokenizer.from_file(path)
    assert again.encode("stack the red cup") == tokenizer.encode("stack the red cup")
    assert again.vocab_size == tokenizer.vocab_size <= 300


def test_what_is_not_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"not a tokenizer\.json"):
        Tokenizer.from_json("{}")
    with pytest.raises(TokenizerError, match="is not readable"):
        Tokenizer.from_file(tmp_path / "nowhere.json")
