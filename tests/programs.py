"""Stand-ins for programs that a script calls."""

from __future__ import annotations

from pathlib import Path


def write_programs(folder: Path, **lines: str) -> None:
    """Write a shell script of these lines into `folder` for each name."""
    for name, text in lines.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
