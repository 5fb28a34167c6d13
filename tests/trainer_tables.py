"""The trainer's larger tables: `python tests/trainer_tables.py equality|kills|pairs OUT` (minutes)."""

import argparse
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / 'tools'))  # as pytest has it, for runs.py

import runs

STEPS = {'train.steps': 20, 'train.save_every': 10}
MESH = {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}
# label -> (settings, devices, processes)
ROWS = {
    '1 device': ({}, 1, 1),
    '8 devices, data 8': ({}, 8, 1),
    '8 devices, data 2 x fsdp 2 x tensor 2': (MESH, 8, 1),
    '2 processes x 4 devices, data 8': ({}, 4, 2),
    '2 processes x 4 devices, 2 x 2 x 2': (MESH, 4, 2),
    'accumulate 2': ({'train.accumulate': 2}, 1, 1),
    'accumulate 8': ({'train.accumulate': 8}, 1, 1),
    'from the cache': ({'data.cache': True}, 1, 1),
    'from the cache, 2 processes x 4 devices': ({'data.cache': True}, 4, 2),
    'recomputed blocks': ({'train.remat': 'blocks'}, 1, 1),
    'two worker processes for data': ({'data.workers': 2}, 1, 1),
}


def once(model, workdir, settings, devices, processes):
    if processes == 1:
        started = [runs.start(model, workdir, settings, devices)]
    else:
        started = runs.start_several(model, workdir, settings, processes, devices)
    return runs.finish(*started, timeout=1200)


def equality(model, out):
    print('largest relative differences from 1 device, 20 steps')
    print(f'{"":40} {"losses":>9} {"file":>9} {"params":>9} {"average":>9} {"moments":>9} seconds')
    reference = None
    for i, (label, (settings, devices, processes)) in enumerate(ROWS.items()):
        workdir, began = out / f'run{i}', time.perf_counter()
        once(model, workdir, STEPS | settings, devices, processes)
        seconds = time.perf_counter() - began
        got = runs.losses(workdir), runs.exported(workdir), runs.state(workdir)
        reference = reference or got
        assert len(got[0]) == 20
        diffs = [runs.difference(a, b) for a, b in zip(reference[:2], got[:2], strict=True)]
        for part in ('params', 'ema', 'opt'):
            pick = [{k: x for k, x in r[2].items() if k.startswith(part)} for r in (reference, got)]
            diffs.append(runs.difference(*pick))
        print(
            f'{label:40} ' + ' '.join(f'{d:9.1e}' for d in diffs) + f' {seconds:7.0f}', flush=True
        )


LONG = {'train.steps': 60, 'train.save_every': 3}


def saves_now(workdir, before):
    return {*runs.checkpoints(workdir)[1]} - {*before}


def has_reported(workdir, before):
    return len(runs.lines(workdir)) != before


def kills(model, out, n=10, processes=1, devices=1):
    """SIGKILL a run n times, every other one while a checkpoint is being written; then let it end.

    Of several processes each is killed in turn, process 0 first; the other one must end by itself.
    """
    rng, whole, parts = random.Random(0), out / f'whole{processes}', out / f'parts{processes}'
    began = time.perf_counter()
    once(model, whole, LONG, devices, processes)
    print(f'uninterrupted: {time.perf_counter() - began:.0f} s', flush=True)
    for i in range(n):
        if processes == 1:
            running = [runs.start(model, parts, LONG, devices)]
        else:
            running = runs.start_several(model, parts, LONG, processes, devices)
        before = len(runs.lines(parts))
        target, had = running[i // 2 % processes], runs.checkpoints(parts)
        if i % 2:
            seen = runs.until(partial(saves_now, parts, had[1]), *running)
            time.sleep(rng.uniform(0, 0.05))
        else:
            seen = runs.until(partial(has_reported, parts, before), *running)
            time.sleep(rng.uniform(0, 4))
        if not seen:
            print('the run had ended before')
            break
        target.send_signal(signal.SIGKILL)
        began = time.perf_counter()
        codes = [p.wait(300) for p in running]
        took = time.perf_counter() - began
        complete, unfinished = runs.checkpoints(parts)
        last = runs.lines(parts)[-1]['step'] if runs.lines(parts) else None
        print(
            f'kill {i + 1} of process {running.index(target)}: last reported step {last}, checkpoints '
            f'{complete}, unfinished {unfinished}; statuses {codes} after {took:.1f} s',
            flush=True,
        )
        if processes > 1:
            other = running[1 - running.index(target)]
            print('    the other said:', other.log.read_text().strip().splitlines()[-1])
            assert other.returncode == 1
    said = once(model, parts, LONG, devices, processes)
    print('last run went on from step', runs.first_step(said[0]))
    assert sorted(runs.losses(parts)) == list(range(1, 61))
    assert runs.losses(parts) == runs.losses(whole)
    runs.same(runs.exported(whole), runs.exported(parts))
    runs.same(runs.exported(whole, 'lora_best'), runs.exported(parts, 'lora_best'))
    runs.same(runs.state(whole), runs.state(parts))
    print('losses, exported files and state: equal to the bit')


TABLES = {
    'equality': equality,
    'kills': kills,
    'pairs': partial(kills, n=4, processes=2, devices=2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('table', choices=TABLES)
    parser.add_argument('out', type=Path, help='folder for the runs; what is in it is deleted')
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    TABLES[args.table](runs.write_tiny(args.out / 'model', **runs.LEVELS), args.out)


if __name__ == '__main__':
    main()
