"""Writes a file out of shared memory, in a process of its own: run by its path, it imports nothing that takes time.

    python file_writer.py DESCRIPTOR PATH

It says one JSON object: ``{"bytes": ..., "sha256": ...}``, or ``{"errno": ...}``.
"""

import hashlib
import json
import mmap
import os
import sys

_PIECE = 16 << 20


def main(descriptor: int, path: str) -> None:
    """Write, fsync, and say what was written; end early where the process that asked for it is gone."""
    parent, digest = os.getppid(), hashlib.sha256()
    nbytes = os.fstat(descriptor).st_size
    try:
        with mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_READ) as memory, open(path, "wb") as file:
            for start in range(0, nbytes, _PIECE):
                if os.getppid() != parent:
                    sys.exit(1)
                with memoryview(memory)[start : start + _PIECE] as piece:
                    file.write(piece)
                    digest.update(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        print(json.dumps({"errno": error.errno}))
        return
    print(json.dumps({"bytes": nbytes, "sha256": digest.hexdigest()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
