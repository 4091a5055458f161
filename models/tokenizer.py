"""Text tokenizer: a HF `tokenizer.json` from the checkpoint's folder (LLaMA's for 7B, our own small BPE
otherwise).
"""

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIALS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, as LLaMA's


class TokenizerError(ValueError):
    """A tokenizer file is unreadable or lacks what the prompt needs."""


class Tokenizer:
    """`encode` adds nothing; `bos` and `eos` are the ids of `<s>` and `</s>`. Other tags are plain text."""

    def __init__(self, inner: tokenizers.Tokenizer):
        self.inner = inner
        inner.no_padding()
        inner.no_truncation()
        self.bos, self.eos = inner.token_to_id("<s>"), inner.token_to_id("</s>")
        if self.bos is None or self.eos is None:
            raise TokenizerError("tokenizer has no <s> and </s>")

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)

    def to_json(self) -> str:
        """Content of tokenizer.json."""
        return self.inner.to_str(pretty=True)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """Raises TokenizerError."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except TokenizerError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"not a tokenizer.json: {error}") from error

    @classmethod
    def from_file(cls, path: Path | str) -> "Tokenizer":
        """Raises TokenizerError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path} is not readable: {error}") from error
        return cls.from_json(text)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 512) -> "Tokenizer":
        """Byte-level BPE of at most `vocab_size` ids: any text encodes, nothing is unknown."""
        inner = tokenizers.Tokenizer(models.BPE(unk_token=None))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                min_frequency=1,
                special_tokens=list(SPECIALS),
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        return cls(inner)
