"""`launch_router`, `python -m warmroute.launch_router`: the router in front of workers that run already."""

import os
import sys
from collections.abc import Sequence

from warmroute.app import run
from warmroute.command_line import parse_router_command_line


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return run(parse_router_command_line(sys.argv[1:] if argv is None else argv, os.environ))


if __name__ == "__main__":
    sys.exit(main())
