"""A source, encoded by a model -> a cache."""

import numpy as np

from lcm_jax.data.cache import Writer
from lcm_jax.data.loader import One, cut_reason, iterate, own
from lcm_jax.data.samples import Drops
from lcm_jax.errors import InputError

FIXED = (  # settings that act once, when a cache is made
    *('crop', 'flip', 'buckets', 'caption'),
    *('min_size', 'max_watermark', 'min_aesthetic', 'max_unsafe'),
)


def write_cache(
    folder,
    source,
    tokenizers,
    settings,
    encode,
    *,
    model,
    batch,
    weights=None,
    process=0,
    processes=1,
    log=None,
):
    """Encode the samples i of a source with i % processes == process.

    -> samples written, Drops of the broken, and of those whose caption was cut.

    encode({'pixels', 'ids', 'sizes'}, [batch, ...] each as `loader` gives them) -> {'mean', 'logvar',
    'context', ...}, arrays of as many rows; it is always given full batches of one shape. model: the
    name that a run which reads the cache must have; weights: {component: what those of its encoders are
    known by}, which it must have too. Crops, flips and captions are those of step 0 and
    row i. log(samples done) is called after each batch. Raises InputError if the cache is there, for a
    sample whose encoding is not finite, and as soon as more than settings.max_dropped of the samples
    are broken.
    """
    if source.encoded:
        raise InputError(f'{source.name} is a cache already')
    numbers = range(process, len(source), processes)
    maker = One(source, tuple(tokenizers), settings)
    head = {'model': model, 'resolution': settings.resolution, 'shapes': maker.shapes}
    head |= {'fixed': {key: getattr(settings, key) for key in FIXED}}
    head |= {'source': source.name, 'number': len(source), 'weights': weights}
    writer = Writer(folder, head, process, processes)
    waiting, broken, cut, done = [[] for _ in maker.shapes], Drops(), Drops(), 0

    def flush(bucket):
        nonlocal done
        items, waiting[bucket] = waiting[bucket], []
        full = items + items[:1] * (batch - len(items))
        arrays = {key: np.stack([item[3][key] for item in full]) for key in full[0][3]}
        out = {key: np.asarray(x) for key, x in encode(arrays).items()} | {'sizes': arrays['sizes']}
        for j, (i, name, size, _) in enumerate(items):
            one = {key: x[j] for key, x in out.items()}
            check_finite(f'{source.name}: {name}', one)
            writer.add(name, i, bucket, size, one)
        done += len(items)
        if log:
            log(done)

    for i, bucket, name, arrays, was_cut, fault in iterate(maker.item, numbers, settings):
        if fault:
            broken.add(fault[0], name, fault[1])
            broken.check(source.name, len(numbers) - len(broken), settings.max_dropped)
            continue
        if was_cut:
            cut.add(cut_reason(tokenizers), name)
        waiting[bucket].append((i, name, source.size(i), own(arrays, settings)))
        if len(waiting[bucket]) == batch:
            flush(bucket)
    for bucket, items in enumerate(waiting):
        if items:
            flush(bucket)
    writer.close(broken.counts, cut.counts)
    return done, broken, cut


def check_finite(name, arrays):
    """InputError for a sample whose encoding holds inf or nan."""
    for key, x in arrays.items():
        if not np.isfinite(x).all():
            raise InputError(
                f'{name}: its {key} is not finite; encode it with dtype and '
                'vae_dtype float32, or leave the picture out'
            )
