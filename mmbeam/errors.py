"""The errors mmbeam raises, and which of the two classes of error each belongs to.

MmbeamError
+-- UsageError            the arguments cannot be meant like this (exit status 2)
+-- JobError              nothing can work, or nothing should go on (exit status 1)
|   +-- NoShardsError           no input matches
|   +-- ModelError              a model directory that cannot be used
|   +-- RunMismatchError        the output holds another configuration's run, or an input changed
|   +-- MissingModalityError    a modality was asked for and no sample has it
|   +-- FailureRateError        more samples fail than the limit allows
|   +-- DeviceError             the device is gone, absent or broken: never a sample's fault
|   +-- FlowError               a promise of the flow is broken (order, fusion, conservation)
|   +-- TrainingError           a model cannot be fitted to these samples, or the loss is no number any more
+-- ShardError            an input is gone, unreadable or no tar: its unit fails, the others go on
+-- SampleError           something is wrong with one sample: it becomes a Failure, never raised out
    +-- DecodeError             the bytes are not what they claim to be
    +-- LimitError              the bytes claim more than a limit allows
    +-- PromptError             the sample has not what the prompt names, or its turns are malformed

What is wrong with the surroundings and is not of this tree (OSError from storage, MemoryError,
PermissionError) is raised as it is; the attempt ends and the runner may try again.
"""


class MmbeamError(Exception):
    """The root: everything mmbeam raises on purpose."""


class UsageError(MmbeamError):
    """The arguments contradict each other or name something that does not exist."""


class JobError(MmbeamError):
    """The job cannot start, or must stop."""


class NoShardsError(JobError):
    """No shard matches the input patterns."""


class ModelError(JobError):
    """A model directory lacks a file, holds pickled weights, or is of no known family."""


class RunMismatchError(JobError):
    """The output belongs to a run of another configuration, or a committed input has changed."""


class MissingModalityError(JobError):
    """A modality was asked for and no sample has it."""


class FailureRateError(JobError):
    """The share of failed samples passed the limit."""


class DeviceError(JobError):
    """The device is absent, lost or broken; every later result of this process is suspect."""


class FlowError(JobError):
    """Batches came out of order or incomplete, or the counts do not add up."""


class TrainingError(JobError):
    """There is nothing to train on, or the loss or a gradient became infinite or not a number."""


class ShardError(MmbeamError):
    """One input cannot be read at all: gone, unreadable after retries, or no tar."""


class SampleError(MmbeamError):
    """One sample cannot be used; its message says what was expected and what was found."""


class DecodeError(SampleError):
    """The bytes of a member are not a picture, a sound or a text that can be decoded."""


class LimitError(SampleError):
    """A member is larger, longer or has more pixels than the limits allow."""


class PromptError(SampleError):
    """A sample lacks a field that the prompt names, or its metadata holds no turns of a dialogue."""
