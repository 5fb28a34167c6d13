"""SIGTERM, as preemption sends it: a flag that the loop asks for after each step."""

import signal

import jax
from jax.experimental import multihost_utils


class Stop:
    """While entered, stop(step) says whether SIGTERM has come: to any process, for all alike.

    With several processes JAX's coordination service, which takes the signal, names a step that all
    will reach.
    """

    def __enter__(self):
        self.asked = False
        if jax.process_count() == 1:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_):
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self.before)

    def _ask(self, *_):
        self.asked = True

    def __call__(self, step):
        if jax.process_count() == 1:
            return self.asked
        return multihost_utils.reached_preemption_sync_point(step)
