"""The trainer with a rank 1 that loads its batches slowly, and for ever once the file SLOW_RANK_HANGS names is there."""

import os
import sys
import time
from pathlib import Path

from finetune_trainer.__main__ import main
from finetune_trainer.feed import Feed

SECONDS = 0.1
load = Feed.batch


def load_slowly(feed, indices):
    if Path(os.environ["SLOW_RANK_HANGS"]).exists():
        time.sleep(1e6)
    time.sleep(SECONDS)
    return load(feed, indices)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        Feed.batch = load_slowly
    code = main()
    sys.stdout.flush()
    os._exit(code)
