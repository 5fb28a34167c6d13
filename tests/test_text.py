"""The shipped CLIP tokenizer: OpenAI's vocabulary, ids and padding."""

import gzip
import hashlib
import json

import numpy as np
import pytest

from lcm_jax.errors import InputError
from lcm_jax.text import MERGES, Tokenizer, vocabulary

IDS = {  # of openai/clip-vit-large-patch14
    'a photo of a cat': [320, 1125, 539, 320, 2368],
    'A  Photo of a CAT': [320, 1125, 539, 320, 2368],
    '': [],
}


@pytest.fixture(scope='module', params=['<|endoftext|>', '!'])
def clip(request):
    return Tokenizer.clip(request.param)


def test_the_files_are_openais():
    """SHA-256 of vocab.json and merges.txt of openai/clip-vit-large-patch14 start so."""
    vocab, merges = vocabulary()
    text = json.dumps(vocab, ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest().startswith('3f0c4f7d')
    assert hashlib.sha256(gzip.decompress(MERGES.read_bytes())).hexdigest().startswith('9fd691f7')
    assert (len(vocab), len(merges)) == (49408, 48894)
    assert (vocab['!'], vocab['cat</w>'], vocab['<|endoftext|>']) == (0, 2368, 49407)


def test_ids_and_padding(clip):
    pad = {'!': 0, '<|endoftext|>': 49407}[clip.tokenizer.pad_token]
    for row, ids in zip(clip(IDS), IDS.values(), strict=True):
        want = [49406, *ids, 49407]
        assert row.dtype == np.int32
        assert row.tolist() == want + [pad] * (77 - len(want))


def test_saved_and_read_by_us_and_by_transformers(clip, tmp_path):
    from transformers import AutoTokenizer

    pad, prompts = clip.tokenizer.pad_token, ["it's 1234 Ünïcode; 日本", 'a cat']
    texts = clip.texts()
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding='utf-8')
    for again in (Tokenizer(tmp_path), Tokenizer.from_texts(texts)):
        assert again.is_clip(pad) and not again.is_clip('x')
        np.testing.assert_array_equal(again(prompts), clip(prompts))
    theirs = AutoTokenizer.from_pretrained(tmp_path)(prompts, padding='max_length').input_ids
    np.testing.assert_array_equal(theirs, clip(prompts))
    # What the CLIPTokenizer of transformers 4 reads, which knows no tokenizer.json.
    (tmp_path / 'tokenizer.json').unlink()
    assert json.loads((tmp_path / 'vocab.json').read_text()) == vocabulary()[0]
    assert (tmp_path / 'merges.txt').read_bytes() == gzip.decompress(MERGES.read_bytes())
    np.testing.assert_array_equal(Tokenizer(tmp_path)(prompts), clip(prompts))


@pytest.mark.parametrize('prompt', [['red', 'sad'], 'caf\udce9', None])
def test_what_is_no_text_is_refused(clip, prompt):
    with pytest.raises(InputError, match='must be one text, in valid Unicode'):
        clip([prompt])
