"""Text to token ids and back, on the `tokenizers` package. Imports neither torch nor transformers.

`Tokenizer` belongs to the model; a `Detokenizer` belongs to one answer and turns its ids into text as they come. What
it has returned is final: it never returns half a character, and ids that the tokenizer does not know are no text.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Protocol

import tokenizers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(Protocol):
    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these further ids complete; "" while a character is incomplete."""


class Tokenizer:
    """The tokenizer of a model folder."""

    def __init__(self, definition: str) -> None:
        """`definition`: the text of a tokenizer.json. Raises ValueError for one that `tokenizers` refuses."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(str(error)) from error
        self._definition = json.loads(definition)
        # Bodies of chats hold their special tokens as text, prompts of /v1/completions get theirs added.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._special_ids = frozenset(
            token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._byte_level = _decodes_byte_level(self._definition.get("decoder"))
        self._pieces: dict[int, bytes] = {}
        self._raw_bytes = _RawBytes.of(self._tokenizer, self._definition)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Raises LookupError without a tokenizer.json, ValueError for one that cannot be used; both with one line."""
        path = folder / "tokenizer.json"
        try:
            definition = path.read_text(encoding="utf-8")
        except OSError as error:
            raise LookupError(f"there is no tokenizer.json in {folder} (only this format is read)") from error
        try:
            return cls(definition)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    def __repr__(self) -> str:
        kind = "raw bytes" if self._raw_bytes else "byte level" if self._byte_level else "text pieces"
        return f"<Tokenizer {self.vocab_size} ids, {kind}>"

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def is_raw_bytes(self) -> bool:
        """Whether a token id below 256 is the byte of that value, so that encoding needs no tokenizer."""
        return self._raw_bytes is not None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; `add_special_tokens` as the tokenizer's post-processor says (usually one at the start).

        Special tokens written out in `text` become their ids. Raises ValueError for text that is not valid Unicode.
        """
        try:
            if self._raw_bytes is not None:
                return self._raw_bytes.encode(text, add_special_tokens)
            text.encode()  # a lone surrogate: `tokenizers` would raise TypeError
            # Of its functions only those for batches release the interpreter lock.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
            return ids
        except UnicodeEncodeError as error:
            raise ValueError("the text holds a lone surrogate") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids all at once, special tokens and unknown ids left out."""
        return str(self._tokenizer.decode([i for i in token_ids if self.is_text(i)], skip_special_tokens=True))

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """For an answer to `prompt_ids`."""
        if self._byte_level:
            return _ByteLevelDetokenizer(self)
        return _WindowDetokenizer(self, prompt_ids)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text: for byte-level tokenizers perhaps a part of a character."""
        return self.piece(token_id) if self._byte_level else self.decode([token_id]).encode()

    def is_text(self, token_id: int) -> bool:
        """Whether the id stands for text: it is known, and not a special token."""
        return token_id not in self._special_ids and self._tokenizer.id_to_token(token_id) is not None

    def piece(self, token_id: int) -> bytes:
        """The bytes a byte-level token stands for; none for special tokens and ids outside the tokenizer."""
        piece = self._pieces.get(token_id)
        if piece is None:
            token = self._tokenizer.id_to_token(token_id) if self.is_text(token_id) else None
            piece = b"" if token is None else _bytes_of(token)
            self._pieces[token_id] = piece  # bounded by the vocabulary of the model, whose ids these are
        return piece


class _ByteLevelDetokenizer:
    """For decoders of type ByteLevel: a token is bytes, so the answer is one UTF-8 stream.

    Equal to decoding all ids at once, except that a character whose last bytes never came is left out.
    """

    __slots__ = ("_tokenizer", "_utf8")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        piece = self._tokenizer.piece
        return self._utf8.decode(b"".join([piece(token_id) for token_id in token_ids]))


class _WindowDetokenizer:
    """For all other decoders: decodes the last few ids again with each new one, and returns what was added.

    How a piece becomes text depends on the pieces before it (a leading space is dropped at the start), so the ids
    returned last stay in the window as context; at first, the end of the prompt does.
    """

    __slots__ = ("_context", "_fresh", "_tokenizer")

    CONTEXT_IDS = 5
    """Of the prompt: a character is at most four byte pieces, and one piece more tells whether a space precedes it."""
    INCOMPLETE_IDS = 3
    """Byte pieces that may wait for the rest of their character: the longest has four bytes."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = [i for i in prompt_ids[-self.CONTEXT_IDS :] if tokenizer.is_text(i)]
        self._fresh: list[int] = []

    def feed(self, token_ids: Sequence[int]) -> str:
        self._fresh += [token_id for token_id in token_ids if self._tokenizer.is_text(token_id)]
        if not self._fresh:
            return ""
        decode = self._tokenizer.decode
        before = decode(self._context)
        for complete in range(len(self._fresh), 0, -1):
            text = decode(self._context + self._fresh[:complete])
            waiting = len(self._fresh) - complete
            if not text.endswith(_REPLACEMENT) or waiting == self.INCOMPLETE_IDS:
                break
        else:
            return ""
        if len(text) <= len(before):
            return ""
        self._context, self._fresh = self._fresh[:complete], self._fresh[complete:]
        return text[len(before) :]


class _RawBytes:
    """Encoding for tokenizers whose ids below 256 are byte values and that merge nothing: the demo model's, and tests'.

    `tokenizers` encodes 2.6 MB/s of such text, `bytes` hundreds; at 32 KB a prompt that is 12 ms of the event loop.
    """

    PROBE = "a  b\n\t'll don't 12345 \N{LATIN SMALL LETTER SHARP S}\N{SNOWMAN}\N{GRINNING FACE} \x00\x7f end "

    def __init__(self, special: dict[str, int], added: Sequence[int]) -> None:
        """`special`: ids of tokens that are written out in text; `added`: ids that go before every text."""
        self._special = special
        self._added = list(added)
        # Longest first: the same choice that `tokenizers` makes (leftmost, then longest).
        names = sorted(special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = list(self._added) if add_special_tokens else []
        if self._split is None:
            ids += text.encode()
            return ids
        for index, part in enumerate(self._split.split(text)):
            if index % 2:
                ids.append(self._special[part])
            else:
                ids += part.encode()
        return ids

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer, definition: dict[str, object]) -> _RawBytes | None:
        """None unless encoding this way gives what the tokenizer gives; decided by trying."""
        model = definition.get("model")
        if not isinstance(model, dict) or model.get("merges") or definition.get("normalizer") is not None:
            return None
        tokens = tokenizer.get_added_tokens_decoder()
        if any(token.lstrip or token.rstrip or token.single_word for token in tokens.values()):
            return None
        special = {token.content: token_id for token_id, token in tokens.items()}
        raw = cls(special, tokenizer.encode("", add_special_tokens=True).ids)
        probes = [cls.PROBE, "", *(cls.PROBE + name + name + cls.PROBE for name in special)]
        for probe in probes:
            for add in (False, True):
                if raw.encode(probe, add) != tokenizer.encode(probe, add_special_tokens=add).ids:
                    return None
        return raw


def _decodes_byte_level(decoder: object) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        return [part.get("type") for part in decoder.get("decoders", ())] == ["ByteLevel"]
    return decoder.get("type") == "ByteLevel"


def _byte_alphabet() -> dict[str, int]:
    """The 256 characters that byte-level BPE writes bytes as (GPT-2's table): printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    """A token with a character outside the alphabet was added as plain text."""
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return token.encode()
