"""What can go wrong with a checkpoint, by what its user has to do about it."""

from vrt.lifecycle import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_UNAVAILABLE


class CheckpointError(ValueError):
    """A checkpoint can't be used or written as it is; the message says which, why, and the way on."""


class Missing(CheckpointError):
    """The store has no such object."""


class FolderUnavailable(CheckpointError):
    """The local folder can't take a checkpoint that is sound elsewhere: no room, no right to write."""


class MachineShort(RuntimeError):
    """This machine lacks the memory, or the file handles, to read a checkpoint, which says nothing about the checkpoint."""


class StoreUnavailable(RuntimeError):
    """The store or the registry did not answer. Worth trying again: training goes on meanwhile."""


class StoreRefuses(StoreUnavailable):
    """The store answered no: to these credentials, for this bucket. Rights can be mended while the training goes on."""


class ClockRefused(StoreRefuses):
    """The store takes no request of this machine's, whose clock is too far off."""


class SavesFail(RuntimeError):
    """Saving failed so often, or so early, that going on would risk the training."""


class LockedError(RuntimeError):
    """Another trainer owns the checkpoint folder or the lineage."""


class LeaseLost(RuntimeError):
    """Another trainer took the lineage over: this one may publish nothing more."""


def exit_code_of(error: Exception) -> int:
    """What tells whoever launched a command what to do about the error that ended it."""
    if isinstance(error, ValueError):
        return EXIT_BAD_INPUT
    return EXIT_UNAVAILABLE if isinstance(error, StoreUnavailable) else EXIT_FAILED
