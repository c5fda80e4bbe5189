"""What the fork server imports first: from then on it ends with the sweep that started it, in whatever it is.

Otherwise it would notice only when it has imported all the rest.
"""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # of prctl(2); processes that are forked do not inherit it

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
