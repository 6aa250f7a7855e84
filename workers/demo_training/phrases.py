"""Reads the three text files that the conversations are made of: topics, phrases and small talk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent


@dataclass(frozen=True)
class Topic:
    """A subject: its name, words that lead to it, who would talk about it, and sentences that stand alone."""

    name: str
    words: tuple[str, ...]
    speaker: str
    facts: tuple[str, ...]


@dataclass(frozen=True)
class SmallTalk:
    """Questions, and answers each of which fits all of them."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


def read_topics() -> list[Topic]:
    topics = []
    for heading, *facts in read_blocks("topics.txt"):
        name, words, speaker = heading.split(": ")
        topics.append(Topic(name, tuple(words.split(", ")), speaker, tuple(facts)))
    return topics


def read_small_talk() -> list[SmallTalk]:
    talks = []
    for lines in read_blocks("small_talk.txt"):
        questions, answers = (
            tuple(line[2:].replace("\\n", "\n") for line in lines if line.startswith(mark)) for mark in ("Q ", "A ")
        )
        talks.append(SmallTalk(questions, answers))
    return talks


def read_phrases() -> dict[str, list[str]]:
    """Name of the list -> its phrases."""
    return {heading.strip("[]"): phrases for heading, *phrases in read_blocks("phrases.txt")}


def read_blocks(file: str) -> list[list[str]]:
    """The blocks between empty lines, without comments."""
    blocks = (HERE / file).read_text(encoding="utf-8").split("\n\n")
    lines = ([line for line in block.splitlines() if line and not line.startswith("#")] for block in blocks)
    return [block for block in lines if block]
