"""What the processes of one run tell each other when one of them fails: none waits for it for ever."""

import os
import sys
import threading
import time
import traceback

import jax

from lcm_jax.errors import InputError

KEY = 'lcm_jax/failed'  # in the key-value store of JAX's coordination service, which process 0 runs
EVERY = 0.5  # seconds between two looks at it


def store():
    """The coordination service's client, for which JAX has no public name; None in a run of one process."""
    from jax._src.distributed import global_state

    return global_state.client if jax.process_count() > 1 else None


class Peers:
    """While entered in each of several processes, an exception in one ends all, with status 1.

    In a run of one process it does nothing. expected: exceptions that all processes raise alike.
    """

    def __init__(self, expected=()):
        self.expected, self.left = expected, threading.Event()

    def __enter__(self):
        self.store = store()
        if self.store:
            threading.Thread(target=self.watch, daemon=True).start()
        return self

    def __exit__(self, kind, error, _):
        self.left.set()
        if not self.store or error is None or isinstance(error, self.expected):
            return
        if isinstance(error, InputError):
            said = f'error: {error}'
        else:
            traceback.print_exception(error)
            said = f'error: {kind.__name__}: {str(error).splitlines()[0] if str(error) else ""}'
        me = jax.process_index()
        try:
            self.store.key_value_set(f'{KEY}/{me}', said)
        except Exception:  # the service is gone, and with it the processes that could listen
            pass
        end(said)

    def watch(self):
        """Look for what other processes have said, while this one waits for them."""
        while not self.left.wait(EVERY):
            try:
                failed = self.store.key_value_dir_get(KEY)
            except Exception:
                continue  # JAX ends a process that has lost the service
            if failed and not self.left.is_set():
                key, said = failed[0]
                end(f'{said} (in process {key.rpartition("/")[2]}; this is {jax.process_index()})')


def end(said):
    """Say so and end this process at once: a thread that waits for other processes cannot be woken."""
    print(said, file=sys.stderr, flush=True)
    sys.stdout.flush()
    time.sleep(4 * EVERY if jax.process_index() == 0 else EVERY)  # the service outlives the others
    os._exit(1)
