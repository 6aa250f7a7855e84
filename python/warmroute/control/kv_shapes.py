"""Events of KV caches as SGLang, vLLM and our own worker write them. Pure.

A batch is [time, events, dp rank] (msgpack, over ZeroMQ) or {"seq", "events", "dp_rank"} (JSON, over HTTP). An event is
an array that begins with its type, as it was first, or a map with the type in "type", as it is now; fields that are not
there are None. Hashes are integers of 64 bits, or bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

_STORED: Final = ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name")
_STORED_MORE: Final = ("extra_keys", "group_idx")
_REMOVED: Final = ("block_hashes", "medium", "group_idx")
_ALL_BITS: Final = (1 << 64) - 1
_MEDIA: Final = {"GPU": 1, "CPU": 2}
_OTHER_MEDIUM: Final = 4


class BadEvent(ValueError):  # noqa: N818 (what a worker sent, as BadRequest)
    """Not an event as they are known. What it changed is not known either."""


@dataclass(frozen=True, slots=True)
class Stored:
    hashes: list[int]
    parent: int | None
    tokens: list[int]
    block_size: int
    medium: int
    """A bit."""
    plain: bool
    """Whether any request with these tokens finds them: no adapter, no salt, no image."""


@dataclass(frozen=True, slots=True)
class Removed:
    hashes: list[int]
    medium: int | None
    """A bit; None: wherever they were."""


@dataclass(frozen=True, slots=True)
class Cleared:
    pass


Event = Stored | Removed | Cleared
Block = tuple[int, int | None, list[int]]
"""Of a snapshot: hash, that of the block before it, tokens."""


def read_events(events: Any) -> list[Event]:
    """Of one batch. Raises BadEvent. Events of kinds that are not known, and of further groups of layers, are left out:
    whether a prefix can be used again is decided by the first group, that of full attention."""
    if not isinstance(events, list):
        raise BadEvent("a batch has no list of events")
    return list(_read(events))


def _read(events: list[Any]) -> Iterator[Event]:
    for event in events:
        fields = _fields(event)
        kind = fields.get("type")
        try:
            if kind == "AllBlocksCleared":
                yield Cleared()
            elif kind not in ("BlockStored", "BlockRemoved") or fields.get("group_idx"):
                continue
            elif kind == "BlockRemoved":
                medium = fields.get("medium")
                yield Removed(_hashes(fields["block_hashes"]), None if medium is None else _medium(medium))
            else:
                yield _stored(fields)
        except (KeyError, TypeError, ValueError) as error:
            raise BadEvent(f"a {kind} that cannot be read: {error!r}") from None


def read_snapshot(blocks: Any) -> list[Block]:
    """Raises BadEvent."""
    try:
        return [
            (block_hash(block["block_hash"]), _maybe_hash(block["parent_block_hash"]), _tokens(block["token_ids"]))
            for block in blocks
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise BadEvent(f"a snapshot that cannot be read: {error!r}") from None


def block_hash(value: Any) -> int:
    """In 64 bits, of an integer that may be negative, or of bytes, of which the last count."""
    if isinstance(value, bytes) and value:
        return int.from_bytes(value[-8:], "big")
    if isinstance(value, int) and not isinstance(value, bool):
        return value & _ALL_BITS
    raise ValueError(f"{value!r} is no hash")


def _fields(event: Any) -> dict[str, Any]:
    if isinstance(event, dict):
        return event
    if not isinstance(event, list | tuple) or not event:
        raise BadEvent("an event is neither a map nor an array")
    kind, *values = event
    names = {"BlockStored": _STORED + _STORED_MORE, "BlockRemoved": _REMOVED}.get(kind, ())
    return {"type": kind, **dict(zip(names, values, strict=False))}


def _stored(fields: dict[str, Any]) -> Stored:
    extra = fields.get("extra_keys") or ()
    special = [fields.get(name) for name in ("lora_id", "lora_name", "cache_salt")]
    size = fields["block_size"]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"block_size {size!r}")
    return Stored(
        hashes=_hashes(fields["block_hashes"]),
        parent=_maybe_hash(fields.get("parent_block_hash")),
        tokens=_tokens(fields["token_ids"]),
        block_size=size,
        medium=_medium(fields.get("medium")),
        plain=all(value is None for value in (*special, *extra)),
    )


def _hashes(values: Any) -> list[int]:
    return [block_hash(value) for value in values]


def _maybe_hash(value: Any) -> int | None:
    return None if value is None else block_hash(value)


def _tokens(values: Any) -> list[int]:
    for value in values:
        if not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise ValueError(f"{value!r} is no token id")
    return list(values)


def _medium(name: Any) -> int:
    """What is not said is the accelerator's own memory."""
    return _MEDIA["GPU"] if name is None else _MEDIA.get(str(name).partition("_")[0].upper(), _OTHER_MEDIUM)


class Order:
    """Which batches of a numbered stream are due. `next`: the number of the next one; None: none was seen yet.

    Numbers begin anew when the publisher does, and nothing else tells; but what was replayed comes once more from the
    publisher, too. The time in a batch tells the two apart.
    """

    def __init__(self) -> None:
        self.next: int | None = None
        self._time = 0.0
        """Of the last batch that was applied."""

    def arrived(self, number: int, time: float) -> str:
        """Of a batch from the publisher: "apply" it, "skip" it (it was replayed), there is a "gap" before it, or the
        publisher began anew ("restart")."""
        if self.next is None:
            return "apply" if number == 0 else "gap"
        if number < self.next:
            return "restart" if time > self._time else "skip"
        return "apply" if number == self.next else "gap"

    def replayed(self, number: int) -> bool:
        """Of a batch from the replay: whether it is to be applied."""
        return number == (self.next or 0)

    def applied(self, number: int, time: float) -> None:
        self.next, self._time = number + 1, time

    def skip(self, number: int) -> None:
        """It was there, and could not be applied."""
        self.next = number + 1

    def begin_anew(self) -> None:
        self.next = None
