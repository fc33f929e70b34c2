"""What a process of a run learns of the others' end: one of them tells it, in one line, and all end."""

import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

DONE, FAILED, LOST, GONE = range(4)  # GONE is never said: it is what silence means
EVER = timedelta(days=3650)
ANSWER_S = 5.0  # that a process waits for the word that explains its error, and for its own word to be heard
ADVICE = "--resume goes on from the newest checkpoint, with any number of processes"
STUCK_S = 30.0  # after which a process ends that waits for one that is gone, as NCCL does without an error


class ProcessLostError(RuntimeError):
    """Another process of the run is gone; the message names it and says how to go on."""


class Watch:
    """Processes stand in a ring, and each says one word to the next: that it is done, has failed, or heard of a loss.

    The one that gets none, because the connection ends, knows that the process before it was killed. It alone tells;
    the others, to whom gloo gives errors about connections and NCCL nothing at all, end without a word. Collective.

    Args:
        rank: of this process.
        hosts: of each process.
        timeout_s: that a process waits for another one.
        advice: what the message ends with.
    """

    def __init__(self, rank: int, hosts: Sequence[str], timeout_s: float, advice: str):
        self.before, self.after = (rank - 1) % len(hosts), (rank + 1) % len(hosts)
        self.message = (
            f"process {self.before} of {len(hosts)} (on {hosts[self.before]}) is gone: killed, or its machine failed; "
            f"the others end too. {advice}"
        ).rstrip(". ")
        self.late = f"another process has not answered for {timeout_s:.0f} s (timeout_s). {advice}".rstrip(". ")
        self.group = dist.new_group(backend="gloo", timeout=EVER)
        self.lock, self.said, self.heard = threading.Lock(), False, DONE
        self.answered, self.left = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._listen, name="watch", daemon=True)
        self.thread.start()

    def explain(self, error: BaseException) -> None:
        """Raises what is to be told in the place of an error that another process's end has caused, if it was that.

        Raises:
            ProcessLostError: the process before this one is gone, or one did not answer in time.
            SystemExit: another process tells what happened.
        """
        # gloo has no error of its own, but names its source file.
        of_connection = isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
        if of_connection:
            self.answered.wait(ANSWER_S)
        if self.heard == GONE:
            raise ProcessLostError(self.message) from error
        if self.heard == LOST or (self.heard == FAILED and of_connection):
            raise SystemExit(1) from error
        if of_connection and "timed out" in str(error).lower():
            raise ProcessLostError(self.late) from error

    def leave(self, failed: bool) -> None:
        """Says this process's word."""
        self.left.set()
        self._say(LOST if self.heard >= LOST else FAILED if failed else DONE)
        self.thread.join(ANSWER_S if failed else None)

    def _say(self, word: int) -> None:
        with self.lock:
            said, self.said = self.said, True
        if not said:
            with suppress(RuntimeError):  # nobody is there
                work = dist.isend(torch.tensor([word], dtype=torch.uint8), self.after, self.group)
                if work is not None:
                    work.wait(timedelta(seconds=ANSWER_S))

    def _listen(self) -> None:
        word = torch.tensor([GONE], dtype=torch.uint8)
        with suppress(RuntimeError):  # it is gone
            dist.recv(word, self.before, self.group)
        self.heard = int(word)
        self.answered.set()
        if self.heard == DONE:
            return
        self._say(FAILED if self.heard == FAILED else LOST)
        if self.heard == FAILED or self.left.wait(STUCK_S):
            return
        if self.heard == GONE:
            print(f"foveate: {self.message}", file=sys.stderr, flush=True)
        os._exit(1)
