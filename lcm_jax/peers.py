"""What the processes of one run tell each other when one of them fails: none waits for it for ever."""

import ctypes
import itertools
import os
import re
import signal
import sys
import threading
import time
import traceback

import jax

from lcm_jax.errors import InputError, first_line

EVERY = 1.0  # seconds between two looks
LOST = 60.0  # seconds of silence after which a process is given up; JAX itself aborts after 100
WEEK = 7 * 24 * 3600.0  # seconds; what one process does while others wait may take hours
MEETINGS = itertools.count()  # the same in all processes: a barrier is good for once
FAILED, ALIVE = 'lcm_jax/failed', 'lcm_jax/alive'  # folders of the key-value store
DONE = 'done'
LINKS = 'Gloo|NCCL'  # what speaks of a collective whose other end is gone
AGAIN = 'start all processes again: the run goes on from its last checkpoint'


def store():
    """The key-value store of the coordination service, which process 0 runs; None if there is one process.

    JAX has no public name for it.
    """
    from jax._src.distributed import global_state

    return global_state.client if jax.process_count() > 1 else None


def meet(name, seconds=WEEK):
    """Until all processes have come here, in the same order of meetings; no collective of their devices, as
    those wait for 30 s only (on CPUs).

    `Peers` sees to it that none waits for one that is gone. Raises jax.errors.JaxRuntimeError when one of
    them has not come in that time.
    """
    if store():
        store().wait_at_barrier(f'lcm_jax/{name} {next(MEETINGS)}', int(1000 * seconds))


def all_come(name):
    """`meet`, but not for long -> whether all have come."""
    try:
        meet(name, LOST)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def on_abort(handler):
    """Set the C function that SIGABRT calls, or None for none. signal.signal has no use here: what it
    sets runs once native code has returned to Python, which abort() never does.
    """
    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    set_handler(signal.SIGABRT, handler and ctypes.cast(handler, ctypes.c_void_p))


class Peers:
    """While entered in each of several processes, an exception in one ends all, with status 1.

    So does the silence of one that was killed. In a run of one process it does nothing. expected:
    exceptions that all processes raise alike.
    """

    def __init__(self, expected=()):
        self.expected, self.left, self.heard = expected, threading.Event(), {}
        self.last_word = threading.Lock()  # of those who find that the run is over, one says so
        self.handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self.aborted)

    def __enter__(self):
        self.store, self.me = store(), jax.process_index()
        if self.store:
            now = time.monotonic()
            self.heard = {str(i): (None, now) for i in range(jax.process_count()) if i != self.me}
            on_abort(self.handler)
            threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, kind, error, _):
        self.left.set()
        if not self.store:
            return
        if error is None or isinstance(error, self.expected):
            on_abort(None)
            return self.store.key_value_set(f'{ALIVE}/{self.me}', DONE, allow_overwrite=True)
        if isinstance(error, InputError):
            said = f'error: {error}'
        elif isinstance(error, jax.errors.JaxRuntimeError) and re.search(LINKS, str(error)):
            said = f'error: another process is gone: {first_line(error)}; {AGAIN}'
        else:
            traceback.print_exception(error)
            said = f'error: {kind.__name__}: {error}'.splitlines()[0]
        try:
            self.store.key_value_set(f'{FAILED}/{self.me}', said)
        finally:  # whether there is someone to listen or not
            self.end(said)

    def watch(self):
        """Say that this process is alive, and end it when another one is not."""
        for count in range(1 << 40):
            if self.left.wait(EVERY):
                return
            try:
                self.store.key_value_set(f'{ALIVE}/{self.me}', str(count), allow_overwrite=True)
                failed, alive = (self.store.key_value_dir_get(name) for name in (FAILED, ALIVE))
            except Exception:
                return self.left.is_set() or self.end(f'error: process 0 is gone; {AGAIN}')
            if self.left.is_set():
                return
            for key, said in failed:
                self.end(f'{said} (in process {key.rpartition("/")[2]}; this is {self.me})')
            silent = self.silent({key.rpartition('/')[2]: beat for key, beat in alive})
            if silent:
                self.end(f'error: no sign of process {silent} for {LOST:.0f} s; {AGAIN}')

    def silent(self, alive):
        """What each process said last -> one that has been silent for too long, or None."""
        now = time.monotonic()
        for process, (beat, since) in self.heard.items():
            if alive.get(process) != beat:
                self.heard[process] = alive[process], now
            elif beat != DONE and now - since > LOST:
                return process
        return None

    def end(self, said):
        """Say so and end at once: a thread that waits for other processes cannot be woken."""
        if self.last_word.acquire(blocking=False):
            print(f'\n{said}', file=sys.stderr, flush=True)
        sys.stdout.flush()
        time.sleep(EVERY if self.me else 3 * EVERY)  # the store outlives those that ask it
        os._exit(1)

    def aborted(self, _):
        """`end` where JAX's native code ends this process: the moment that process 0 is gone, which
        runs the coordination service. It prints a page, and jaxlib 0.10 fails to call a callback.
        """
        if self.last_word.acquire(blocking=False):
            said = f'\nerror: another process is gone, of which JAX says more above; {AGAIN}\n'
            os.write(sys.__stderr__.fileno(), said.encode())
        os._exit(1)
