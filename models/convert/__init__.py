"""Released weights to our checkpoint folders: `vipra convert` (cli.py).

`streaming.py` and `pickles.py` read the files; `lwm.py`, `vipra.py` and `vqgan.py` say which tensor becomes
which; `sentencepiece.py` and `statistics.py` bring the tokenizer and the action statistics; `laq.py` is for
the latent action model. Imports torch, numpy and tokenizers; of ours, `models` and `config`. No JAX, no flax.
"""


class ConvertError(ValueError):
    """A released file is damaged, unknown or does not fit; the message names the file, what and where."""
