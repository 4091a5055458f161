"""LLaMA's `tokenizer.model` (a SentencePiece protobuf) -> tokenizer.json, reproducing upstream's ids.

Upstream's tokenizer (transformers 4.29) cuts `<s>`, `</s>` and `<unk>` out of a text, strips the spaces
beside them, and gives every remaining piece of text to SentencePiece, which puts one space in front of it.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from models.convert import ConvertError
from models.tokenizer import SPECIALS, Tokenizer, TokenizerError

SPACE = "\u2581"  # SentencePiece's visible space
BYTE, BPE = 6, 2  # of SentencePiece.type, TrainerSpec.model_type


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message. Raises ValueError where it is damaged."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else None)
        if length is None or at + length > len(data):
            raise ValueError(f"damaged at byte {at}")
        yield number, data[at : at + length]
        at += length


def read(path: Path | str) -> Tokenizer:
    """A LLaMA `tokenizer.model`, or a tokenizer.json. Raises ConvertError."""
    path = Path(path)
    try:
        if path.suffix == ".json":
            return Tokenizer.from_file(path)
        return _build(path.read_bytes())
    except (OSError, TokenizerError) as error:
        raise ConvertError(f"{path}: {error}") from error
    except (ValueError, IndexError, struct.error) as error:
        raise ConvertError(f"{path} is not LLaMA's tokenizer.model: {error}") from error


def _build(data: bytes) -> Tokenizer:
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(data):
        if number == 1:  # SentencePiece: piece, score, type
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, 1)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    for what, found, wanted in (
        ("model type", trainer.get(3, 1), BPE),
        ("byte fallback", trainer.get(35, 0), 1),
        ("normalisation", normalizer.get(1, b""), b"identity"),
        ("space in front", normalizer.get(3, 1), 1),
        ("removal of repeated spaces", normalizer.get(4, 1), 0),
        ("first pieces", tuple(piece for piece, _, _ in pieces[:3]), SPECIALS),
        ("byte pieces", sum(kind == BYTE for _, _, kind in pieces), 256),
    ):
        if found != wanted:
            raise ValueError(f"{what} is {found!r}, expected {wanted!r}")
    vocabulary = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges = [
        (-score, piece[:cut], piece[cut:])
        for piece, score, kind in pieces
        if kind == 1
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    merges.sort(key=lambda m: (m[0], vocabulary[m[1]], vocabulary[m[2]]))
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(a, b) for _, a, b in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    inner.add_special_tokens([AddedToken(s, lstrip=True, rstrip=True, normalized=False) for s in SPECIALS])
    return Tokenizer(inner)
