"""Shows the agent where this worker stands: SIGUSR1 has the stacks of all threads appended to a file that the agent reads.

The answer is written by the signal handler itself, so it comes even while the main thread waits inside a collective. The file is made
first, and means that the signal may be sent.
"""

import faulthandler
import os
import signal
from collections.abc import Mapping
from pathlib import Path

from finetune_api import contract


def show_stacks_when_asked(environment: Mapping[str, str]) -> None:
    """Take SIGUSR1 from now on, if there is an agent that may send it."""
    folder = environment.get(contract.STACKS_FOLDER)
    if folder is None:
        return
    path = Path(folder) / f"{environment.get('RANK', '0')}-{os.getpid()}"
    # The descriptor is faulthandler's, for as long as this process lives.
    faulthandler.register(signal.SIGUSR1, file=path.open("a"), all_threads=True)
