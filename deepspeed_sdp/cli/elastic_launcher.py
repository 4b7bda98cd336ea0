"""``torchrun`` for ``pretrain --elastic``: silent where ranks have said what is wrong."""

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, parse_args, run

_TALKERS = ("agent.server.api", "multiprocessing.api")
# How long a job that is asked to stop may take to save, where torchrun can be told.
_PATIENCE = ("--shutdown_timeout", "300")


def main(argv: list[str]) -> int:
    """Run it; the exit code."""
    for name in _TALKERS:
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    is_known = _PATIENCE[0] in get_args_parser().format_help()
    try:
        run(parse_args([*(_PATIENCE if is_known else ()), *argv]))  # type: ignore[no-untyped-call]
    except SignalException:
        return 1
    except ChildFailedError as error:
        how = ", ".join(f"rank {rank}: {failure.message}" for rank, failure in error.failures.items())
        print(f"error: no restarts are left ({how})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
