"""The errors a user can cause. Each carries one message that says what was got and what is taken."""


class SDPError(Exception):
    """Base class: anything that is reported to a user without a traceback.

    Attributes:
        is_of_another_rank: whether it says what broke on another rank, which reports that itself if it can.
    """

    is_of_another_rank = False


class ConfigError(SDPError, ValueError):
    """A key of the SDP block, of the DeepSpeed config or of the command line is unusable."""


class PlanError(SDPError, ValueError):
    """A subnetwork plan is impossible, or does not fit the model it is used with."""


class ModelError(SDPError, ValueError):
    """A model cannot be partitioned: no adapter knows it, or it has a feature SDP does not support."""


class DataError(SDPError, ValueError):
    """A text source or a tokenizer is missing, unreadable or too small."""


class OutputError(SDPError, OSError):
    """A folder or file cannot be written."""


class NonFiniteError(SDPError, ArithmeticError):
    """Gradients hold NaN or Inf, and the job is configured to stop then."""


class ConsistencyError(SDPError, RuntimeError):
    """Owners of a unit hold different weights."""


class CheckpointError(SDPError, RuntimeError):
    """A checkpoint is missing, incomplete, damaged, or does not fit the model."""


class StateError(SDPError, RuntimeError):
    """Something is used at a time when it cannot be: weights that are freed, an engine that is destroyed."""


class WaitError(SDPError, RuntimeError):
    """Other ranks did not come to a collective in time, or are gone."""
