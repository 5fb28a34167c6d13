"""Loads a whole model beside diffusers' `from_pretrained`, from local disk, each in its own process.

    python tools/benchmark_load.py --model sdxl

Prints the seconds from the call until every byte of the weights is in memory and touched, the
seconds of the whole process with its imports, CPU seconds of both, and the peak of resident memory.
diffusers maps its files, so pages of them count as resident. --folder names a model to load;
without it one with random weights is written and removed (SDXL: 7 GB).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from random_model import write_model

from lcm_jax.models.zoo import MODELS

OURS = """
import jax
from lcm_jax.pipeline import Pipeline
def load(folder, dtype):
    pipe = Pipeline.load(folder, dtype, vae_dtype=dtype)
    jax.block_until_ready(pipe.params)
    return pipe
"""
PEER = """
import diffusers, torch
def load(folder, dtype):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    for part in pipe.components.values():
        for x in part.parameters() if isinstance(part, torch.nn.Module) else ():
            x.detach().reshape(-1).view(torch.uint8)[::4096].sum()
    return pipe
"""
MEASURE = """
import re, sys, time
start = time.perf_counter(), time.process_time()
model = load(*sys.argv[1:])
wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 2**20
print(wall, cpu, time.clock_gettime(time.CLOCK_BOOTTIME) - born, time.process_time(), peak)
"""
BORN = 'import time; born = time.clock_gettime(time.CLOCK_BOOTTIME)\n'
COLUMNS = 'load s', 'load CPU s', 'process s', 'process CPU s', 'peak GiB'


def measure(code, folder, dtype):
    """One load in a fresh process -> a number for each of COLUMNS."""
    command = [sys.executable, '-c', BORN + code + MEASURE, str(folder), dtype]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [float(x) for x in done.stdout.split()[-len(COLUMNS) :]]


def report(folder, dtype, repeat):
    """Load in turns, and print the medians and their ratio."""
    runs = {'lcm_jax': [], 'diffusers': []}
    for _ in range(repeat + 1):
        for name, code in (('lcm_jax', OURS), ('diffusers', PEER)):
            runs[name].append(measure(code, folder, dtype))
    rows = {  # the first run of each reads the disk
        name: [statistics.median(x) for x in zip(*found[1:], strict=True)]
        for name, found in runs.items()
    }
    rows['ratio'] = [a / b for a, b in zip(rows['lcm_jax'], rows['diffusers'], strict=True)]
    print(f'{"":10}' + ''.join(f'{column:>15}' for column in COLUMNS))
    for name, row in rows.items():
        print(f'{name:10}' + ''.join(f'{x:15.2f}' for x in row))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', default='sdxl', choices=MODELS)
    parser.add_argument('--dtype', default='float16', choices=('float16', 'float32'))
    parser.add_argument('--folder', type=Path)
    parser.add_argument('--repeat', type=int, default=3, help='after one that warms the disk cache')
    args = parser.parse_args()
    if args.folder:
        return report(args.folder, args.dtype, args.repeat)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), MODELS[args.model], np.dtype(args.dtype), keep=False)
        return report(folder, args.dtype, args.repeat)


if __name__ == '__main__':
    main()
