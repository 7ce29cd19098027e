"""`dist-train`, except that each rank writes a digest of its network's weights at the end of the run.

`python -m tests.ranks.own_weights FOLDER ARGUMENTS...`
"""

from __future__ import annotations

import sys
from pathlib import Path

from dist_train.cli.main import main
from dist_train.cluster.launch import current_launch
from dist_train.training.trainer import Trainer
from tests.launching import digest_of

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    close = Trainer.close

    def write_and_close(self: Trainer) -> None:
        (folder / str(current_launch().rank)).write_text(digest_of(self.network.state_dict()))
        close(self)

    Trainer.close = write_and_close  # type: ignore[method-assign]  # observes only
    raise SystemExit(main(sys.argv[2:]))
