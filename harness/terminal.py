"""Standard output, as rich writes to it. A module of its own, because what shows progress needs torch."""

from __future__ import annotations

import os

from rich.console import Console

WIDE = 1000  # columns of an output that is no terminal


def console() -> Console:
    """Standard output. Lines and tables are fitted to a terminal's width, never to that of a file or a pipe."""
    out = Console()
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = WIDE
    return out
