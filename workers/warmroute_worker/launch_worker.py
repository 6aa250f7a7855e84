"""`launch_worker --model-path DIR_OR_demo --host H --port P`: one model behind HTTP."""

from __future__ import annotations

import sys

from warmroute_worker import nodes, supervisor
from warmroute_worker.command_line import parse


def main() -> int:
    """Exit code: 0 after SIGTERM, 2 for a bad command line, 3 if the nodes do not come together, 1 for everything else
    that ends a worker."""
    args = parse(sys.argv[1:])
    try:
        return supervisor.run(args)
    except supervisor.StartError as error:
        print(f"launch_worker: error: {error}", file=sys.stderr)
        return 1
    except nodes.NodesError as error:
        print(f"launch_worker: error: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
