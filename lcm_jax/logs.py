"""What a run tells: TensorBoard, a file of JSON lines, and what it costs."""

import json
import math
import resource
import sys
from pathlib import Path

import jax
from PIL import Image

from lcm_jax.atomic import whole
from lcm_jax.chips import chip
from lcm_jax.tree import count, named


class Writer:
    """Scalars and pictures of a run into its workdir; only the first process writes.

    metrics.jsonl has a line for each report, {'step': ..., 'loss': ...}; lines after `start`, of a
    run that was killed and goes on from there, are taken out, and TensorBoard hides them.
    """

    def __init__(self, workdir, start=0):
        self.active = jax.process_index() == 0
        if not self.active:
            return
        from tensorboardX import SummaryWriter  # it imports torch, where that is installed: seconds

        self.workdir = Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.board = SummaryWriter(str(workdir), purge_step=start + 1)
        file = self.workdir / 'metrics.jsonl'
        kept = _whole_lines(file.read_text()) if file.is_file() else []
        with whole(file) as part:
            part.write_text(
                ''.join(line + '\n' for line in kept if json.loads(line)['step'] <= start)
            )
        self.lines = open(file, 'a')  # noqa: SIM115 - closed with the writer

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
        """picture [H,W,3] uint8, to TensorBoard and as NAME/STEP.png."""
        if self.active:
            file = self.workdir / name / f'{step:06d}.png'
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(file)
            self.board.add_image(name, picture, step, dataformats='HWC')


def read_metrics(workdir):
    """A run's metrics.jsonl -> {name: (steps, values)}."""
    found = {}
    for line in _whole_lines((Path(workdir) / 'metrics.jsonl').read_text()):
        values = json.loads(line)
        step = values.pop('step')
        for name, value in values.items():
            found.setdefault(name, []).append((step, value))
    return {name: tuple(zip(*rows, strict=True)) for name, rows in found.items()}


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


class Meter:
    """Reports of a run's progress: losses, speed, memory.

    rate: step -> learning rate; samples: of one step; flops: of one step, over all devices.
    """

    def __init__(self, writer, rate, samples, flops):
        self.writer, self.rate, self.samples = writer, rate, samples
        devices = jax.devices()
        self.tflop, self.peak = flops / 1e12, chip(devices[0]).flops / 1e12 * len(devices)

    def report(self, step, metrics, seconds, waited):
        """Means of the steps since the last report; seconds of one, and its part spent waiting for data."""
        speed = self.tflop / seconds
        values = metrics | {
            'lr': float(self.rate(max(0, step - 1 - metrics['skipped']))),  # of this step
            'images_per_second': self.samples / seconds,
            'step_seconds': seconds,
            'data_wait_seconds': waited,
            'compute_seconds': seconds - waited,
            'tflops': speed,
            'memory_bytes': memory(),
        }
        if not math.isnan(self.peak):
            values['share_of_peak'] = speed / self.peak
        self.writer.scalars(step, values)


def summary(prog, mesh, config, feed):
    """What will be trained, from what, on what -> text of a few lines."""
    trained = jax.tree.leaves(prog.state.params)
    kinds = {
        'frozen': prog.frozen,
        'trained': prog.state.params,
        'average': prog.state.ema,
        'optimizer': prog.state.opt,
    }
    lines = [
        f'{config.objective} of {config.model}: training {count(prog.state.params):,} parameters '
        f'in {len(trained)} arrays ({config.trains}), over {count(prog.frozen):,} frozen ones',
        f'data {feed.describe()}; {config.train.steps} steps of {config.train.batch}; captions of '
        f'{feed.tokenizers[0].length} tokens',
        f'mesh {" x ".join(f"{k} {n}" for k, n in mesh.shape.items())}: {mesh.size} '
        f'{mesh.devices.flat[0].device_kind}, {jax.process_count()} processes',
    ]
    for kind, tree in kinds.items():
        leaves = named(tree)
        if leaves:
            path, x = max(leaves, key=lambda item: item[1].size)
            total = size(sum(x.size * x.dtype.itemsize for _, x in leaves))
            spec = ', '.join(map(str, x.sharding.spec))
            lines.append(
                f'{kind:9} {total:>8}, the largest {path} {x.shape} {x.dtype} over ({spec})'
            )
    return '\n'.join(lines)
