"""Tars of captioned pictures, good and bad; the shipped set; the order of samples."""

import io
import itertools
import tarfile

import numpy as np
import pytest
from PIL import Image

from lcm_jax import data
from lcm_jax.errors import InputError


def encoded(color, kind='PNG'):
    out = io.BytesIO()
    Image.new('RGB', (6, 4), color).save(out, kind)
    return out.getvalue()


def tar_of(file, members, mode='w'):
    """Write [(name, bytes)] into a tar."""
    with tarfile.open(file, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def sample(key, color='red', kind='png', caption='a caption'):
    picture = encoded(color, 'JPEG' if kind in ('jpg', 'jpeg') else kind)
    return [(f'{key}.{kind}', picture), (f'{key}.json', b'{}'), (f'{key}.txt', caption.encode())]


def test_the_layout_of_img2dataset(tmp_path):
    tar = tar_of(
        tmp_path / '00000.tar',
        [
            *sample('000000001', 'red', 'jpg', ' caf\u00e9, noto \n'),
            *sample('000000002', 'blue', 'webp'),
            ('000000003.seg.png', b'not the picture'),
            *sample('000000003', 'lime', 'png'),
        ],
    )
    got = [*data.webdataset(tar)]
    assert [s.key for s in got] == ['000000001', '000000002', '000000003']
    assert got[0].caption == 'caf\u00e9, noto'
    for s, color in zip(got, ([254, 0, 0], [0, 0, 254], [0, 255, 0]), strict=True):
        assert s.picture.shape == (4, 6, 3) and s.picture.dtype == np.uint8
        assert np.abs(s.picture.astype(int) - color).max() <= 3


def test_a_repeated_extension_starts_a_new_sample(tmp_path):
    """LAION's tars repeat a key where shards were joined; folders may repeat names too."""
    tar = tar_of(
        tmp_path / 'joined.tar',
        [
            *sample('7', 'red'),
            *sample('7', 'blue', caption='second'),
            *sample('a/7'),
            *sample('b/7'),
        ],
    )
    got = [*data.webdataset(tar)]
    assert [(s.key, s.caption) for s in got] == [
        ('7', 'a caption'),
        ('7', 'second'),
        ('a/7', 'a caption'),
        ('b/7', 'a caption'),
    ]
    assert got[1].picture[0, 0].tolist() == [0, 0, 255]


def test_samples_before_the_bad_one_are_read(tmp_path):
    tar = tar_of(tmp_path / 'x.tar', [*sample('1'), *sample('2'), ('3.txt', b'alone')])
    assert len([*itertools.islice(data.webdataset(tar), 2)]) == 2


@pytest.mark.parametrize(
    ('members', 'said'),
    [
        ([('1.txt', b'alone')], "sample '1' has txt; it needs txt and one of webp, png, jpg, jpeg"),
        ([('1.png', encoded('red'))], "sample '1' has png; it needs txt"),
        (
            [('1.png', b'no picture'), ('1.txt', b'x')],
            "sample '1' cannot be read: cannot identify image",
        ),
        ([('1.png', encoded('red')[:-30]), ('1.txt', b'x')], "sample '1' cannot be read"),
        (
            [('1.jpg', encoded('red', 'JPEG')[:-9]), ('1.txt', b'x')],
            "sample '1' cannot be read: .*[tT]runcated",
        ),
        ([('1.png', encoded('red')), ('1.txt', b'\xff\xfe')], "sample '1' cannot be read: .*utf-8"),
    ],
)
def test_a_bad_sample_is_named(tmp_path, members, said):
    tar = tar_of(tmp_path / 'bad.tar', [*sample('0'), *members])
    with pytest.raises(InputError, match=f'bad.tar: {said}') as e:
        [*data.webdataset(tar)]
    assert '\n' not in str(e.value)


def test_a_bad_tar_is_named(tmp_path):
    noise = np.random.default_rng(0).bytes(20_000)
    for name, mode in (('cut.tar', 'w'), ('cut.tar.gz', 'w:gz')):
        tar = tar_of(tmp_path / name, [*sample('0'), ('1.png', noise), ('1.txt', b'x')], mode)
        tar.write_bytes(tar.read_bytes()[:-15_000])
        with pytest.raises(InputError, match=f'cannot read .*{name} as a tar'):
            [*data.webdataset(tar)]
    (tmp_path / 'text.tar').write_text('no tar at all')
    for name in ('text.tar', 'nope.tar'):
        with pytest.raises(InputError, match=f'cannot read .*{name} as a tar'):
            [*data.webdataset(tmp_path / name)]


def test_the_shipped_set():
    heldout = data.emoji('heldout')
    train = data.emoji('train', ['noto'])
    counts = {
        style: sum(s.caption.endswith(style_words) for s in heldout)
        for style, style_words in (
            ('noto', 'noto emoji'),
            ('twemoji', 'twemoji'),
            ('fluent', 'fluent 3d emoji'),
        )
    }
    assert sum(counts.values()) == len(heldout) and min(counts.values()) > 60
    assert len(train) > 1500
    assert all(s.picture.shape == (64, 64, 3) for s in heldout)
    seen = {s.caption for s in train}
    assert not seen & {s.caption for s in heldout}
    with pytest.raises(InputError, match=r"unknown style 'notto' \(did you mean 'noto'\?\)"):
        data.emoji('train', ('notto',))


def test_order_of_samples():
    indices = data.shuffled(10, 3, seed=1)
    steps = [indices(i) for i in range(6)]
    for epoch in (steps[:3], steps[3:]):
        assert len({*np.concatenate(epoch)}) == 9  # none twice; the rest of an epoch is left out
    assert [*steps[0]] != [*steps[3]]
    again = data.shuffled(10, 3, seed=1)
    for i in (5, 0, 3):  # a step's samples depend on its number alone, so a run can resume anywhere
        assert (again(i) == steps[i]).all()
    assert not all((data.shuffled(10, 3, seed=2)(i) == steps[i]).all() for i in range(6))
    with pytest.raises(InputError, match='batch of 11 from 10 samples'):
        data.shuffled(10, 11, seed=0)


def test_pixel_range():
    assert data.to_float(np.uint8([0, 255])).tolist() == [-1.0, 1.0]
