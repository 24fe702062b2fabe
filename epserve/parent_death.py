"""A process that a launcher started dies with it, even when the launcher was killed.

Knows one environment variable and one Linux system call; knows nothing of what the process
does. Called first thing in the child's own main: a hook between fork and exec would be unsafe
in a parent with threads.
"""

import ctypes
import os
import signal
import sys

PARENT_PID_VARIABLE = "EPSERVE_PARENT_PID"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the one named in EPSERVE_PARENT_PID ends.

    Does nothing where the variable is not set. The variable is taken out of the environment,
    so that whatever this process starts is not bound to its grandparent.
    """
    parent_pid = os.environ.pop(PARENT_PID_VARIABLE, "")
    if not parent_pid or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have died before the call, which then waits for a death long past.
    if os.getppid() != int(parent_pid):
        sys.exit(1)
