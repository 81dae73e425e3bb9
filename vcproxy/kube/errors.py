"""Everything that can go wrong between vcproxy and an API server, as one small tree.

    KubeError
    ├── KubeconfigError      credentials that are refused; names the field and the cure
    ├── ShapeError           one object that is not what its kind promises; names tenant, object and field
    └── ApiError             one request that brought no data
        ├── Unreachable      no connection, TLS refused, time ran out, connection lost
        ├── Unauthorized     401
        ├── Forbidden        403
        ├── NotFound         404
        ├── Conflict         409
        ├── Gone             410: the resourceVersion is too old, list again
        ├── Throttled        429
        ├── ServerError      5xx
        ├── TooLarge         the answer is over a budget
        ├── BadResponse      an answer that no API server gives: a redirect, HTML, truncated JSON, a wrong kind
        └── Unserved         a list as a stream, of an API server that has none: list in pages

The reader of an `ApiError` decides one thing only: whether to try again, and when (`retry_after`). None of them ever
stands for data: the consumer keeps the last good state. Messages carry words that a hostile server chose, so they
pass `printable`, which bounds them and leaves nothing that a terminal or a log line would act on.
"""

from __future__ import annotations

MAX_MESSAGE = 256
"""Longest text, in characters, taken over from an API server, a kubeconfig or an object."""


def printable(text: str, limit: int = MAX_MESSAGE) -> str:
    """`text` on one line, without control or invisible characters, at most `limit` characters long."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


class KubeError(Exception):
    """Base of all errors of vcproxy.kube."""


class KubeconfigError(KubeError):
    """Credentials that vcproxy refuses to use.

    `field` is the kubeconfig field (`user.exec`), `reason` what is wrong with it, `cure` what its owner should write
    instead.
    No secret value is ever part of the message.
    """

    def __init__(self, field: str, reason: str, *, cure: str) -> None:
        self.field, self.reason, self.cure = field, reason, cure
        super().__init__(f"kubeconfig: {field}: {reason}; {cure}")


class ShapeError(KubeError):
    """One object whose JSON does not have the shape of its kind; the objects around it are not affected.

    `key` is (namespace, name) where the object lets them be read, else None: a consumer that replaces its state by a
    list must then keep what it holds, for it cannot tell which object this was. `field` is a JSON path
    (`$.spec.ports[0].port`), "$" if unknown.
    """

    def __init__(self, *, tenant: str, kind: str, key: tuple[str, str] | None, field: str, reason: str) -> None:
        self.tenant, self.kind, self.key, self.field, self.reason = tenant, kind, key, field, printable(reason)
        name = "of unreadable name" if key is None else printable("/".join(part for part in key if part))
        super().__init__(f"tenant {tenant}: {kind} {name}: {field}: {self.reason}")


class ApiError(KubeError):
    """One request that brought no data.

    `status` is the HTTP status, 0 where there was none. `retry_after` are the seconds the server asked to be left
    alone, bounded by the client; None where it did not ask.
    """

    def __init__(
        self, *, tenant: str, path: str, message: str, status: int = 0, retry_after: float | None = None
    ) -> None:
        self.tenant, self.path, self.status, self.retry_after = tenant, path, status, retry_after
        self.message = printable(message)
        said = f"HTTP {status}: " if status else ""
        super().__init__(f"tenant {tenant}: {path}: {said}{self.message}")


class Unreachable(ApiError):
    """No connection, TLS refused, time ran out, or the connection was lost in the middle of an answer."""


class Unauthorized(ApiError):
    """401: the credentials are not (or no longer) known; they were rotated or have expired."""


class Forbidden(ApiError):
    """403: the credentials are known, but may not read this."""


class NotFound(ApiError):
    """404: this API server does not serve the resource (or the object is not there)."""


class Conflict(ApiError):
    """409: the object exists already, or changed underneath a write."""


class Gone(ApiError):
    """410: the resourceVersion or continue token has been compacted away: list again."""


class Throttled(ApiError):
    """429: the API server's priority and fairness queue is full; `retry_after` is its wish."""


class ServerError(ApiError):
    """5xx: the API server, its etcd or a proxy in front of it is unwell."""


class TooLarge(ApiError):
    """The answer is over one of this tenant's budgets; reading it was given up."""


class BadResponse(ApiError):
    """An answer that no API server gives: a redirect, a page of HTML, truncated JSON, a wrong kind."""


class Unserved(ApiError):
    """This API server does not answer with a list as a stream (client.py, `list_and_watch`): list in pages."""


_BY_STATUS: dict[int, type[ApiError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    429: Throttled,
}


def error_of_status(status: int, *, tenant: str, path: str, message: str, retry_after: float | None = None) -> ApiError:
    """The typed error of an HTTP status that is not 2xx, or of the `code` in a `Status` object."""
    kind = _BY_STATUS.get(status) or (ServerError if status >= 500 else BadResponse)
    return kind(tenant=tenant, path=path, message=message, status=status, retry_after=retry_after)
