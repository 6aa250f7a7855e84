"""The scripted fake worker: speaks the whole worker contract, misbehaves as told, and records what it saw.

As a process: `python -m tests.fake_worker --port N`; in a test: `async with FakeWorker() as worker`. On top of that:
`POST /_script` (fields of `Script`), `GET /_script`, `GET /_record[?requests=0]` and `POST /_reset`.
"""

from tests.fake_worker.script import Record, Script, SeenRequest
from tests.fake_worker.server import FakeWorker

__all__ = ["FakeWorker", "Record", "Script", "SeenRequest"]
