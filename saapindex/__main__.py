"""``python -m saapindex``: the command line, or a line that says how to get it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line if what it needs is installed."""
    try:
        from saapindex.cli import main as run
    except ImportError as error:
        sys.exit(f"error: the command line needs the package {error.name!r}: pip install 'saapindex[demo]'")
    run()


if __name__ == "__main__":
    main()
