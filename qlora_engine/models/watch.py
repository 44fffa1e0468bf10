"""Ends a process whose peers have died, before a collective makes it wait for ever."""

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 30.0  # a process stopped this long is taken for dead
LOST_EXIT = 17
# what gloo, NCCL and the store say when the other side of a connection is gone
SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "nccl communicator was aborted",
    "remote process exited",
    "socket timeout",
    "timed out waiting",
    "watchdog caught collective operation timeout",
)
_CONTEXTS = itertools.count()  # processes enter these contexts in the same order


class PeerLost(RuntimeError):
    """Another process of the group has died, or does not answer."""


@contextlib.contextmanager
def watch_peers(
    advice: str = "", silence: float = SILENCE_SECONDS, on_loss: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Within this context, a process that loses another one ends, and says why.

    A collective over gloo fails at once when a peer's connection breaks: that error becomes `PeerLost`. One over NCCL
    can wait for the group's whole timeout: a thread exchanges a count with the others through the group's store every
    2 seconds, and where one has stopped counting, or the store has gone with the first process, prints the sentence
    and ends this process with exit code 17. Where there are no other processes, nothing is watched.

    Args:
        advice: end of the sentence, such as where the last checkpoint is.
        silence: seconds after which a process that does not count is taken for dead.
        on_loss: called with the sentence instead of ending the process.

    Raises:
        PeerLost: in the place of the error of a collective that lost its peer.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    done = threading.Event()
    store = dist.distributed_c10d._get_default_store()  # torch has no public name for it
    # a connection of its own, as a store's waits would hold it up
    store = dist.PrefixStore(f"qlora_engine/watch/{next(_CONTEXTS)}", store.clone())
    watcher = Watcher(store, dist.get_rank(), dist.get_world_size(), advice, silence, on_loss or _end, done)
    thread = threading.Thread(target=watcher.run, name="watch_peers", daemon=True)
    thread.start()
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if isinstance(error, PeerLost) or not _is_loss(error):
            raise
        raise PeerLost(_sentence(dist.get_rank(), "another process", advice)) from error
    finally:
        done.set()
        thread.join(BEAT_SECONDS)


def _is_loss(error: BaseException) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in SIGNS)


def _sentence(rank: int, who: str, advice: str) -> str:
    return f"rank {rank}: {who} of the run has died or does not answer; this one ends. {advice}".strip()


def _end(sentence: str) -> None:
    print(f"qlora: error: {sentence}", file=sys.stderr, flush=True)
    os._exit(LOST_EXIT)  # the main thread may be waiting inside a collective


class Watcher:
    """Counts in the group's store, and watches the others' counts.

    Args:
        store: what the processes share.
        rank, size: of this process, and of the group.
        advice, silence, on_loss: as in `watch_peers`.
        done: set when there is nothing more to watch.
    """

    def __init__(self, store, rank: int, size: int, advice: str, silence: float, on_loss, done: threading.Event):
        self.store, self.rank, self.size = store, rank, size
        self.advice, self.silence, self.on_loss, self.done = advice, silence, on_loss, done

    def beat(self) -> None:
        """Says that this process lives."""
        self.store.add(f"{self.rank}", 1)

    def run(self) -> None:
        """Watches until `done` is set or another process is lost."""
        counts, heard = [0] * self.size, [time.monotonic()] * self.size
        while not self.done.wait(BEAT_SECONDS):
            try:
                self.beat()
                for peer in range(self.size):
                    count = self.store.add(f"{peer}", 0)
                    if count != counts[peer] or self.store.add(f"{peer} finished", 0):
                        counts[peer], heard[peer] = count, time.monotonic()
            except Exception:  # of whatever kind: the store lives in the first process, and that has gone
                return self._lost(0)
            silent = [peer for peer in range(self.size) if time.monotonic() - heard[peer] > self.silence]
            if silent:
                return self._lost(silent[0])
        with contextlib.suppress(Exception):  # the first process may have ended already
            self.store.add(f"{self.rank} finished", 1)

    def _lost(self, peer: int) -> None:
        if not self.done.is_set():
            self.on_loss(_sentence(self.rank, f"rank {peer}", self.advice))
