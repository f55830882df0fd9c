"""What is wrong with an adapter, as HTTP says it."""

from collections.abc import Iterator
from contextlib import contextmanager

from shoal.adapters.errors import (
    AdapterConflict,
    AdapterError,
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterQuotaExceeded,
    AdapterRejected,
    AdapterTooLarge,
    BlendRefused,
)
from shoal.server.errors import (
    BodyTooLarge,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    QuotaExceeded,
    ShoalError,
    UnusableAdapter,
)

_ADAPTER_ERRORS: dict[type[AdapterError], type[ShoalError]] = {
    AdapterRejected: UnusableAdapter,
    AdapterTooLarge: BodyTooLarge,
    BlendRefused: UnusableAdapter,
    AdapterNotFound: ModelNotFound,
    AdapterConflict: Conflict,
    AdapterNameInvalid: InvalidRequest,
    AdapterQuotaExceeded: QuotaExceeded,
}


def from_adapter_error(error: AdapterError, *, param: str | None = None) -> ShoalError:
    """The HTTP-side error for ``error``, with its message unchanged."""
    return _ADAPTER_ERRORS.get(type(error), UnusableAdapter)(str(error), param=param)


@contextmanager
def names_from(param: str) -> Iterator[None]:
    """Let errors about a name say which field it came from."""
    try:
        yield
    except (AdapterNameInvalid, AdapterConflict) as error:
        raise from_adapter_error(error, param=param) from error
