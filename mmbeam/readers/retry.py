"""Retry requests to stores, within one time budget. It imports no client of a store."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from mmbeam.errors import MmbeamError, redact

logger = logging.getLogger(__name__)

RETRY_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 28.0)  # seconds before each retry; after any progress, they start again
RETRY_SECONDS = 60.0  # without progress, attempts and waits included, after which a request fails
CREDENTIALS = {  # where the client of a store looks for credentials
    "s3": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or FSSPEC_S3_KEY and FSSPEC_S3_SECRET, and "
    "that they may do this",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS, or log in with `gcloud auth application-default login`, and that the "
    "account may do this",
    "http": "check the user name and password of the URL, or renew its signature",
    "https": "check the user name and password of the URL, or renew its signature",
    "abfs": "check FSSPEC_ABFS_ACCOUNT_NAME and FSSPEC_ABFS_ACCOUNT_KEY, or log in with `az login`",
}

# Errors of these packages come from the store or the network. Any other error that is not an OSError is a bug.
STORE_PACKAGES = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "http", "requests", "urllib3"}
_RETRYABLE = (408, 409, 412, 425, 429)  # statuses below 500 after which a request is repeated
_NO_CREDENTIALS = re.compile(
    "NoCredentials|PartialCredentials|CredentialRetrieval|TokenRetrieval|SSOToken|RefreshError|DefaultCredentials|"
    "ExpiredToken|RequestExpired|InvalidToken|TokenRefreshRequired|InvalidAccessKeyId|SignatureDoesNotMatch"
)

T = TypeVar("T")


def retry(
    action: Callable[[], T],
    path: str,
    failure: str,
    error_type: type[Exception] = ConnectionError,
    waits: Sequence[float] | None = None,
) -> T:
    """Return `action()`, repeated after faults of the store or the network within the budget of retries.

    The budget is RETRY_SECONDS and `waits` (RETRY_WAITS). A longer Retry-After of the server is respected, if the
    budget allows it. This is the only place that retries: retries are turned off in the clients of the stores that have
    an option for it. `path` and `failure` begin the messages.

    Raise PermissionError if access is denied, `error_type` if the budget is spent or the request is refused, and every
    other error unchanged.
    """
    begin = time.monotonic()
    for attempt, wait in enumerate((*(RETRY_WAITS if waits is None else waits), None), 1):
        try:
            return action()
        except Exception as error:
            status = http_status(error)
            _raise_permanent(error, status, path, failure)
            reason = f"{type(error).__name__}: {' '.join(redact(str(error.__cause__ or error)).split())}"
            if status is not None and 400 <= status < 500 and status not in _RETRYABLE:
                raise error_type(f"{path}: {failure}: the server refuses the request: {reason}") from None
            asked = _retry_after(error)
            pause = max(wait or 0.0, asked)
            if wait is None or time.monotonic() - begin + pause > RETRY_SECONDS:
                reason += f"; the server asks to wait {asked:.0f} s" * (asked > 0)
                raise error_type(f"{path}: {failure}, after {attempt} attempts: {reason}") from None
            logger.warning("%s: %s: %s; retrying in %.1f s", path, failure, reason, pause)
            time.sleep(pause)
    raise AssertionError("the last wait is None")


def _raise_permanent(error: Exception, status: int | None, path: str, failure: str) -> None:
    """Raise the error, or a clearer one, if a retry cannot help."""
    if isinstance(error.__cause__, MmbeamError):  # the client of a store has wrapped it
        raise error.__cause__ from None
    if isinstance(error, MmbeamError | FileExistsError):
        raise error
    names = " ".join(f"{type(e).__name__} {_code(e)}" for e in (error, error.__cause__))
    is_denied = status in (401, 403) or _NO_CREDENTIALS.search(names) is not None
    # S3 answers requests with an expired token with 400, and its response to a HEAD request has no code.
    is_denied = is_denied or (path.startswith("s3://") and status == 400 and _code(error.__cause__ or error) == "400")
    if is_denied or isinstance(error, PermissionError):
        if isinstance(error, PermissionError) and str(error).startswith(path):  # raised by this function before
            raise error
        why = f"status {status}" if status else type(error).__name__ if is_denied else str(error)
        code = _code(error) or _code(error.__cause__)
        hint = CREDENTIALS.get(path.partition("://")[0], "check the permissions of the file and its folders")
        reason = f"{path}: {failure}: access denied ({why}{f', {code}' if code and not code.isdigit() else ''}); {hint}"
        raise PermissionError(redact(reason)) from None
    if _is_gone(error, status):
        raise error
    is_range = isinstance(error, ValueError) and "range requests" in str(error)
    if not is_range and not isinstance(error, OSError | EOFError) and not STORE_PACKAGES & _packages(error):
        raise error


def _code(error: BaseException | None) -> str:
    """Return the code that S3 gives an error, such as "AccessDenied"; "" for other errors."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _retry_after(error: BaseException) -> float:
    """Return the seconds that a server asks to wait (Retry-After); 0 if it does not."""
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        headers = getattr(source, "headers", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        value = str(headers.get("retry-after") or headers.get("Retry-After") or "") if headers else ""
        if value.isdigit():
            return float(value[:9])
        if value:
            try:
                return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
            except (ValueError, TypeError):
                continue
    return 0.0


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of a store's client; None if it has none."""
    if isinstance(error, OSError) and str(error).startswith("Forbidden: "):  # gcsfs
        return 403
    for source in (error, error.__cause__):
        status = getattr(source, "status", None) or getattr(source, "code", None)
        response = getattr(source, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if type(source).__module__ == "aiohttp.http_exceptions":  # a malformed response, whatever its own code
            continue
        if isinstance(status, str) and status.isdigit():
            status = int(status)
        if isinstance(status, int):
            return status
    return None


def _is_gone(error: BaseException, status: int | None) -> bool:
    """Return whether the file is missing. fsspec raises FileNotFoundError for any failed HTTP request."""
    if not isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return False
    by_http = error.__cause__ is not None and "aiohttp" in _packages(error.__cause__)
    return status in (404, 410) if by_http else True


def _packages(error: BaseException) -> set[str]:
    return {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
