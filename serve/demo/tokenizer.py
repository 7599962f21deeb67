"""The demo's byte-level BPE tokenizer: any UTF-8 text goes through unchanged, digits stand alone."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from onebase.serve.demo.corpus import CHAT_TEMPLATE, END, END_OF_TEXT, PAD, START, Piece, texts

VOCAB_SIZE = 1536
IGNORED = -100  # the label that counts for nothing


def train_tokenizer(seed: int, samples: int = 20_000) -> Any:
    """Train on a sample of the corpus; returns a transformers PreTrainedTokenizerFast with its chat template."""
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = ("".join(piece.text for piece in pieces) for pieces in islice(texts(seed), samples))
    bpe.train_from_iterator(sample, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False, model_max_length=1024
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The trained tokenizer of a base folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, pieces: list[Piece]) -> tuple[list[int], list[int]]:
    """Token ids and labels of a text; what is not learned is labelled IGNORED."""
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        tokens = tokenizer(piece.text).input_ids
        ids += tokens
        labels += tokens if piece.learn else [IGNORED] * len(tokens)
    return ids, labels
