"""Signals that ask a run to stop: the step ends, all is saved, the exit code says so."""

import functools
import os
import signal
import sys
import time
from types import FrameType

EXIT_STOPPED = 3
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_REQUEST = 2.0  # seconds; torchrun sends on what a scheduler may have sent to all processes


def stopping_signals() -> list[signal.Signals]:
    """Those that this process does not ignore, as under nohup it does SIGHUP."""
    return [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]


class Stopped(BaseException):
    """A signal asked to stop, and all is saved. Like KeyboardInterrupt, nobody's to catch but
    main()'s."""


class Stop:
    """A request to stop (Ctrl-C, SIGTERM, SIGHUP): the optimizer step ends, all is saved, and the
    process exits with EXIT_STOPPED. One while nothing is unsaved ends the run at once, a later one
    the process, with nothing saved.

    requested: on this rank. agreed: on any, as all ranks know after an optimizer step.
    """

    def __init__(self):
        self.requested = self.agreed = False
        self.since = 0.0  # of the request
        self.all_saved = True
        for number in stopping_signals():
            signal.signal(number, self._handle)
        _watch_forks()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if time.monotonic() - self.since > ONE_REQUEST:
                os._exit(1)
            return
        self.requested, self.since = True, time.monotonic()
        if self.all_saved:
            raise Stopped

    def saved(self) -> None:
        """All is saved now: exit where a request came meanwhile, to this rank or as all agreed."""
        self.all_saved = True
        if self.requested or self.agreed:
            raise Stopped


@functools.cache
def _watch_forks() -> None:
    """A fork does not handle signals as this process does. They wait while it is made: one that
    came to it before it began would be lost, and whoever sent it would wait for its end."""

    def hold() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)

    def let_go() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def begin() -> None:
        """The end of one that encodes rows; none of one that a training waits for."""
        for number in STOPPING:
            stop = getattr(signal.getsignal(number), "__self__", None)
            if isinstance(stop, Stop):
                signal.signal(number, signal.SIG_DFL if stop.all_saved else signal.SIG_IGN)
        let_go()

    os.register_at_fork(before=hold, after_in_parent=let_go, after_in_child=begin)


def close_output() -> int:
    """What is still to be printed goes nowhere, as where `| head` has read enough; the exit code of
    that."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def serve_until_the_end(_: int) -> None:
    """A worker, forked or not, ends with its process; no signal may take it away before the last
    save."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
