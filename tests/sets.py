"""Small data sets on disk, for the tests of lcm_jax.data."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from lcm_jax.data.records import example_class


def encoded(color='red', size=(6, 4), kind='PNG'):
    """A plain picture, size (width, height) -> bytes of a file."""
    return file_of(Image.new('RGB', size, color), kind)


def file_of(picture, kind='PNG', **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(seed, height, width):
    """-> PIL image."""
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    )


def tar_of(file, members, mode='w'):
    """Write [(name, bytes)] into a tar -> its path as text."""
    with tarfile.open(file, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(file)


def sample(key, color='red', kind='png', caption='a caption', size=(6, 4), **meta):
    """Members of one sample as img2dataset writes them."""
    picture = encoded(color, size, 'JPEG' if kind in ('jpg', 'jpeg') else kind)
    text = caption if isinstance(caption, bytes) else caption.encode()
    return [
        (f'{key}.{kind}', picture),
        (f'{key}.json', json.dumps(meta).encode()),
        (f'{key}.txt', text),
    ]


def shard(file, n, seed=0, size=(16, 16)):
    """A tar of n pictures of noise, captioned by their numbers."""
    members = []
    for i in range(n):
        members.append((f'{i:04d}.png', file_of(noise((seed, i), *size))))
        members.append((f'{i:04d}.txt', f'picture {i} of {seed}'.encode()))
    return tar_of(file, members)


def example(**features):
    """-> bytes of a tf.train.Example."""
    record = example_class()()
    for name, value in features.items():
        feature = record.features.feature[name]
        values = value if isinstance(value, list) else [value]
        for one in values:
            kind = {bytes: 'bytes_list', float: 'float_list', int: 'int64_list'}[type(one)]
            getattr(feature, kind).value.append(one)
    return record.SerializeToString()


def array_record(file, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(file), 'group_size:1')
    for record in records:
        writer.write(record)
    writer.close()
    return str(file)
