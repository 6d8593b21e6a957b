"""`spec.qdrant`: a collection of a Qdrant server, or of qdrant-client's local mode, searched with vectors made here.

Errors name the server's host and the collection, never the key or the rest of the address.
"""

from __future__ import annotations

import importlib.util
import pickle
import warnings
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from flowmesh.validation.convert import nearest
from runners.api import BadRequest, Context, MissingDependency, RunnerError
from runners.data import addresses
from runners.models.sources import local_folder, local_path
from runners.rag.faiss_index import check_dimension
from runners.rag.qdrant_store import check_store, read_data_only
from runners.rag.search import Hit
from runners.rag.task import Qdrant
from runners.rag.waiting import patiently

QUERIES_A_REQUEST = 64
DEFAULT_TIMEOUT_S = 30.0
WHERE = "spec.qdrant"


class QdrantSearcher:
    """One collection. See `search.Searcher`."""

    name = "qdrant"

    def __init__(self, client: Any, wanted: Qdrant, place: str) -> None:
        self._client = client
        self._wanted = wanted
        self._place = place
        self._using: str | None = None
        self._about: dict[str, Any] = {}

    def open(self, ctx: Context, dimension: int) -> None:
        """Check the collection before anything is embedded.

        Raises:
            BadRequest: there is no such collection, it refuses us, or its vectors are others.
            RunnerError: the server does not answer.
        """
        info = self._ask(ctx, lambda: self._client.get_collection(self._wanted.collection))
        vectors = info.config.params.vectors
        if isinstance(vectors, dict):
            self._using = self._choose(vectors)
            vectors = vectors[self._using]
        elif self._wanted.vector is not None:
            raise BadRequest(f"{WHERE}.vector: the vectors of {self._collection} have no names; leave it out")
        if vectors is None:
            raise BadRequest(f"{WHERE}.collection: {self._collection} has no dense vectors")
        check_dimension(dimension, int(vectors.size), self._collection)
        self._about = {
            "metric": str(getattr(vectors.distance, "value", vectors.distance)).lower(),
            "dimension": int(vectors.size),
            "count": info.points_count,
        }

    def open_or_create(self, ctx: Context, dimension: int, distance: Any, *, given: bool) -> None:
        """As `open`; a collection that is not there is made.

        Args:
            distance: qdrant-client's, of a new collection.
            given: the document names it, so that another one is an error.

        Raises:
            BadRequest, RunnerError: as `open`.
        """
        from qdrant_client import models

        name = self._wanted.collection
        if not self._ask(ctx, lambda: self._client.collection_exists(name)):
            one = models.VectorParams(size=dimension, distance=distance)
            config = one if self._wanted.vector is None else {self._wanted.vector: one}
            self._ask(ctx, lambda: self._client.create_collection(name, vectors_config=config))
        self.open(ctx, dimension)
        found = self._about["metric"]
        if given and found != str(distance.value).lower():
            raise BadRequest(f"{WHERE}.distance: {self._collection} has {found}; leave it out")

    def point(self, point_id: str | int, vector: list[float], payload: dict[str, Any]) -> Any:
        """A point for `upsert`."""
        from qdrant_client import models

        named: Any = vector if self._using is None else {self._using: vector}
        return models.PointStruct(id=point_id, vector=named, payload=payload)

    def upsert(self, ctx: Context, points: list[Any]) -> None:
        """Write points, and wait until they are there; those with the same ids are replaced.

        Raises:
            BadRequest, RunnerError: as `open`.
        """
        self._ask(ctx, lambda: self._client.upsert(self._wanted.collection, points, wait=True))

    def search(self, ctx: Context, vectors: np.ndarray, top_k: int) -> list[list[Hit]]:
        """See `search.Searcher`."""
        from qdrant_client import models

        hits: list[list[Hit]] = []
        for first in range(0, len(vectors), QUERIES_A_REQUEST):
            ctx.progress(first, len(vectors), "queries")
            requests = [
                models.QueryRequest(query=vector, limit=top_k, with_payload=True, using=self._using)
                for vector in vectors[first : first + QUERIES_A_REQUEST].tolist()
            ]
            answers = self._ask(ctx, lambda r=requests: self._client.query_batch_points(self._wanted.collection, r))
            hits += [[Hit(p.id, float(p.score), dict(p.payload or {})) for p in each.points] for each in answers]
        return hits

    def describe(self) -> dict[str, Any]:
        said = {"url" if self._wanted.url else "path": self._place, "collection": self._wanted.collection}
        return said | self._about

    @property
    def digest(self) -> str:
        """See `search.Searcher`: others may write to the collection."""
        return ""

    def notes(self) -> dict[str, Any]:
        """See `search.Searcher`."""
        return {}

    @property
    def _collection(self) -> str:
        return f"collection {self._wanted.collection!r} at {self._place}"

    def _choose(self, vectors: dict[str, Any]) -> str:
        wanted = self._wanted.vector
        if wanted is None and len(vectors) == 1:
            return next(iter(vectors))
        if wanted is None:
            raise BadRequest(
                f"{WHERE}.vector: missing; {self._collection} has several vectors: {', '.join(sorted(vectors))}"
            )
        if wanted not in vectors:
            raise BadRequest(
                f"{WHERE}.vector: {self._collection} has no vector {wanted!r}; {nearest(wanted, list(vectors))}"
            )
        return wanted

    def _ask(self, ctx: Context, call: Any) -> Any:
        from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        try:
            return patiently(ctx.check_cancelled, call)
        except UnexpectedResponse as error:
            raise self._refusal(error.status_code, error.reason_phrase) from None
        except ResourceExhaustedResponse:
            raise self._refusal(429, "Too Many Requests") from None
        except ResponseHandlingException as error:
            kind = type(error.source).__name__ if error.args == () else type(error).__name__
            raise RunnerError(
                f"{WHERE}.url: no usable answer from {self._place} ({kind}) for {self._collection}"
            ) from None
        except ValueError as error:  # raised by the local mode for an unknown collection
            if "not found" in str(error):
                raise BadRequest(f"{WHERE}.collection: there is no {self._collection}") from None
            raise RunnerError(f"{WHERE}: {self._collection} cannot be asked: {type(error).__name__}") from None

    def _refusal(self, status: int | None, reason: str) -> RunnerError:
        if status == 404:
            return BadRequest(f"{WHERE}.collection: there is no {self._collection}")
        if status in (401, 403):
            return BadRequest(f"{WHERE}.api_key: {self._collection} refuses it, or wants one ({status} {reason})")
        kind = BadRequest if status is not None and 400 <= status < 500 and status not in (408, 429) else RunnerError
        return kind(f"{WHERE}: {self._collection} answered {status} {reason}")


def open_qdrant(ctx: Context, wanted: Qdrant) -> QdrantSearcher:
    """A client for the task's collection. Sends no request yet.

    Raises:
        BadRequest: invalid address, or there is no such local folder.
        RunnerError: another process has the local folder open.
        MissingDependency: qdrant-client is not installed.
    """
    if importlib.util.find_spec("qdrant_client") is None:
        raise MissingDependency("qdrant_client")
    from qdrant_client import QdrantClient

    if wanted.path is not None:
        folder = local_path(ctx, wanted.path, f"{WHERE}.path")
        if not folder.is_dir():
            raise BadRequest(f"{WHERE}.path: there is no folder {wanted.path!r} on this node")
        check_store(local_folder(ctx, folder, wanted.path, f"{WHERE}.path"), f"{WHERE}.path")
        read_data_only()
        try:
            client = QdrantClient(path=str(folder), force_disable_check_same_thread=True)
        except pickle.UnpicklingError as error:
            raise BadRequest(f"{WHERE}.path: {wanted.path!r} holds more than data: {error}; use a server") from None
        except RuntimeError:
            raise RunnerError(
                f"{WHERE}.path: another process has {wanted.path!r} open; use a server to share it"
            ) from None
        return QdrantSearcher(client, wanted, wanted.path)
    url, place = _address(wanted.url or "")
    try:
        addresses.check(ctx.job.permits, url)
    except addresses.LocalAddress as error:
        raise BadRequest(f"{WHERE}.url: {error}") from None
    timeout_s = wanted.timeout_s or DEFAULT_TIMEOUT_S
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a key over plain http inside a cluster is the operator's choice
        client = QdrantClient(
            url=url, api_key=wanted.api_key, timeout=max(round(timeout_s), 1), check_compatibility=False
        )
    return QdrantSearcher(client, wanted, place)


def _address(url: str) -> tuple[str, str]:
    """The address, and the part of it that errors may show."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise BadRequest(f"{WHERE}.url: an http or https address is needed, such as http://HOST:6333")
    if parts.username or parts.password or parts.query:
        raise BadRequest(f"{WHERE}.url: no user, password or query belongs there; use api_key or api_key_env")
    shown = f"{parts.scheme}://{host}" + (f":{port}" if port else "")
    return url, shown + parts.path.rstrip("/")
