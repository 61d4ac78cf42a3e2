"""Ends a process that was interrupted but is stuck in a C++ call; started by common.prompt_interrupt.

Arguments: process id, name of the command, and what to say. Standard input: the numbers of the signals it receives.
"""

import os
import signal
import sys
import time

PATIENCE = 2.0  # seconds in which Python's own KeyboardInterrupt may do it better


def main() -> None:
    """Wait for an interrupt, then for the process, then end it."""
    process, command, say = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    while received := os.read(0, 1):
        if received[0] == signal.SIGINT:
            time.sleep(PATIENCE)  # the process kills this one when it ends by itself
            print(f"\n{command}: interrupted; {say}", file=sys.stderr, flush=True)
            os.kill(process, signal.SIGTERM)
            return


if __name__ == "__main__":
    main()
