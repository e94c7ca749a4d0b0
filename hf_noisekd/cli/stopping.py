"""What a user or a scheduler stops: Ctrl-C and SIGTERM, with the exit codes that a shell expects."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Terminated(BaseException):
    """SIGTERM, as what a `KeyboardInterrupt` is to Ctrl-C; no `except Exception` holds it up."""


def exit_code(stop: KeyboardInterrupt | Terminated) -> int:
    """Return 128 and the number of the signal, as a shell has it."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@contextlib.contextmanager
def raising_at_sigterm() -> Iterator[None]:
    """Context in which SIGTERM is raised as [`Terminated`], so that what is half-written is cleared away."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield  # somebody else's, or not allowed
        return

    def stop(number, frame):
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
