"""The exceptions of mmbeam, and which class of error each belongs to.

MmbeamError
+-- UsageError            invalid or contradictory arguments (exit status 2)
+-- JobError              the job cannot start, or must stop (exit status 1)
|   +-- NoShardsError           no input matches
|   +-- ModelError              a model directory that cannot be used
|   +-- RunMismatchError        the output holds another configuration's run, or an input changed
|   +-- MissingModalityError    a requested modality is absent from every sample
|   +-- FailureRateError        more samples fail than the limit allows
|   +-- DeviceError             the device is absent, lost or broken: never a sample's fault
|   +-- FlowError               a guarantee of the flow is violated (order, fusion, conservation)
|   +-- TrainingError           nothing to train on, or the loss became NaN or infinite
+-- ShardError            an input is missing, unreadable or not a tar: its unit fails, the others go on
+-- SampleError           something is wrong with one sample: it becomes a Failure and is never raised to the caller
    +-- DecodeError             the bytes are not valid for their format
    +-- LimitError              a value exceeds one of the limits
    +-- PromptError             the sample lacks a field of the prompt, or its turns are malformed
    +-- CrashError              processing the sample ends the process (never raised: the process is gone)

Faults of the environment that are not in this tree (OSError from storage, MemoryError, PermissionError) are
raised unchanged: the attempt ends, and the runner may retry.

`redact` removes credentials from a text. Every MmbeamError, log line and record passes through it.
"""

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator

SECRET_NAME = re.compile("secret|token|passw|pwd|credential|key|signature|connection_string|sas_", re.IGNORECASE)
MIN_SECRET_CHARS = 8  # shorter values of environment variables are not redacted

_NAMES_ONLY = ("file", "local", "gs", "gcs", "s3", "s3a")  # with these, ? and # are part of a name
_CONTAINER_AT = ("abfs", "abfss", "wasb", "wasbs", "github")  # what is before the @ names a container or a repository
# All patterns are linear in the text, which may come from an input. The user part of a URL: up to the last @ before the
# path; also after a / if it looks like name:password, not host:port.
_USER = re.compile(
    r"\b([A-Za-z][A-Za-z0-9+.-]{0,30})://(?:(?:[^\s/@]{0,500}@)+|"
    r"(?!arn:)[^\s/:@]{0,200}:(?!\d*(?:[/\s:?#]|$))(?:[^@\s]{0,500}|[^@\n/]{0,500})@)"
)
_URL = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]{0,30})://[^\s'\"<>]*")
_USER_WITHOUT_SCHEME = re.compile(r"(?<![\w/.@-])[^\s'\"/@:=(]{1,200}:(?!//)[^\s'\"@]{3,500}@(?=[A-Za-z0-9])")
_FIELD = (
    r"(?:(?:secret|passw(?:or)?d|passphrase|pwd|signature|credential|connection_?string)[\w.-]{0,40}|"
    r"(?<![A-Za-z0-9_.-])(?:sig|token)|(?:access|auth|session|security|refresh|bearer|api|sas|hf)[_-]?token|"
    r"(?:secret|access|account|api|private|signing|shared)[_-]?key(?:[_-]?id)?)"
)
_FIELDS = (
    re.compile(rf"({_FIELD}=)[^\s&;,'\")]+", re.IGNORECASE),
    re.compile(rf"""({_FIELD}\\?["']\s?:\s?)(?:\\?"[^"]{{0,2000}}"|\\?'[^']{{0,2000}}')""", re.IGNORECASE),
    re.compile(r"((?:authorization|x-amz-security-token)[\"']?\s?[:=]\s?)[^\n,}]+", re.IGNORECASE),
)
_KNOWN = re.compile(  # keys of AWS, Google and the Hugging Face hub; headers; private keys
    r"\b(?:AKIA|ASIA)[0-9A-Z]{12,}\b|\bya29\.[\w-]+|\bhf_[A-Za-z0-9]{16,}|\b(?:Bearer|Basic) [\w.~+/=-]{8,}|"
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
    re.DOTALL,
)


def redact(text: str) -> str:
    """Return `text` without credentials: user parts and query strings of URLs, secret fields, keys of known forms.

    Values of secret environment variables (AWS_SECRET_ACCESS_KEY, FSSPEC_S3_SECRET, ...) are removed wherever they
    occur.
    """
    for secret in _secrets_of_environment():
        text = text.replace(secret, "...")
    text = _KNOWN.sub("...", text)
    if "://" in text:
        text = _URL.sub(lambda match: public_url(match[0]), _USER.sub(_without_user, text))
    if "@" in text:
        text = _USER_WITHOUT_SCHEME.sub("...@", text)
    if "=" in text or ":" in text:
        for pattern in _FIELDS:
            text = pattern.sub(r"\1...", text)
    return text


def public_url(url: str) -> str:
    """Return `url` without user part, query string and fragment.

    For an object name in a bucket, which may contain ? and #, only the values of secret fields after a ? are removed.
    """
    url = _USER.sub(_without_user, url, count=1)
    if url.partition("://")[0].lower() not in _NAMES_ONLY:
        return re.split("[?#]", url)[0]
    name, mark, query = url.partition("?")
    return name + mark + _FIELDS[0].sub(r"\1...", query)


def _without_user(match: re.Match[str]) -> str:
    is_container = match[1].lower() in _CONTAINER_AT and (match[1].lower() == "github" or ":" not in match[0][8:])
    return match[0] if is_container else f"{match[1]}://"


def _secrets_of_environment() -> Iterator[str]:
    """Yield the values of secrets in the environment, except paths, which error messages must show."""
    for name, value in os.environ.items():
        if name.startswith("FSSPEC_") and value.startswith("{"):
            try:
                yield from _secrets_of(json.loads(value))
            except (ValueError, RecursionError):
                continue
        elif SECRET_NAME.search(name) and len(value) >= MIN_SECRET_CHARS and not value.startswith(("/", "~", ".")):
            yield value


def _secrets_of(options: object) -> Iterator[str]:
    for name, value in options.items() if isinstance(options, dict) else ():
        if isinstance(value, str) and SECRET_NAME.search(name) and len(value) >= MIN_SECRET_CHARS:
            yield value
        yield from _secrets_of(value)


class MmbeamError(Exception):
    """The base class of all exceptions that mmbeam raises on purpose. Its message holds no credentials."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class UsageError(MmbeamError):
    """The arguments contradict each other or name something that does not exist.

    A message names arguments as Python does, in backquotes (`batch_size`); the command line shows them as options.
    """


class JobError(MmbeamError):
    """The job cannot start, or must stop."""


class NoShardsError(JobError):
    """No shard matches the input patterns."""


class ModelError(JobError):
    """A model directory lacks a file, holds pickled weights, or belongs to no known family."""


class RunMismatchError(JobError):
    """The output belongs to a run of another configuration, or a committed input has changed."""


class MissingModalityError(JobError):
    """A requested modality is absent from every sample."""


class FailureRateError(JobError):
    """The fraction of failed samples exceeds the limit."""


class DeviceError(JobError):
    """The device is absent, lost or broken; every later result of this process is suspect."""


class FlowError(JobError):
    """Batches arrived out of order or incomplete, or the counts do not add up."""


class TrainingError(JobError):
    """There is nothing to train on, or the loss or a gradient became NaN or infinite."""


class ShardError(MmbeamError):
    """One input cannot be read at all: it is missing, unreadable after retries, or not a tar."""


class SampleError(MmbeamError):
    """One sample cannot be used; the message states what was expected and what was found."""


class DecodeError(SampleError):
    """The bytes of a member cannot be decoded as an image, a sound or a text."""


class LimitError(SampleError):
    """A member is larger, longer or has more pixels than the limits allow."""


class PromptError(SampleError):
    """A sample lacks a field that the prompt names, or its metadata holds no valid dialogue."""


class CrashError(SampleError):
    """Processing a sample ends the process: a codec crashes, or the kernel kills it because memory is short."""


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean X?" with the most similar of the `known` names, to end a message.

    Return "" if no similarity reaches `cutoff`, from 0 to 1. Case, and - or _ between words, do not matter.
    """
    names = {name.lower().replace("_", "-"): name for name in known}
    similar = difflib.get_close_matches(word.lower().replace("_", "-"), names, n=1, cutoff=cutoff)
    return f"; did you mean {names[similar[0]]}?" if similar else ""


MESSAGE_CHARS = 300  # of text from the input, or from a codec, in a message


def printable(text: str) -> str:
    """Return the beginning of `text` without control characters, fit for a terminal."""
    cut = text if len(text) <= MESSAGE_CHARS else text[: MESSAGE_CHARS - 3] + "..."
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in cut)
