"""SIGTERM, as preemption sends it: a flag that the loop asks for after each step."""

import signal

import jax
from jax.experimental import multihost_utils


class Stop:
    """While entered, stop(step) says whether SIGTERM has come: to any process, for all alike.

    With several processes JAX's coordination service, which takes the signal, names the next number
    that all will ask about. start: the step that the run goes on from. Numbers before it are asked
    about on entering: a signal that came while the program was compiled has been given one of them.
    """

    def __init__(self, start=0):
        self.start, self.asked = start, False

    def __enter__(self):
        if jax.process_count() == 1:
            self.before = signal.signal(signal.SIGTERM, self._ask)
        else:
            passed = [self._reached(i) for i in range(1, self.start + 1)]  # every one, to the last
            self.asked = any(passed)
        return self

    def __exit__(self, *_):
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self.before)

    def _ask(self, *_):
        self.asked = True

    def __call__(self, step):
        return self.asked or (jax.process_count() > 1 and self._reached(step))

    def _reached(self, number):
        return multihost_utils.reached_preemption_sync_point(number)
