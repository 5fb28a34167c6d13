"""array_record files and TFDS data sets: random access by number."""

import functools
import io

import numpy as np

from lcm_jax.data.files import patiently, remote
from lcm_jax.data.samples import Broken, Raw, captions_of, describe, index_of, row
from lcm_jax.errors import InputError

PICTURES = (
    'image',
    'picture',
    'jpg',
    'jpeg',
    'png',
    'webp',
    'image/encoded',
)  # first that is there
UNREADABLE = (OSError, RuntimeError, ValueError, IndexError)  # of the array_record library


def index_array_record(url, caption):
    """A file of tf.train.Examples -> its Index; the place is the record's number.

    A record holds the encoded picture under one of PICTURES, its caption and metadata beside it. A
    file that cannot be read is named in `cut`; a remote one is an InputError: the library does not
    say whether the file is damaged or the store fails.
    """
    check_address(url)
    try:
        records = reader(url)
        return index_records(len(records), lambda i: example(records[i]), caption)
    except UNREADABLE as e:
        if remote(url):
            raise InputError(f'cannot read {url}: {describe(e)}') from e
        return index_of([], cut=[(url, describe(e))])


def check_address(url):
    """InputError for one that the array_record library does not know: it would look for a local file."""
    if remote(url) and not url.startswith('gs://'):
        raise InputError(f'{url}: array_record files are read here or at gs://, not elsewhere')


def fetch_array_record(url, place, caption):
    """-> Raw. Raises Broken, and InputError for a remote file that cannot be read."""
    return raw(example(record(url, int(place[0]))), caption)


def record(url, number):
    """-> its bytes. Raises Broken; of a remote file InputError, as in `index_array_record`."""

    def read():
        try:
            return reader(url)[number]
        except UNREADABLE:
            reader.cache_clear()  # one that has failed would go on to fail
            raise

    if remote(url):
        return patiently(url, read)
    try:
        return reader(url)[number]
    except UNREADABLE as e:
        raise Broken('record cannot be read', describe(e)) from e


@functools.lru_cache(256)
def reader(path):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource([path])


@functools.cache
def example_class():
    """tf.train.Example, made here so that TensorFlow is not needed."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    repeated, optional = 3, 1
    file = descriptor_pb2.FileDescriptorProto(name='lcm_jax/example.proto', package='lcm_jax')
    file.syntax = 'proto3'

    def message(name, *fields):
        added = file.message_type.add(name=name)
        for number, (field, kind, label) in enumerate(fields, 1):
            own = {'type_name': f'.lcm_jax.{kind}', 'type': 11} if isinstance(kind, str) else {}
            added.field.add(name=field, number=number, label=label, **(own or {'type': kind}))
        return added

    message('BytesList', ('value', 12, repeated))
    message('FloatList', ('value', 2, repeated))
    message('Int64List', ('value', 3, repeated))
    message(
        'Feature',
        ('bytes_list', 'BytesList', optional),
        ('float_list', 'FloatList', optional),
        ('int64_list', 'Int64List', optional),
    )
    message('Features', ('feature', 'Features.FeatureEntry', repeated))
    entry = file.message_type[-1].nested_type.add(name='FeatureEntry')
    entry.options.map_entry = True
    entry.field.add(name='key', number=1, label=optional, type=9)
    entry.field.add(name='value', number=2, label=optional, type=11, type_name='.lcm_jax.Feature')
    message('Example', ('features', 'Features', optional))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName('lcm_jax.Example'))


def example(record):
    """Bytes of a tf.train.Example -> {name: value, or list of values}. Raises Broken."""
    from google.protobuf.message import DecodeError

    try:
        features = example_class().FromString(record).features.feature
    except DecodeError as e:
        raise Broken('record is no tf.train.Example', describe(e)) from e
    out = {}
    for name, feature in features.items():
        values = [v for kind in ('bytes', 'float', 'int64') for v in lists(feature, kind)]
        out[name] = values[0] if len(values) == 1 else values
    return out


def lists(feature, kind):
    return getattr(feature, f'{kind}_list').value


def open_tfds(name, caption):
    """'NAME/SPLIT' or 'NAME/CONFIG/SPLIT' -> Index, fetch(place). Prepared where TFDS keeps sets.

    Captions may be text or a sequence of texts or of {id, text}. Pictures are left encoded.
    """
    source = data_source(name)
    index = index_records(len(source), functools.partial(tfds_record, name), caption)
    return index, functools.partial(fetch_tfds, name, caption)


def fetch_tfds(name, caption, place):
    """-> Raw. Raises Broken."""
    return raw(tfds_record(name, int(place[0])), caption)


def tfds_record(name, i):
    """-> features of a record. Raises Broken."""
    try:
        return data_source(name)[i]
    except UNREADABLE as e:
        raise Broken('record cannot be read', describe(e)) from e


@functools.cache
def data_source(name):
    """Raises InputError for a set that is not known, or cannot be prepared."""
    name, slash, split = name.rpartition('/')
    if not slash:
        raise InputError(f'tfds:{split}: write tfds:NAME/SPLIT, such as tfds:coco_captions/train')
    try:
        import tensorflow_datasets as tfds
    except ImportError as e:
        raise InputError(f"tfds:{name}: pip install 'lcm-jax[tfds]'") from e
    if name == 'lcm_emoji':
        import lcm_jax.data.emoji_tfds  # noqa: F401 - registers it
    try:
        builder = tfds.builder(name, file_format='array_record')
        builder.download_and_prepare()
        pictures = [k for k in PICTURES if k in builder.info.features]
        skip = {k: tfds.decode.SkipDecoding() for k in pictures}
        return builder.as_data_source(split, decoders=skip)
    except Exception as e:  # it raises errors of many kinds for a wrong name, split or download
        raise InputError(
            f'tfds:{name}/{split}: {describe(e).split(" Available datasets")[0]}'
        ) from e


def index_records(n, read, caption):
    """read(i) -> features, of n records -> Index; the place is the number."""
    rows, broken, seen, repeats = [], [], set(), 0
    for i in range(n):
        key = f'{i:08d}'
        try:
            features = read(i)
            picture = picture_of(features)
            key = name_of(features) or key
            repeats += key in seen
            seen.add(key)
            file = io.BytesIO(picture) if isinstance(picture, bytes) else picture.shape[:2]
            rows.append(row(key, (i,), file, {}, features, caption))
        except Broken as e:
            broken.append((key, e.reason, e.detail))
    return index_of(rows, broken, repeats=repeats)


def name_of(features):
    """The key that a record gives itself, or ''."""
    key = features.get('key', features.get('__key__', b''))
    return key.decode(errors='replace') if isinstance(key, bytes) else str(key)


def picture_of(features):
    """-> the encoded file, or [H,W,C] uint8. Raises Broken."""
    key = next((k for k in PICTURES if k in features), None)
    if key is None:
        raise Broken('no picture', f'it has {", ".join(sorted(features))}')
    found = features[key]
    if isinstance(found, bytes) or (getattr(found, 'ndim', 0) == 3 and found.dtype == np.uint8):
        return found
    what = f'{len(found)} values' if isinstance(found, list) else type(found).__name__
    raise Broken('no picture', f'its {key!r} holds {what}, not one encoded file')


def raw(features, caption):
    """Features of a record -> Raw. Raises Broken."""
    return Raw(picture_of(features), captions_of(caption, {}, features))
