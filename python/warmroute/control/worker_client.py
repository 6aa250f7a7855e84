"""All traffic of the control plane to workers: one httpx client, one credential rule, errors in our words."""

import asyncio
import json
from typing import Any, Final

import httpx

from warmroute.control.worker_facts import (
    RankLoad,
    UnusableAnswer,
    WorkerFacts,
    read_facts,
    read_load,
    read_rank_loads,
)
from warmroute.control.workers import Worker

# SGLang's server closes idle connections after 5 s; a connection must not be written to while it does.
_KEEP_ALIVE_SECONDS: Final = 4.0
_LOAD_TIMEOUT_SECONDS: Final = 2.0
_FLUSH_TIMEOUT_SECONDS: Final = 30.0
_ABORT_TIMEOUT_SECONDS: Final = 5.0
_RELAY_TIMEOUT_SECONDS: Final = 10.0


class WorkerUnreachable(Exception):  # noqa: N818
    """The message says why; `refused`: nobody listens there."""

    def __init__(self, reason: str, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class WorkerClient:
    def __init__(self, probe_timeout_seconds: float, max_connections: int | None = 512) -> None:
        self._probe_timeout_seconds = probe_timeout_seconds
        # trust_env: a proxy variable of the cluster must not stand between the router and its workers.
        self._http = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(None),  # _send has one for the whole exchange
            limits=httpx.Limits(
                max_connections=max_connections,
                max_keepalive_connections=256,
                keepalive_expiry=_KEEP_ALIVE_SECONDS,
            ),
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def check(self, worker: Worker, path: str) -> None:
        """Returns when the worker answered 2xx, raises WorkerUnreachable otherwise."""
        response = await self._send(worker, "GET", path, self._probe_timeout_seconds)
        if not response.is_success:
            raise WorkerUnreachable(f"GET {path} answered {response.status_code}")

    async def identify(self, worker: Worker) -> WorkerFacts:
        """Ask what it serves. Raises WorkerUnreachable, also when the answers cannot be used."""
        server_info = await self._first_json(worker, "/server_info", "/get_server_info")
        models = await self._first_json(worker, "/v1/models")
        metrics = None
        if server_info is None:
            response = await self._send(worker, "GET", "/metrics", self._probe_timeout_seconds)
            metrics = response.text if response.is_success else None
        try:
            return read_facts(server_info, models, metrics, worker.spec.model_id)
        except UnusableAnswer as error:
            raise WorkerUnreachable(str(error)) from None

    async def load(self, worker: Worker) -> int:
        """Tokens in use on all its ranks; -1: unknown."""
        for path in ("/get_load", "/v1/loads?include=core"):
            try:
                response = await self._send(worker, "GET", path, _LOAD_TIMEOUT_SECONDS)
            except WorkerUnreachable:
                return -1
            load = read_load(_json_of(response)) if response.is_success else None
            if load is not None:
                return load
        return -1

    async def rank_loads(self, worker: Worker) -> tuple[RankLoad, ...]:
        """What each of its ranks has to do. Raises WorkerUnreachable, also when it does not say."""
        answer = await self._first_json(worker, "/v1/loads?include=core", "/get_load")
        loads = read_rank_loads(answer)
        if loads is None:
            raise WorkerUnreachable("neither /v1/loads nor /get_load tells loads by rank")
        return loads

    async def flush(self, worker: Worker) -> None:
        """Raises WorkerUnreachable when its cache was not flushed."""
        response = await self._send(worker, "POST", "/flush_cache", _FLUSH_TIMEOUT_SECONDS)
        if not response.is_success:
            raise WorkerUnreachable(f"answered {response.status_code}: {response.text[:200]}")

    async def abort(self, worker: Worker, body: dict[str, Any]) -> None:
        """Raises WorkerUnreachable when it did not take the request to abort."""
        response = await self._send(worker, "POST", "/abort_request", _ABORT_TIMEOUT_SECONDS, body)
        if not response.is_success:
            raise WorkerUnreachable(f"POST /abort_request answered {response.status_code}")

    async def relay(self, worker: Worker, path: str, timeout_seconds: float = _RELAY_TIMEOUT_SECONDS) -> httpx.Response:
        """GET, for an answer that is passed on. Raises WorkerUnreachable."""
        return await self._send(worker, "GET", path, timeout_seconds)

    async def _first_json(self, worker: Worker, *paths: str) -> Any:
        """The JSON of the first path that the worker has; None: it has none.

        A refusal for want of a key is no "has none": it would leave the worker half known for ever.
        """
        for path in paths:
            response = await self._send(worker, "GET", path, self._probe_timeout_seconds)
            if response.status_code in (401, 403) or response.status_code >= 500:
                raise WorkerUnreachable(f"GET {path} answered {response.status_code}")
            answer = _json_of(response) if response.is_success else None
            if answer is not None:
                return answer
        return None

    async def _send(
        self, worker: Worker, method: str, path: str, timeout_seconds: float, body: object = None
    ) -> httpx.Response:
        """One exchange, read whole, with the worker's credential. Raises WorkerUnreachable."""
        headers = {}
        if worker.address.authorization is not None:
            headers["authorization"] = worker.address.authorization.decode("ascii")
        for attempt in (1, 2):
            try:
                async with asyncio.timeout(timeout_seconds):
                    return await self._http.request(method, worker.address.url + path, headers=headers, json=body)
            except TimeoutError:
                raise WorkerUnreachable(f"{method} {path}: no answer within {timeout_seconds:g} s") from None
            except httpx.ConnectError as error:
                raise WorkerUnreachable(f"cannot connect: {error}", refused=True) from None
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError) as error:
                # Once more: the worker may have closed the idle connection while we wrote.
                if attempt == 2:
                    raise WorkerUnreachable(f"{method} {path}: {error or type(error).__name__}") from None
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise WorkerUnreachable(f"{method} {path}: {error or type(error).__name__}") from None
        raise AssertionError("unreachable")


def _json_of(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content)
    except ValueError:
        return None
