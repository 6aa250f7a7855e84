"""The hot path: raw asyncio protocols on both sides.

`ClientConnection` finds requests, an `Exchange` carries one from its request to the end of its response,
`WorkerConnection` sends it and finds the response, a `Pool` keeps connections.
"""

from warmroute.dataplane.plane import DataPlane

__all__ = ["DataPlane"]
