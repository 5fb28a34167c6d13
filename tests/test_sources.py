"""Every layout that sources read."""

import io
import json

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from sets import array_record, encoded, example, file_of, noise, sample, shard, tar_of

from lcm_jax.data import files, samples
from lcm_jax.data.emoji import emoji
from lcm_jax.data.settings import DataSettings
from lcm_jax.data.sources import open_source
from lcm_jax.errors import InputError
from lcm_jax.images import signed

OFF = DataSettings(max_dropped=1.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))


def contents(source):
    """[(name, captions, colour of the first pixel)]."""
    out = []
    for i in range(len(source)):
        raw = source.read(i)
        pixel = samples.decode(raw.picture).getpixel((0, 0))
        out.append((source.sample_name(i), raw.captions, pixel))
    return out


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
    tar_of(tmp_path / '00000.parquet', [])
    source = open_source(f'wds:{tar}', OFF)
    got = contents(source)
    assert [name for name, _, _ in got] == [f'00000.tar/00000000{i}' for i in (1, 2, 3)]
    assert got[0][1] == ('caf\u00e9, noto',)
    assert (source.sizes == (4, 6)).all() and not source.broken and not source.filtered
    for (_, _, pixel), color in zip(got, ((254, 0, 0), (0, 0, 254), (0, 255, 0)), strict=True):
        assert np.abs(np.subtract(pixel, color)).max() <= 3


def test_keys_that_repeat_within_and_across_shards(tmp_path):
    """LAION's tars repeat a key where shards were joined; folders may repeat names too."""
    for name in ('00000.tar', '00001.tar'):
        tar_of(
            tmp_path / name,
            [
                *sample('7', 'red'),
                *sample('7', 'blue', caption='second'),
                *sample('a/7'),
                *sample('b/7'),
            ],
        )
    source = open_source(f'wds:{tmp_path}/{{00000..00001}}.tar', OFF)
    got = contents(source)
    assert [(name, captions[0]) for name, captions, _ in got] == [
        (f'{shard}.tar/{key}', caption)
        for shard in ('00000', '00001')
        for key, caption in (
            ('7', 'a caption'),
            ('7', 'second'),
            ('a/7', 'a caption'),
            ('b/7', 'a caption'),
        )
    ]
    assert got[1][2] == (0, 0, 255) and source.index.repeats == 2


def test_captions_from_json_and_sizes_of_the_original(tmp_path):
    said = {
        'alt': 'from JSON',
        'height': 4,
        'width': 6,
        'original_height': 40,
        'original_width': 60,
    }
    tar = tar_of(tmp_path / 'x.tar', [*sample('1', **said), *sample('2', alt='no sizes')])
    source = open_source(f'wds:{tar}', DataSettings(caption='alt'))
    assert [captions for _, captions, _ in contents(source)] == [('from JSON',), ('no sizes',)]
    assert source.original(0) == (40, 60) and source.original(1) == source.size(1) == (4, 6)


@pytest.mark.parametrize('said', [{}, {'exif': '{"Image Orientation": "Rotated 90 CW"}'}])
def test_sizes_of_img2dataset_are_as_stored(tmp_path, said):
    """With --skip_reencode its pictures keep their EXIF, and lie otherwise than they are shown."""
    exif = Image.Exif()
    exif[samples.ORIENTATION] = 6
    picture = file_of(noise(0, 4, 6), 'JPEG', exif=exif)
    sizes = {'height': 4, 'width': 6, 'original_height': 40, 'original_width': 60}
    tar = tar_of(tmp_path / 'x.tar', [('1.jpg', picture), *sample('1', **sizes, **said)[1:]])
    source = open_source(f'wds:{tar}', OFF)
    assert (source.size(0), source.original(0)) == ((6, 4), (60, 40))


def test_sizes_are_believed_where_img2dataset_saw_no_orientation(tmp_path):
    tar = tar_of(tmp_path / 'x.tar', sample('1', height=5, width=7, exif='{}'))
    assert open_source(f'wds:{tar}', OFF).size(0) == (5, 7)


def test_tars_elsewhere_and_compressed(tmp_path):
    plain = shard(tmp_path / 'a.tar', 3)
    content = (tmp_path / 'a.tar').read_bytes()
    with fsspec.open('memory://bucket/a-0.tar', 'wb') as out:
        out.write(content)
    here = contents(open_source(f'wds:{plain}', OFF))
    there = contents(open_source('wds:memory://bucket/a-*.tar', OFF))
    assert [x[1:] for x in here] == [x[1:] for x in there] and len(there) == 3
    members = [*sample('1', 'red'), *sample('2', 'blue')]
    packed = tar_of(tmp_path / 'b.tar.gz', members, 'w:gz')
    assert [x[2] for x in contents(open_source(f'wds:{packed}', OFF))] == [(255, 0, 0), (0, 0, 255)]


def test_an_index_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'KEEP_AFTER', 0)
    tar = shard(tmp_path / 'a.tar', 3)
    first = open_source(f'wds:{tar}', OFF)
    kept = [*files.cache_folder().glob('*.npz')]
    assert len(kept) == 1 and first.index.stamp
    monkeypatch.setattr('lcm_jax.data.tars.grouped', lambda file: pytest.fail('indexed again'))
    again = open_source(f'wds:{tar}', OFF)
    assert contents(again) == contents(first) and (again.index.places == first.index.places).all()
    assert again.index.stamp == first.index.stamp
    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    shard(tmp_path / 'a.tar', 5)
    assert len(open_source(f'wds:{tar}', OFF)) == 5
    kept[0].write_bytes(b'not whole')
    assert len(open_source(f'wds:{tar}', OFF)) == 5


def test_braces():
    assert files.braces('{08..10}-{a,b}.tar') == [
        f'{n}-{c}.tar' for n in ('08', '09', '10') for c in 'ab'
    ]
    assert files.braces('gs://b/x.tar') == ['gs://b/x.tar']


def test_a_folder_with_captions_beside(tmp_path):
    (tmp_path / 'deep').mkdir()
    for name, color in (('b.png', 'red'), ('deep/a.webp', 'blue')):
        (tmp_path / name).write_bytes(encoded(color, kind=name.split('.')[1]))
        (tmp_path / name).with_suffix('.txt').write_text(f'a {color} one')
    got = contents(open_source(f'folder:{tmp_path}', OFF))
    assert [(name, captions) for name, captions, _ in got] == [
        ('b.png', ('a red one',)),
        ('deep/a.webp', ('a blue one',)),
    ]


def test_a_folder_is_read_through_links_and_says_what_it_passes_over(tmp_path):
    inside, linked = tmp_path / 'in', tmp_path / 'out'
    for folder, names in ((inside, ('a.png', 'b.gif')), (linked, ('c.bmp', 'd.JFIF'))):
        folder.mkdir()
        for name in names:
            kind = {'jfif': 'JPEG'}.get(name[2:].lower(), name[2:])
            (folder / name).write_bytes(encoded(kind=kind))
            (folder / name).with_suffix('.txt').write_text(name)
    (inside / 'link').symlink_to(linked)
    (linked / 'back').symlink_to(inside)
    for name in ('e.tiff', 'e.txt', 'f.tiff', 'notes.md', 'a.json.bak', '.hidden', 'README'):
        (inside / name).write_bytes(b'x')
    source = open_source(f'folder:{inside}', DataSettings())
    names = ['a.png', 'b.gif', 'link/c.bmp', 'link/d.JFIF']
    got = contents(source)
    assert [name for name, _, _ in got] == names
    assert all(name.endswith(captions[0]) for name, captions, _ in got)
    assert source.passed.counts == {
        '.tiff': 2,
        '.txt without a picture': 1,
        '.md': 1,
        '.bak': 1,
        'without an extension': 1,
    }
    assert 'passed over: \n  2 .tiff (first: e.tiff)\n' in next(source.left_out()) + '\n'
    alone = open_source(f'pictures:{inside}', DataSettings())
    assert len(alone) == 4 and alone.passed.counts['.txt'] == 5
    for name in ('a.png', 'b.gif', 'link'):
        (inside / name).unlink()
    with pytest.raises(
        InputError, match=r'no samples; passed over are all 8: \n +3 \.txt without a'
    ):
        open_source(f'folder:{inside}', DataSettings())


@pytest.mark.parametrize('field', ['a/b', '', '../x'])
def test_any_field_may_hold_the_captions(tmp_path, field):
    """Whether it could be an extension or not."""
    (tmp_path / '0.png').write_bytes(encoded())
    (tmp_path / '0.json').write_text(json.dumps({field: 'a cat'}))
    settings = DataSettings(caption=field)
    assert open_source(f'folder:{tmp_path}', settings).read(0).captions == ('a cat',)
    (tmp_path / '0.json').unlink()
    with pytest.raises(InputError, match=f"1 no caption .first: 0.png: no '{field}' among nothing"):
        open_source(f'folder:{tmp_path}', settings)


def test_a_second_picture_of_a_sample_is_passed_over(tmp_path):
    """It is a mask or a depth map, where there is one: webdataset's own examples say 'jpg;png', too."""
    png = [('1.png', encoded('blue')), ('1.jpg', encoded('red', kind='JPEG')), ('1.txt', b'x')]
    tar = tar_of(tmp_path / 'x.tar', [*png, *sample('2', 'lime')])
    source = open_source(f'wds:{tar}', DataSettings())
    (_, _, first), (_, _, second) = contents(source)
    assert first[0] > 250 and second == (0, 255, 0)
    said = 'passed over: 1 .png of a sample with a .jpg (first: x.tar/1.png)'
    assert [*source.left_out()] == [said]


def test_lines_of_metadata_end_at_newlines_and_are_utf_8(tmp_path):
    """A caption may hold what splitlines() splits at; U+FFFD never stands for what is not UTF-8."""
    captions = 'a\u2028b\x85c'.encode(), 'caf\u00e9'.encode('latin-1'), b'\\ud83d', b'd'
    lines = [b'{"file_name": "%d.png", "text": "%s"}\r\n' % pair for pair in enumerate(captions)]
    (tmp_path / 'metadata.jsonl').write_bytes(b''.join(lines))
    for i in range(4):
        (tmp_path / f'{i}.png').write_bytes(encoded())
    source = open_source(f'folder:{tmp_path}', OFF)
    assert [captions for _, captions, _ in contents(source)] == [('a\u2028b\x85c',), ('d',)]
    assert [x[:2] for x in source.index.broken] == [
        ('1.png', 'caption is not UTF-8'),
        ('2.png', 'caption is not UTF-8'),
    ]


def test_a_folder_with_metadata_as_hugging_face_has_it(tmp_path):
    lines = [
        {'file_name': f'{i}.png', 'text': f'number {i}', 'pwatermark': i / 4} for i in range(4)
    ]
    (tmp_path / 'metadata.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n\n')
    for i in range(3):
        (tmp_path / f'{i}.png').write_bytes(encoded())
    source = open_source(f'folder:{tmp_path}', DataSettings(max_watermark=0.3, max_dropped=0.5))
    assert [x[:2] for x in contents(source)] == [('0.png', ('number 0',)), ('1.png', ('number 1',))]
    assert str(source.broken) == '1 no picture (first: 3.png: metadata.jsonl names it)'
    assert str(source.filtered) == '1 outside max_watermark = 0.3 (first: 2.png: 0.5)'


def test_array_records_of_examples(tmp_path):
    records = [
        example(image=encoded('red'), text=b'one', height=4, width=6, aesthetic=5.5),
        example(image=encoded('blue', kind='JPEG'), text=[b'two', b'deux'], key=b'second'),
    ]
    array_record(tmp_path / 'x-00000.array_record', records)
    array_record(tmp_path / 'x-00001.array_record', records[:1])
    source = open_source(f'array_record:{tmp_path}/x-*.array_record', OFF)
    got = contents(source)
    assert [x[:2] for x in got] == [
        ('x-00000.array_record/00000000', ('one',)),
        ('x-00000.array_record/second', ('two', 'deux')),
        ('x-00001.array_record/00000000', ('one',)),
    ]
    assert (source.sizes == (4, 6)).all()
    some = open_source(f'array_record:{tmp_path}/x-*.array_record', DataSettings(min_aesthetic=5))
    assert len(some) == 2
    assert 'without what min_aesthetic needs' in str(some.filtered)


def test_tfds_reads_back_what_the_emoji_builder_wrote(tmp_path, monkeypatch):
    tfds = pytest.importorskip('tensorflow_datasets')
    from lcm_jax.data import emoji_tfds, records

    few = emoji('heldout', ['noto'])[:5]
    monkeypatch.setattr(emoji_tfds, 'read', lambda archive: few)
    monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
    builder = tfds.builder('lcm_emoji', data_dir=tmp_path, file_format='array_record')
    monkeypatch.setattr(tfds, 'builder', lambda name, **_: builder)
    source = open_source('tfds:lcm_emoji/heldout', OFF)
    assert len(source) == 15  # of three styles, in an order of TFDS's own
    want = {s.key: s for s in few}
    for i in range(15):
        raw, (style, key) = source.read(i), source.sample_name(i).split('/')
        assert style in ('noto', 'twemoji', 'fluent') and raw.captions == (want[key].caption,)
        assert (np.asarray(samples.decode(raw.picture)) == want[key].picture).all()
    with pytest.raises(InputError, match="tfds:lcm_emoji/tset: Unknown split 'tset'"):
        open_source('tfds:lcm_emoji/tset', OFF)
    records.data_source.cache_clear()


def test_captions_in_the_forms_that_sets_have():
    coco = {'captions': {'id': np.array([1, 2]), 'text': np.array([b'a cat ', b'a dog'], object)}}
    assert samples.captions_of('txt', {}, coco) == ('a cat', 'a dog')
    rows = {'captions': [{'id': 1, 'text': b'a cat'}, {'id': 2, 'text': 'a dog'}]}
    assert samples.captions_of('txt', {}, rows) == ('a cat', 'a dog')
    assert samples.captions_of('alt', {}, {'alt': 'x', 'text': 'y'}) == ('x',)
    with pytest.raises(samples.Broken, match='no caption'):
        samples.captions_of('alt', {}, {'text': 'y'})


def test_made_up_pictures():
    source = open_source('synthetic:20', DataSettings(resolution=32))
    again = open_source('synthetic:20', DataSettings(resolution=32))
    assert len(source) == 20 and source.sizes.min() >= 32 and source.sizes.max() <= 48
    raw = source.read(7)
    assert raw.picture.shape == (*source.size(7), 3) and raw.captions[0].startswith('a ')
    assert (again.read(7).picture == raw.picture).all()
    other = open_source('synthetic:20', DataSettings(resolution=32, seed=1))
    assert any(other.read(i).captions != source.read(i).captions for i in range(20))
    with pytest.raises(InputError, match='write synthetic:N'):
        open_source('synthetic:many', OFF)


@pytest.mark.parametrize(
    ('key', 'said', 'limit'),
    [
        ('max_watermark', {'watermark_score': 0.9}, 0.5),
        ('min_aesthetic', {'AESTHETIC_SCORE': 4}, 5),
        ('min_aesthetic', {'aesthetic': None, 'aesthetic_score': 4}, 5),
        ('min_aesthetic', {'aesthetic_score_laion_v2': 4}, 5),
        ('max_unsafe', {'nsfw_score_opennsfw2': 0.9}, 0.5),
    ],
)
def test_filters_know_the_names_of_several_sets(tmp_path, key, said, limit):
    tar = tar_of(tmp_path / 'x.tar', sample('1', **said))
    with pytest.raises(InputError, match=f'the filters drop all 1: 1 outside {key}'):
        open_source(f'wds:{tar}', DataSettings(**{key: limit}))


def test_filters_count_by_reason(tmp_path):
    said = ((0.1, 6.0, 900), (0.9, 6.0, 900), (0.1, 4.0, 900), (0.1, 6.0, 100), (None, 6.0, 900))
    members = []
    for i, (watermark, aesthetic, size) in enumerate(said):
        original = {'original_height': size, 'original_width': 900}
        members += sample(str(i), pwatermark=watermark, aesthetic=aesthetic, **original)
    tar = tar_of(tmp_path / 'x.tar', members)
    settings = DataSettings(max_watermark=0.5, min_aesthetic=5.0, min_size=4, max_dropped=0)
    source = open_source(f'wds:{tar}', settings)
    assert [source.sample_name(i) for i in range(len(source))] == ['x.tar/0', 'x.tar/3']
    assert source.filtered.counts == {
        'without what max_watermark needs': 1,
        'outside max_watermark = 0.5': 1,
        'outside min_aesthetic = 5': 1,
    }
    with pytest.raises(
        InputError, match=r'the filters drop all 5: 5 outside min_size = 300 \(first'
    ):
        open_source(f'wds:{tar}', DataSettings(min_size=300))


def test_pictures_are_upright_and_on_white(tmp_path):
    clear = Image.new('RGBA', (2, 2), (0, 0, 0, 0))
    assert samples.decode(file_of(clear)).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[samples.ORIENTATION] = 6  # stored lying on its side
    picture = noise(0, 4, 6)
    turned = file_of(picture, 'PNG', exif=exif)
    tar = tar_of(tmp_path / 'x.tar', [('1.png', turned), ('1.txt', b'x')])
    source = open_source(f'wds:{tar}', OFF)
    assert source.size(0) == (6, 4)
    assert (np.asarray(samples.decode(source.read(0).picture)) == np.rot90(picture, -1)).all()
    grey = samples.decode(file_of(Image.new('L', (2, 2), 7)))
    assert grey.getpixel((0, 0)) == (7, 7, 7)
    deep = samples.decode(file_of(Image.fromarray(np.full((2, 2), 0x4080, np.uint16))))
    assert deep.getpixel((0, 0)) == (0x40,) * 3


@pytest.mark.parametrize('orientation', ['6', b'\x06', TiffImagePlugin.IFDRational(6, 1), 9])
def test_an_orientation_that_is_none_leaves_a_picture_as_it_lies(orientation):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    kinds = {str: 2, int: 3, TiffImagePlugin.IFDRational: 5, bytes: 7}
    tags.tagtype[samples.ORIENTATION] = kinds[type(orientation)]
    tags[samples.ORIENTATION] = orientation
    exif = b'Exif\0\0II*\0\x08\0\0\0' + tags.tobytes(8)
    picture = file_of(noise(0, 4, 6), 'JPEG', exif=exif)
    assert samples.size_of(io.BytesIO(picture)) == (4, 6)
    assert samples.decode(picture).size == (6, 4)


@pytest.mark.parametrize('error', [TypeError('bad operand type for abs()'), AttributeError('x')])
def test_whatever_pil_raises_is_a_broken_picture(monkeypatch, error):
    def fail(*args, **kw):
        raise error

    monkeypatch.setattr(samples.Image, 'open', fail)
    for read in (samples.decode, lambda picture: samples.size_of(io.BytesIO(picture))):
        with pytest.raises(samples.Broken, match=f'picture cannot be read.*{error.args[0][:8]}'):
            read(encoded())


def test_the_shipped_set():
    heldout, train = emoji('heldout'), emoji('train', ['noto'])
    words = ('noto emoji', 'twemoji', 'fluent 3d emoji')
    counts = [sum(s.caption.endswith(word) for s in heldout) for word in words]
    assert sum(counts) == len(heldout) and min(counts) > 60 and len(train) > 1500
    assert all(s.picture.shape == (64, 64, 3) for s in heldout)
    assert not {s.caption for s in train} & {s.caption for s in heldout}
    source = open_source('emoji-heldout:noto,fluent', OFF)
    assert len(source) == counts[0] + counts[2]
    with pytest.raises(InputError, match=r"unknown style 'notto' \(did you mean 'noto'\?\)"):
        emoji('train', ('notto',))
    with pytest.raises(InputError, match="unknown style 'notto'"):
        open_source('emoji:notto', OFF)


def test_pixel_range():
    for x in (signed(np.uint8([0, 255])), signed(jnp.uint8([0, 255]))):
        assert x.dtype == np.float32 and x.tolist() == [-1.0, 1.0]


def test_hidden_members_and_odd_metadata_cost_no_sample(tmp_path):
    """._0.png is what macOS adds; numbers may be any that JSON allows."""
    odd = {'width': 10**400, 'height': float('inf'), 'pwatermark': 10**400}
    members = [
        ('._0.png', b'resource fork'),
        *sample('0', caption='\ufeffa cat', **odd),
        ('README', b'of the set'),
        ('1.png', encoded()),
        ('._1.json', b'resource fork'),
        ('1.json', b'{"text": null, "caption": "a dog"}'),
    ]
    source = open_source(f'wds:{tar_of(tmp_path / "x.tar", members)}', DataSettings())
    assert [source.read(i).captions for i in range(len(source))] == [('a cat',), ('a dog',)]
    assert source.sizes.tolist() == [[4, 6]] * 2 and not source.broken
