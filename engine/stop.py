"""Signals that ask a run to stop: the step ends, all is saved, the exit code says so."""

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
    the process, with nothing saved. A process that this one has forked ends at once.

    requested: on this rank. agreed: on any, as all ranks know after an optimizer step.
    """

    def __init__(self):
        self.requested = self.agreed = False
        self.since = 0.0  # of the request
        self.all_saved = True
        self.process = os.getpid()
        for number in stopping_signals():
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            os._exit(EXIT_STOPPED)
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


def close_output() -> int:
    """What is still to be printed goes nowhere, as where `| head` has read enough; the exit code of
    that."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def serve_until_the_end(_: int) -> None:
    """A worker ends with its process; no signal may take it away before the last save."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
