"""What can go wrong with a request, and how it is said over HTTP.

::

    ShoalError
    ├── RequestError              the caller's to mend (4xx)
    │   ├── InvalidRequest        400  a field breaks a rule; ``param`` names the field
    │   ├── PromptTooLong         400  prompt + max_tokens exceed the model's context
    │   ├── Unauthorized          401  no or unknown key
    │   ├── Forbidden             403  the key may not do this
    │   │   └── QuotaExceeded     403  the key's owner may not have that much
    │   ├── ModelNotFound         404  neither the base nor an adapter
    │   ├── BodyTooSlow           408  hardly anything of the body comes
    │   ├── Conflict              409  contradicts what exists
    │   ├── BodyTooLarge          413  over a byte limit
    │   ├── UnusableAdapter       422  an upload, or a blend, that cannot be served
    │   └── Overloaded            429  a queue is full; says when to come back
    └── EngineError               ours to mend (5xx)
        ├── EngineFailure         500  the step that carried this request failed
        ├── Draining              503  the server is shutting down
        └── DeadlineExceeded      504  the request's own deadline passed before its first token

Pure. ``http/errors.py`` renders these in OpenAI's shape; this table is the only place that
maps a class to a status.
"""


class ShoalError(Exception):
    """Base class; the message is safe to show to the client.

    Attributes:
        param: the request field at fault, when there is one.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestError(ShoalError):
    """The caller can mend this."""


class InvalidRequest(RequestError):
    """A field breaks a rule."""


class PromptTooLong(RequestError):
    """The prompt (plus the tokens asked for) does not fit the model's context."""


class Unauthorized(RequestError):
    """No key, or one that is not known."""


class Forbidden(RequestError):
    """The key is known but may not do this."""


class QuotaExceeded(Forbidden):
    """The key's owner may not have that much; trying again later does not help."""


class ModelNotFound(RequestError):
    """``model`` names neither the base nor an adapter the caller may use."""


class BodyTooSlow(RequestError):
    """The body came too slowly to be waited for."""


class Conflict(RequestError):
    """The request contradicts what exists."""


class BodyTooLarge(RequestError):
    """A body or file is over its limit."""


class UnusableAdapter(RequestError):
    """An uploaded adapter, or a sum of adapters, cannot be served."""


class Overloaded(RequestError):
    """A queue is full.

    Attributes:
        retry_after_s: seconds after which trying again makes sense.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineError(ShoalError):
    """The server's fault."""


class EngineFailure(EngineError):
    """The step that carried this request failed; the engine goes on."""


class Draining(EngineError):
    """The server is shutting down and takes no new requests."""


class DeadlineExceeded(EngineError):
    """The deadline that the request came with passed before it had made a token."""


# class -> (HTTP status, OpenAI error ``type``, ``code``)
STATUS: dict[type[ShoalError], tuple[int, str, str]] = {
    InvalidRequest: (400, "invalid_request_error", "invalid_value"),
    PromptTooLong: (400, "invalid_request_error", "context_length_exceeded"),
    Unauthorized: (401, "authentication_error", "invalid_api_key"),
    Forbidden: (403, "permission_error", "forbidden"),
    QuotaExceeded: (403, "permission_error", "quota_exceeded"),
    ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    BodyTooSlow: (408, "invalid_request_error", "body_too_slow"),
    Conflict: (409, "invalid_request_error", "conflict"),
    BodyTooLarge: (413, "invalid_request_error", "body_too_large"),
    UnusableAdapter: (422, "invalid_request_error", "unusable_adapter"),
    Overloaded: (429, "rate_limit_error", "overloaded"),
    EngineFailure: (500, "server_error", "engine_failure"),
    Draining: (503, "server_error", "draining"),
    DeadlineExceeded: (504, "server_error", "deadline_exceeded"),
}
