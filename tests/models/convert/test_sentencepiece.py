"""Text ids are upstream's.

`llama_ids.json`: ids that upstream's tokenizer class gave in its pinned environment (transformers 4.29.2,
sentencepiece 0.2.0) with LLaMA's tokenizer.model; training and serving spell the same ids. With them, the
pieces of LLaMA's vocabulary that occur in those texts. Pieces that do not occur cannot change a merge, so
placeholders stand for them.
"""

import json
import struct
from pathlib import Path

import pytest

from models.convert import ConvertError
from models.convert.sentencepiece import read
from models.sequence import encode_bridge, encode_prompt
from models.tokenizer import Tokenizer

GOLDEN = json.loads((Path(__file__).parent / "llama_ids.json").read_text())


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | float | bytes | str) -> bytes:
    if isinstance(value, float):
        return varint(number * 8 + 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number * 8 + 2) + varint(len(value)) + value


def model(model_type: int = 2, fallback: int = 1, name: str = "identity", repeated: int = 0, drop: int = 0):
    """A tokenizer.model of LLaMA's kind."""
    known = {i: piece for i, piece in GOLDEN["pieces"]}
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    pieces += [
        (known.get(i, f"unused {i}"), float(259 - i), 1 if i in known else 5) for i in range(259, 32000)
    ]
    data = b"".join(field(1, field(1, p) + field(2, s) + field(3, k)) for p, s, k in pieces[drop:])
    trainer = field(3, model_type) + field(35, fallback)
    return data + field(2, trainer) + field(3, field(1, name) + field(3, 1) + field(4, repeated))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(model())
    return read(path)


def test_prompts_have_upstreams_ids_with_the_double_bos(llama):
    assert llama.vocab_size == 32000 and (llama.bos, llama.eos) == (1, 2)
    for prompt in GOLDEN["prompts"]:
        assert encode_prompt(llama, prompt["task"]) == prompt["ids"]
        assert prompt["ids"][:3] == [1, 1, 887]  # BOS, <s>, "_You": no piece for the space between


def test_other_fixed_texts_have_upstreams_ids(llama):
    for text in GOLDEN["texts"]:
        assert llama.encode(text["text"]) == text["ids"]
    assert encode_bridge(llama) == GOLDEN["texts"][0]["ids"]


def test_what_is_not_in_the_vocabulary_is_spelled_in_bytes_and_comes_back(llama):
    assert llama.encode("\u00fc") == [29871, 3 + 0xC3, 3 + 0xBC]
    for text in ("stack the cups \u00fc\U0001f916", "a  b"):
        assert llama.decode(llama.encode(text)) == text


def test_ids_survive_the_checkpoint(llama):
    again = Tokenizer.from_json(llama.to_json())
    for prompt in GOLDEN["prompts"]:
        assert encode_prompt(again, prompt["task"]) == prompt["ids"]


def test_json_is_taken_as_it_is(tmp_path):
    words = Tokenizer.train(["stack the cups"], 300)
    (tmp_path / "tokenizer.json").write_text(words.to_json())
    assert read(tmp_path / "tokenizer.json").encode("stack") == words.encode("stack")


@pytest.mark.parametrize(
    "content, message",
    [
        (model(model_type=1), "model type is 1, expected 2"),
        (model(fallback=0), "byte fallback is 0"),
        (model(name="nmt_nfkc"), "normalisation is b'nmt_nfkc'"),
        (model(repeated=1), "removal of repeated spaces is 1"),
        (model(drop=1), "first pieces"),
        (model()[:-9], "not LLaMA's tokenizer.model"),
        (b"", "not LLaMA's tokenizer.model"),
        (b"\xff" * 20, "not LLaMA's tokenizer.model"),
    ],
)
def test_another_kind_of_model_is_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ConvertError, match=message):
        read(tmp_path / "tokenizer.model")
    with pytest.raises(ConvertError):
        read(tmp_path / "nowhere.model")
