"""What can go wrong with a checkpoint, by what its user has to do about it."""


class CheckpointError(ValueError):
    """A checkpoint can't be used or written as it is; the message says which, why, and the way on."""


class Missing(CheckpointError):
    """The store has no such object."""


class FolderUnavailable(CheckpointError):
    """The local folder can't take a checkpoint that is sound elsewhere: no room, no right to write."""


class StoreUnavailable(RuntimeError):
    """The store or the registry did not answer. Worth trying again: training goes on meanwhile."""


class StoreRefuses(StoreUnavailable):
    """The store answered no: to these credentials, for this bucket. Rights can be mended while the training goes on."""


class SavesFail(RuntimeError):
    """Saving failed so often, or so early, that going on would risk the training."""


class LockedError(RuntimeError):
    """Another trainer owns the checkpoint folder or the lineage."""


class LeaseLost(RuntimeError):
    """Another trainer took the lineage over: this one may publish nothing more."""
