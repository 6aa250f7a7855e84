"""The hot path: raw asyncio protocols on both sides."""
