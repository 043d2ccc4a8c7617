"""A byte-level BPE tokenizer for Python, trained on the stream that the model will read.

Every text can be encoded and comes back byte for byte; every text begins with `<|endoftext|>`, which parts documents in
the stream, so that a prompt looks like the beginning of a document.

Merges stay within the pieces of `PATTERN`. It is of the family that the paper uses (words with what precedes them,
digits by up to three, runs of punctuation, indentation less the space before the word), with three changes that keep
the binary tasks' answers on boundaries of their own:

- A line ends in a token of its own: `)` is the same token at the end of a line, and the end of a line can be an answer.
- A piece of punctuation holds one quote at most (or three in a row), with the string's prefix before it: `("` and
  `(f"` are one piece each, and an empty string is opened and closed like any other.
- Words take a space, dot, underscore or equals sign with them (` x`, `.add`, `_file`, `=None`), but no bracket and no
  quote.

Gao et al. 2025, appendix A.6. Trained by the `tokenizers` library; `save` and `Tokenizer.from_file` keep it as JSON.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from workbench.errors import UserError

END = "<|endoftext|>"
_SIGNS = r"[^\s\p{L}\p{N}\"']"  # punctuation other than quotes
PATTERN = "|".join(
    (
        r" ?(?:\"\"\"|''')",
        rf" ?{_SIGNS}*(?:(?<![\"'])[fbruFBRU])?[\"']{_SIGNS}*",  # a prefix after a quote would be the string "r"
        r"[ ._=]?\p{L}+",
        r" ?\p{N}{1,3}",
        rf" ?{_SIGNS}+",
        r"[\r\n]+",
        r"[^\S\r\n]+(?!\S)",
        r"[^\S\r\n]+",
    )
)
SMALLEST = 257  # every byte, and END


def train(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A tokenizer of at most `vocab` tokens; token 0 is END. Raises UserError if the bytes alone do not fit."""
    if vocab < SMALLEST:
        raise UserError(f"vocab={vocab} tokens do not hold every byte and {END}; ask for at least {SMALLEST}.")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, end)])
    return tokenizer
