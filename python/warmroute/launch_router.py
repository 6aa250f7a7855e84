"""`launch_router`, `python -m warmroute.launch_router`: the router in front of workers that run already."""

import os
import sys
from collections.abc import Sequence

from warmroute.app import check, run
from warmroute.command_line import parse_router_command_line
from warmroute.reexecution import CHECK_CONFIG_FLAG

CHECK_FLAG = "--check"
FLAGS = (CHECK_FLAG, CHECK_CONFIG_FLAG)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    settings = parse_router_command_line([flag for flag in given if flag not in FLAGS], os.environ)
    if CHECK_CONFIG_FLAG in given:
        print("launch_router: the configuration is valid")
        return 0
    return check(settings.config) if CHECK_FLAG in given else run(settings)


if __name__ == "__main__":
    sys.exit(main())
