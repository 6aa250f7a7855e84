"""Rows of tokens for training: conversations and plain text, mixed, each row beginning with a document."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from demo_training.conversations import Maker
from demo_training.corpus import Corpus
from demo_training.phrases import read_topics
from demo_training.tokens import encode_chat, encode_text

CHAT_SHARE = 0.8
"""Of the documents. Text teaches English, conversations teach what is asked of the model; both are about as long."""


def documents(corpus: Corpus, seed: int) -> Iterator[list[int]]:
    """Endless documents as token ids."""
    dice = random.Random(seed)
    maker = Maker(corpus, read_topics(), dice)
    while True:
        if dice.random() < CHAT_SHARE:
            yield encode_chat(maker.conversation())
        else:
            yield encode_text(dice.choice(corpus.paragraphs))


def batches(source: Iterator[list[int]], rows: int, length: int) -> Iterator[Tensor]:
    """Token ids [rows, length + 1]: whole documents, and the last of a row is cut where the row ends."""
    while True:
        batch = []
        for _ in range(rows):
            row: list[int] = []
            while len(row) <= length:
                row += next(source)
            batch.append(row[: length + 1])
        yield torch.tensor(batch)
