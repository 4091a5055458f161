"""Instructions -> prompt ids, once each."""

from models import sequence
from models.tokenizer import Tokenizer
from training.run import TrainingError


class Prompts:
    """`prompts(instruction)`: ids up to `<vision>`. Raises TrainingError for one that serving could not
    hold.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int):
        self.tokenizer, self.limit, self.known = tokenizer, limit, {}

    def __call__(self, instruction: str) -> list[int]:
        if instruction not in self.known:
            ids = sequence.encode_prompt(self.tokenizer, instruction)
            if len(ids) > self.limit:
                raise TrainingError(
                    f"instruction {instruction[:60]!r} is {len(ids)} tokens with its prompt, the model takes "
                    f"{self.limit}: shorten it, or train a vocabulary on such text (vipra train tokenizer)"
                )
            self.known[instruction] = ids
        return self.known[instruction]
