"""Features and distances against their references, in float32 with random weights; and bad input."""

import json
import shutil

import feature_references as references
import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from PIL import Image

from lcm_jax import resize, weights
from lcm_jax.backbones import FEATURES, HEADS, LPIPS, digest
from lcm_jax.checkpoint import open_part
from lcm_jax.data.emoji import EMOJI
from lcm_jax.errors import InputError
from lcm_jax.features import checked, open_features, open_lpips
from lcm_jax.models import lpips, shapes
from lcm_jax.tensors import open_tensors, read_tensors, write_tensors

NOISE = references.NOISE
RNG = np.random.default_rng()


def pictures(n, height, width):
    """Smooth ones: blots of several sizes."""
    x = RNG.integers(0, 256, (n, 3, 5, 7)).astype(np.float32)
    x = F.interpolate(torch.tensor(x), (height, width), mode='bicubic').clamp(0, 255)
    return x.permute(0, 2, 3, 1).numpy().astype(np.uint8)


def tensors(arrays):
    return {key: torch.tensor(x) for key, x in arrays.items()}


def near(ours, theirs, rel=1e-4):
    """Largest difference as a share of the largest value; both of one shape."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= rel * np.abs(theirs).max()


# --- FID's Inception-v3


@pytest.fixture(scope='module')
def inception(tmp_path_factory):
    """The published file with random weights, as .safetensors; and its weights."""
    wanted = weights.keys(shapes.inception_shapes()) | {
        'fc.weight': (1008, 2048),
        'fc.bias': (1008,),
    }
    w = references.random_weights(wanted)
    norms = {k.replace('running_var', 'num_batches_tracked') for k in w if 'running_var' in k}
    file = tmp_path_factory.mktemp('inception') / 'inception.safetensors'
    write_tensors(file, w | dict.fromkeys(norms, np.int64(0)))
    return file, w


@pytest.mark.parametrize('name', references.RESIZED)
def test_inception(name, inception):
    file, w = inception
    features = open_features(f'{name}:{file}', batch=2)
    ours = features.images(NOISE)
    with torch.no_grad():
        near(ours, references.inception(tensors(w), references.RESIZED[name](NOISE)), 1e-5)
    package = references.PACKAGES[name]
    assert [*ours[0, :3], ours.mean()] == pytest.approx(package, rel=1e-4)
    assert not features.reads_text
    with pytest.raises(InputError, match=r'inception-.* reads no text; emoji and clip:FOLDER do'):
        features.texts(['a cat'])


@pytest.mark.parametrize('size', [(64, 64), (299, 299), (512, 331)])
def test_resizing(size):
    x = pictures(1, *size)
    modes = zip(references.RESIZED.values(), resize.INCEPTION.values(), strict=True)
    for theirs, ours in modes:
        y = ours.device(ours.host(x))
        near(y, theirs(x).permute(0, 2, 3, 1), 2e-5)
    # torch's antialiased bicubic is PIL's, up to how its weights are rounded.
    theirs = F.interpolate(references.nchw(x), (299, 299), mode='bicubic', antialias=True)
    near(resize.bicubic(x, 299), theirs.clip(0, 255).permute(0, 2, 3, 1), 1e-4)


# --- LPIPS


def trunk(kind, seed=0):
    return references.random_weights(weights.keys(shapes.trunk_shapes(lpips.TRUNKS[kind])), seed)


@pytest.mark.parametrize('kind', references.TRUNKS)
def test_lpips(kind, tmp_path):
    w, heads = trunk(kind), read_tensors(HEADS / f'{kind}.safetensors')[0]
    file = tmp_path / 'trunk.safetensors'
    write_tensors(file, w | {'classifier.1.weight': np.float32([[1]]), 'classifier.1.bias': NOISE})
    a, b = NOISE[:1], NOISE[1:]
    both = open_lpips(f'{kind}:{file}', batch=1)
    assert both.distance(a, b) == pytest.approx(references.PACKAGES[kind], rel=1e-5)
    near(both.distance(a, b), references.lpips(kind, tensors(w), tensors(heads), a, b))
    assert both.distance(a, a) == pytest.approx(0, abs=1e-12)

    # Another seed, other heads, and pictures as small as may be: one pixel less has no last layer.
    w = trunk(kind, RNG.integers(2**32))
    heads = {k: np.float32(RNG.uniform(0, 1, x.shape)) for k, x in heads.items()}
    torch.save(tensors(w), tmp_path / 'trunk.pth')
    write_tensors(tmp_path / 'heads.safetensors', heads)
    other = open_lpips(f'{kind}:{tmp_path}/trunk.pth:{tmp_path}/heads.safetensors', batch=2)
    side = lpips.TRUNKS[kind].least
    a, b = pictures(2, side, side + 3), pictures(2, side, side + 3)
    near(other.distance(a, b), references.lpips(kind, tensors(w), tensors(heads), a, b))
    assert both.identity != other.identity
    with pytest.raises(InputError, match=rf'pictures of {side - 1} x 64 px; .* needs {side} px'):
        other.distance(*[pictures(1, side - 1, 64)] * 2)
    with pytest.raises(RuntimeError, match=r'too small|greater than actual'):
        small = pictures(1, side - 1, side - 1)
        references.lpips(kind, tensors(w), tensors(heads), small, small)


def test_emoji_lpips_is_all_layers_of_the_tower():
    from transformers import CLIPVisionModelWithProjection

    folder = EMOJI / 'pipeline' / 'image_encoder'
    tower = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32)
    a, b = pictures(2, 64, 64), pictures(2, 64, 64)

    def layers(x):
        with torch.no_grad():
            hidden = tower(references.nchw(x) / 127.5 - 1, output_hidden_states=True).hidden_states
        return [F.normalize(y[:, 1:], dim=-1) for y in hidden[1:]]

    pairs = zip(layers(a), layers(b), strict=True)
    theirs = sum(((x - y) ** 2).sum(-1).mean(1) for x, y in pairs)
    near(open_lpips('emoji', batch=2).distance(a, b), theirs)


# --- CLIP


@pytest.fixture(scope='module')
def clip_folder(tmp_path_factory):
    """A small CLIPModel with random weights, as transformers writes it; and the model."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / 'pipeline' / 'tokenizer')
    sizes = {'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2}
    text = {
        'num_attention_heads': 4,
        'vocab_size': len(tokenizer),
        'max_position_embeddings': tokenizer.model_max_length,
        'bos_token_id': tokenizer.bos_token_id,
        'eos_token_id': tokenizer.eos_token_id,
        'hidden_act': 'gelu',
    }
    vision = {'num_attention_heads': 2, 'image_size': 24, 'patch_size': 8}
    config = CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=20)
    model = CLIPModel(config).eval()
    randomise(model.text_model, 0), randomise(model.vision_model, 1)
    processor = CLIPImageProcessorPil(
        size={'shortest_edge': 28},
        crop_size={'height': 24, 'width': 24},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.3, 0.2, 0.1],
    )
    folder = tmp_path_factory.mktemp('clip')
    model.save_pretrained(folder)
    CLIPProcessor(processor, tokenizer).save_pretrained(folder)
    return folder, model, CLIPProcessor(processor, tokenizer)


@pytest.mark.parametrize('size', [(40, 61), (51, 20), (28, 28)])
def test_clip(size, clip_folder):
    folder, model, processor = clip_folder
    features, x = open_features(f'clip:{folder}', batch=2), pictures(3, *size)
    captions = ['squid, animal, food, noto emoji', 'a red heart', 'x']
    read = processor(images=[*x], text=captions, return_tensors='pt', padding='max_length')
    with torch.no_grad():
        out = model(**read)
        image = model.get_image_features(read['pixel_values']).pooler_output
        text = model.get_text_features(read['input_ids'], read['attention_mask']).pooler_output
    images, texts = features.images([Image.fromarray(p) for p in x]), features.texts(captions)
    near(images, image)
    near(texts, text)
    cosines = F.cosine_similarity(*map(torch.tensor, (images, texts)))
    near(cosines, (out.logits_per_image / model.logit_scale.detach().exp()).diagonal())


def test_clip_of_older_files(clip_folder, tmp_path):
    """preprocessor_config.json of its own, sizes as numbers, tower configs said twice, sparse."""
    folder = tmp_path / 'clip'
    shutil.copytree(clip_folder[0], folder)
    said = json.loads((folder / 'processor_config.json').read_text())['image_processor']
    (folder / 'processor_config.json').unlink()
    said |= {'size': 28, 'crop_size': 24}
    (folder / 'preprocessor_config.json').write_text(json.dumps(said))
    config = json.loads((folder / 'config.json').read_text())
    config['text_config_dict'] = config['text_config']
    config['text_config'] = {'hidden_size': 7}
    del config['vision_config']['patch_size'], config['vision_config']['hidden_act']
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(InputError, match=r'patch_embedding.weight .* instead of \(32, 3, 32, 32\)'):
        open_features(f'clip:{folder}')  # CLIP's own default
    config['vision_config']['patch_size'] = 8
    (folder / 'config.json').write_text(json.dumps(config))
    old, new = open_features(f'clip:{folder}'), open_features(f'clip:{clip_folder[0]}')
    assert old.identity == new.identity
    x = pictures(1, 30, 30)
    assert (old.images(x) == new.images(x)).all()


def test_emoji():
    from transformers import CLIPTextModel, CLIPVisionModelWithProjection

    features = open_features('emoji', batch=4)
    assert features.reads_text
    x, captions = pictures(5, 64, 64), ['a red heart', 'squid, animal, food, noto emoji']
    parts = EMOJI / 'pipeline'
    tower, words = (
        kind.from_pretrained(parts / part, dtype=torch.float32)
        for kind, part in (
            (CLIPVisionModelWithProjection, 'image_encoder'),
            (CLIPTextModel, 'text_encoder'),
        )
    )
    ids = torch.tensor(features.backbone.tokenizer(captions)).long()
    with torch.no_grad():
        near(features.images(x), tower(references.nchw(x) / 127.5 - 1).image_embeds)
        near(features.texts(captions), words(ids).pooler_output)
    large = jax.image.resize(np.float32(NOISE) / 127.5 - 1, (2, 64, 64, 3), 'bicubic')
    with torch.no_grad():
        theirs = tower(torch.tensor(np.asarray(large)).permute(0, 3, 1, 2)).image_embeds
    near(features.images(NOISE), theirs)


def test_long_captions():
    features, long = open_features('emoji', batch=1), ' '.join(['cat'] * 40)
    with pytest.raises(InputError, match='prompt of 42 tokens'):
        features.texts([long])
    with pytest.warns(UserWarning, match='left out'):
        assert features.texts([long], truncate=True).shape == (1, 128)


# --- what they have in common


def test_batches_do_not_change_rows():
    x = pictures(5, 64, 64)
    near(*(open_features('emoji', batch=n).images(x) for n in (2, 4)), 1e-5)
    ours = [open_lpips('emoji', batch=n).distance(x, x[::-1]) for n in (2, 4)]
    near(*ours, 1e-5)
    assert ours[0][2] == pytest.approx(0, abs=1e-6)  # a picture with itself


def test_identity_is_of_the_weights_not_of_the_file(tmp_path):
    w = trunk('squeeze')
    torch.save({'state_dict': tensors(w)}, tmp_path / 'a.pth')
    write_tensors(tmp_path / 'b.safetensors', w)
    write_tensors(tmp_path / 'c.safetensors', w | {'features.0.bias': w['features.0.bias'] + 1e-6})
    a, b, c = (open_lpips(f'squeeze:{file}').identity for file in sorted(tmp_path.iterdir()))
    assert a == b != c
    assert a.startswith('lpips-squeeze-')
    assert len({open_features('emoji').identity, open_lpips('emoji').identity}) == 2
    tree = {'a': np.zeros(2, np.float32)}
    assert len({digest(tree), digest(tree, 'x'), digest({'b': tree['a']})}) == 3


# --- bad input


@pytest.mark.parametrize(
    'bad, said',
    [
        (np.zeros((2, 8, 8, 3), np.float32), r'float32 \[2, 8, 8, 3\]; give uint8 \[N,H,W,3\]'),
        (np.zeros((8, 8, 3), np.uint8), r'uint8 \[8, 8, 3\]'),
        (np.zeros((2, 3, 8, 8), np.uint8), r'uint8 \[2, 3, 8, 8\]'),
        (np.zeros((0, 8, 8, 3), np.uint8), r'\[0, 8, 8, 3\] are empty'),
        ([], r'\[0\] are empty'),
        (
            [*pictures(2, 8, 8), *pictures(1, 8, 9)],
            r'picture 2 is \[8, 9, 3\], the first \[8, 8, 3\]',
        ),
        ([Image.new('L', (8, 8))], r'uint8 \[1, 8, 8\]'),
    ],
)
def test_bad_pictures(bad, said):
    with pytest.raises(InputError, match=said):
        checked(bad)


def test_bad_rows():
    with pytest.raises(InputError, match='give uint8'):
        open_features('emoji').images(np.zeros((2, 8, 8, 3)))
    with pytest.raises(InputError, match='give uint8'):
        open_lpips('emoji').distance(pictures(2, 8, 8), np.zeros((2, 8, 8, 3)))
    with pytest.raises(InputError, match=r'\[2, 8, 8, 3\] and \[1, 8, 8, 3\]; give as many'):
        open_lpips('emoji').distance(pictures(2, 8, 8), pictures(1, 8, 8))
    with pytest.raises(InputError, match='no captions'):
        open_features('emoji').texts([])


@pytest.mark.parametrize(
    'open_it, name, said',
    [
        (
            open_features,
            'emojis',
            r"unknown features 'emojis' \(did you mean 'emoji'\?\); one of: e",
        ),
        (open_features, 'incepton:x', "did you mean 'inception'"),
        (open_features, 'inception', "features 'inception': write it as inception:FILE"),
        (open_features, 'emoji:x', "features 'emoji:x': write it as emoji"),
        (open_features, 'inception:', 'write it as inception:FILE'),
        (open_features, 'inception:none.pth', 'no such file: none.pth'),
        (open_features, 'clip:nowhere', r'cannot read nowhere/config\.json'),
        (open_lpips, 'vgg16:x.pth', r"unknown lpips 'vgg16:x.pth'|did you mean 'vgg'"),
        (open_lpips, 'alex', r'write it as alex:BACKBONE_FILE\[:HEADS_FILE\]'),
        (open_lpips, 'alex:a:b:c', 'write it as alex'),
        (open_lpips, 'alex:a.safetensors', r'no such file: a\.safetensors'),
    ],
)
def test_bad_names(open_it, name, said):
    with pytest.raises(InputError, match=said):
        open_it(name)


def test_bad_settings():
    with pytest.raises(InputError, match='batch = 0; give 1 or more'):
        open_features('emoji', batch=0)
    mesh = jax.make_mesh((1,), ('rows',), devices=jax.devices()[:1])
    with pytest.raises(InputError, match="needs one named 'data'"):
        open_lpips('emoji', mesh=mesh)


def test_wrong_inception_file(inception, tmp_path):
    file, w = inception
    lazy = open_tensors(file)[0]
    torchvision = lazy | {'fc.weight': w['fc.weight'][:1000], 'AuxLogits.fc.bias': w['fc.bias']}
    write_tensors(tmp_path / 'torchvision.safetensors', torchvision)
    said = r'1 unexpected: AuxLogits.fc.bias.*; 1 misshapen: fc.weight \(1000, 2048\) instead of'
    with pytest.raises(InputError, match=said):
        open_features(f'inception:{tmp_path}/torchvision.safetensors')
    write_tensors(tmp_path / 'part.safetensors', {k: x for k, x in lazy.items() if 'Mixed' in k})
    with pytest.raises(
        InputError, match=r'part.safetensors does not fit .*: 27 missing: Conv2d_1a'
    ):
        open_features(f'inception:{tmp_path}/part.safetensors')


def test_wrong_lpips_files(tmp_path):
    write_tensors(tmp_path / 'alex.safetensors', trunk('alex'))
    with pytest.raises(InputError, match=r'does not fit .*6 unexpected: features\.3'):
        open_lpips(f'vgg:{tmp_path}/alex.safetensors')
    with pytest.raises(InputError, match=r'squeeze\.safetensors does not fit .*lin5'):
        open_lpips(f'alex:{tmp_path}/alex.safetensors:{HEADS}/squeeze.safetensors')


@pytest.mark.parametrize(
    'file, change, said',
    [
        ('config.json', {'text_config': None}, 'text_config holds a NoneType'),
        ('config.json', {'model_type': 'siglip'}, r"config\.json: model_type = 'siglip'"),
        (
            'processor_config.json',
            {'do_resize': False},
            r'do_resize = False is not .*; accepted: T',
        ),
        ('processor_config.json', {'resample': 2}, 'resample = 2 is not supported; accepted: 3'),
        (
            'processor_config.json',
            {'size': {'height': 9, 'width': 9}},
            'a number of px, or the same as s',
        ),
        ('processor_config.json', {'crop_size': {'height': 24, 'width': 9}}, 'crop_size = {'),
        (
            'processor_config.json',
            {'crop_size': 20},
            'crop_size 20; the image tower takes a .* of 24',
        ),
        ('processor_config.json', {'size': 20}, 'size 20, crop_size 24'),
        ('processor_config.json', {'image_mean': 0.5}, 'image_mean = 0.5; accepted: three numbers'),
    ],
)
def test_bad_clip_folders(file, change, said, clip_folder, tmp_path):
    folder = tmp_path / 'clip'
    shutil.copytree(clip_folder[0], folder)
    config = json.loads((folder / file).read_text())
    config.get('image_processor', config).update(change)
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        open_features(f'clip:{folder}')


@pytest.mark.parametrize(
    'file, said',
    [
        ('model.safetensors', 'no such file: .*model.safetensors'),
        ('processor_config.json', 'cannot read .*preprocessor_config.json'),
        ('tokenizer.json', 'is not a CLIP tokenizer folder'),
    ],
)
def test_incomplete_clip_folders(file, said, clip_folder, tmp_path):
    folder = tmp_path / 'clip'
    shutil.copytree(clip_folder[0], folder)
    (folder / file).unlink()
    with pytest.raises(InputError, match=said):
        open_features(f'clip:{folder}')


def test_clip_folder_that_does_not_fit(clip_folder, tmp_path):
    folder = tmp_path / 'clip'
    shutil.copytree(clip_folder[0], folder)
    config = json.loads((folder / 'config.json').read_text())
    config['text_config']['max_position_embeddings'] = 16
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(InputError, match='pads to 32 tokens; the text tower takes at most 16'):
        open_features(f'clip:{folder}')
    config['text_config'] |= {'max_position_embeddings': 32, 'num_attention_heads': 5}
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(InputError, match='no text_encoder has these sizes'):
        open_features(f'clip:{folder}')


def test_a_component_without_weights_is_an_error(tmp_path):
    shutil.copyfile(EMOJI / 'pipeline' / 'vae' / 'config.json', tmp_path / 'config.json')
    with pytest.raises(InputError, match=r'no such file: .*diffusion_pytorch_model\.safetensors'):
        open_part(tmp_path, 'vae').tensors('vae')


def test_every_name_is_written_as_its_usage_says():
    for name, family in (FEATURES | LPIPS).items():
        assert family.usage.partition(':')[0] == name
        assert max(family.files) == family.usage.count(':')
