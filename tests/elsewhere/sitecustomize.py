"""Take from charlm what another platform lacks, in every Python that has this folder first on PYTHONPATH.

ELSEWHERE names the platform: windows or macos. For charlm, hydra_plugins and train.py, names of `os`, `signal` and
`socket` are missing there. Libraries keep them, since they look at sys.platform instead: NumPy calls os.uname, PyTorch
os.register_at_fork, filelock opens with os.O_NONBLOCK, Lightning handles SIGUSR1, multiprocessing sends SIGKILL.
Nobody can fork. POSIX's modules fail to import for everyone but filelock, which comes first.

os.name stays "posix", and so do paths, the console, the file system, and how multiprocessing starts and pipes.
"""

import multiprocessing.context
import os
import signal
import socket
import sys
from types import ModuleType
from typing import Any

OURS = {"charlm", "hydra_plugins", "train", "__main__"}
MODULES = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
NAMES = {
    "os": """
        O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK WNOHANG chown chroot confstr fchdir fchmod fchown fork forkpty
        getegid geteuid getgid getgroups getloadavg getpgid getpgrp getpriority getsid getuid initgroups killpg lchown
        mkfifo mknod nice openpty pathconf posix_fadvise posix_fallocate posix_spawn posix_spawnp pread pwrite
        register_at_fork sched_getaffinity sched_setaffinity sendfile setegid seteuid setgid setpgid setpgrp setsid
        setuid statvfs sync sysconf tcgetpgrp ttyname uname wait wait3 wait4 waitid
    """,
    "signal": """
        ITIMER_REAL SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGIO SIGKILL SIGPIPE SIGPROF SIGQUIT SIGSTOP SIGTSTP SIGTTIN
        SIGTTOU SIGUSR1 SIGUSR2 SIGVTALRM SIGWINCH SIGXCPU SIGXFSZ SIG_BLOCK SIG_SETMASK SIG_UNBLOCK alarm getitimer
        pause pthread_kill pthread_sigmask setitimer siginterrupt sigpending sigtimedwait sigwait sigwaitinfo
    """,
    "socket": "AF_UNIX CMSG_LEN CMSG_SPACE SCM_RIGHTS recv_fds send_fds",
}
WINDOWS = {module: {*names.split()} for module, names in NAMES.items()}
LINUX = {"fork", "forkpty", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity"}
LACKING = {"windows": WINDOWS, "macos": {"os": LINUX}}  # macOS has a fork, which is not to be used there
METHODS = {"windows": ["spawn"], "macos": ["spawn", "fork", "forkserver"]}


def hide(platform: str) -> None:
    """Hide all this in the present process."""
    import filelock  # noqa: F401

    lacking = LACKING[platform]

    class Elsewhere(ModuleType):
        def __getattribute__(self, name: str) -> Any:
            if name in lacking[super().__getattribute__("__name__")]:
                caller = str(sys._getframe(1).f_globals["__name__"])
                if caller.partition(".")[0] in OURS:
                    raise AttributeError(f"{caller} uses {name}, which {platform} lacks")
            return super().__getattribute__(name)

    for module in (os, signal, socket):
        if module.__name__ in lacking:
            module.__class__ = Elsewhere
    multiprocessing.get_all_start_methods = lambda: METHODS[platform]
    del os.fork, os.forkpty
    if platform == "windows":
        for name in MODULES:
            sys.modules[name] = None  # type: ignore[assignment]


if __name__ == "sitecustomize":
    hide(os.environ["ELSEWHERE"])
