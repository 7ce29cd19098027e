"""`python -m tests.torture [--faults N] [--seed S] [--jobs K] [--json FILE]`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from tests.torture.campaign import Campaign


def main() -> int:
    """Run a campaign; 1 where anything was lost, wrong, left behind or unexplained."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0)) // 2), help="trials at a time")
    parser.add_argument("--epochs", type=int, default=80, help="length of the tortured run, 4 updates each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    console = Console(width=max(120, Console().width))
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    begun = time.monotonic()
    campaign = Campaign(folder, arguments.seed, arguments.epochs, lambda text: console.print(text, markup=False))
    campaign.run(arguments.faults, arguments.jobs)
    seconds = time.monotonic() - begun
    tally = campaign.tally
    console.print(tally.table())
    for kind in campaign.left_out:
        console.print(f"left out, this machine does not allow it: {kind}")
    console.print(f"{tally.hits} faults, seed {arguments.seed}, {seconds:.0f} s, {len(tally.details)} problems")
    if arguments.json:
        record = {
            "seed": arguments.seed,
            "seconds": round(seconds),
            "machine": f"{platform.platform()}, {os.cpu_count()} cores",
            "left_out": campaign.left_out,
            **tally.to_json(),
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    if tally.details:
        for detail in tally.details:
            console.print(detail, markup=False, highlight=False)
        console.print(f"what the failed trials left is in {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
