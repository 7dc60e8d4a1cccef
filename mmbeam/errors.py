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

Faults of the environment that are not in this tree (OSError from storage, MemoryError, PermissionError) are
raised unchanged: the attempt ends, and the runner may retry.
"""


class MmbeamError(Exception):
    """The base class of all exceptions that mmbeam raises on purpose."""


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


MESSAGE_CHARS = 300  # of text from the input, or from a codec, in a message


def printable(text: str) -> str:
    """Return the beginning of `text` without control characters, fit for a terminal."""
    cut = text if len(text) <= MESSAGE_CHARS else text[: MESSAGE_CHARS - 3] + "..."
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in cut)
