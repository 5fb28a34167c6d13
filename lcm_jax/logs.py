"""What a run tells: TensorBoard, a file of JSON lines, and what it costs."""

import json
import resource
import sys
from pathlib import Path

import jax
from tensorboardX import SummaryWriter


class Writer:
    """Scalars and pictures of a run into its workdir; only the first process writes.

    metrics.jsonl has a line for each report, {'step': ..., 'loss': ...}; lines after `start`, of a
    run that was killed and goes on from there, are taken out.
    """

    def __init__(self, workdir, start=0):
        self.active = jax.process_index() == 0
        if not self.active:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self.board, file = SummaryWriter(str(workdir)), workdir / 'metrics.jsonl'
        kept = _whole_lines(file.read_text()) if file.is_file() else []
        file.write_text(''.join(line + '\n' for line in kept if json.loads(line)['step'] <= start))
        self.lines = open(file, 'a')

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.active:
            self.board.close()
            self.lines.close()

    def scalars(self, step, values):
        if self.active:
            self.lines.write(json.dumps({'step': step, **values}) + '\n')
            self.lines.flush()
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def picture(self, step, name, picture):
        """picture [H,W,3] uint8."""
        if self.active:
            self.board.add_image(name, picture, step, dataformats='HWC')


def _whole_lines(text):
    return text[: text.rfind('\n') + 1].splitlines()


def say(text):
    """Print, once for all processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def memory():
    """Peak bytes: of the first local device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return stats.get('peak_bytes_in_use', peak * (1 if sys.platform == 'darwin' else 1024))


def size(n):
    """Bytes -> '1.5 GB'."""
    for unit in ('B', 'kB', 'MB', 'GB', 'TB'):
        if n < 1000 or unit == 'TB':
            return f'{n:.3g} {unit}'
        n /= 1000
