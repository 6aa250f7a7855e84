"""Worker ids: UUID version 7 (RFC 9562, 5.7), so that they sort by registration time. Python has them from 3.14 on."""

import uuid


def new_worker_id(unix_ms: int, random_bytes: bytes) -> str:
    """48 bits of time, then 74 of `random_bytes` (10 bytes; version and variant overwrite 6 of their bits)."""
    value = (unix_ms & 0xFFFF_FFFF_FFFF) << 80 | int.from_bytes(random_bytes[:10], "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


def is_worker_id(text: str) -> bool:
    """Whether it is the usual form of a UUID; anything else can only be a mistake."""
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False
