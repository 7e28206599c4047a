"""A loopback interface of a given speed, which the processes of an arm have to themselves (Linux).

It is that of a network namespace; `unshare`, `ip` and `tc` make it, and no privilege is needed
where user namespaces are allowed. What any process sends to another goes through one queue, so
that the speed is that of both directions, and of all ranks, together.
"""

import sys
from pathlib import Path

SCRIPT = """#!/bin/sh
exec unshare --net --map-root-user sh -c '
ip link set lo up &&
tc qdisc add dev lo root tbf rate {mbit}mbit burst 256kb latency 10s &&
exec "$0" "$@"' {python} "$@"
"""


def python_behind(mbit: int, folder: Path) -> str:
    """Write a program that is this Python, with a loopback interface of its own.

    Args:
        mbit: Its speed, megabits per second.
        folder: Where it is written.

    Returns:
        Its path.
    """
    program = folder / "python"
    program.write_text(SCRIPT.format(mbit=mbit, python=sys.executable))
    program.chmod(0o700)
    return str(program)
