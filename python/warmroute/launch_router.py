"""`launch_router`, `python -m warmroute.launch_router`: the router in front of workers that run already."""

import os
import sys
from collections.abc import Sequence

from warmroute.app import check, run
from warmroute.command_line import parse_router_command_line

CHECK_FLAG = "--check"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    only_check = CHECK_FLAG in given
    settings = parse_router_command_line([flag for flag in given if flag != CHECK_FLAG], os.environ)
    return check(settings.config) if only_check else run(settings)


if __name__ == "__main__":
    sys.exit(main())
