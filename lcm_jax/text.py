"""Prompts -> token ids, with transformers' tokenizers."""

import functools
import gzip
import tempfile
import warnings
from pathlib import Path

import numpy as np

from lcm_jax.errors import InputError

FILES = (('tokenizer.json',), ('vocab.json', 'merges.txt'))  # transformers 5 writes the first alone
MERGES = Path(__file__).parent / 'clip_tokenizer' / 'merges.txt.gz'
START, END = '<|startoftext|>', '<|endoftext|>'
LENGTH = 77  # positions of every CLIP text encoder


class Tokenizer:
    """A CLIP tokenizer folder; `length` is the number of ids a prompt is padded to."""

    def __init__(self, folder):
        from transformers import CLIPTokenizer  # seconds to import: only where a prompt is read

        folder = Path(folder)
        if not any(all((folder / file).is_file() for file in files) for files in FILES):
            raise InputError(
                f'{folder} is not a CLIP tokenizer folder; it needs '
                f'{" or ".join(" and ".join(files) for files in FILES)}'
            )
        try:
            self._set(CLIPTokenizer.from_pretrained(str(folder)))
        except Exception as e:  # the tokenizers library raises bare Exception for a bad file
            raise InputError(f'cannot read the tokenizer in {folder}: {e}') from e

    def _set(self, tokenizer):
        self.tokenizer, self.length = tokenizer, min(tokenizer.model_max_length, LENGTH)

    @classmethod
    def clip(cls, pad=END):
        """CLIP's own, shipped; SD 1 and SDXL's first text encoder pad with `END`, others with '!'."""
        from transformers import CLIPTokenizer

        vocab, merges = vocabulary()
        new = cls.__new__(cls)
        new._set(CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=LENGTH))
        return new

    @classmethod
    def from_texts(cls, texts):
        """{file name: text} of a tokenizer folder -> Tokenizer."""
        with tempfile.TemporaryDirectory() as folder:
            for name, text in texts.items():
                Path(folder, Path(name).name).write_text(text, encoding='utf-8')
            return cls(folder)

    def is_clip(self, pad):
        """Whether this is `Tokenizer.clip(pad)`."""
        return self.tokenizer.pad_token == pad and self.tokenizer.get_vocab() == vocabulary()[0]

    def texts(self):
        """-> {file name: text} of the folder that transformers loads, in version 4 too."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            self.tokenizer.backend_tokenizer.model.save(folder)
            return {p.name: p.read_text(encoding='utf-8') for p in Path(folder).iterdir()}

    def cut(self, prompts):
        """[B] str -> ids [B,length] int32, cut where they are too long, and lengths [B] before that.

        Raises InputError for what is no text.
        """
        prompts = list(prompts)
        for prompt in prompts:
            if not isinstance(prompt, str) or not is_text(prompt):
                raise InputError(f'a prompt is {prompt!r}; it must be one text, in valid Unicode')
        read = self.tokenizer(prompts, verbose=False).input_ids
        out = np.full((len(read), self.length), self.tokenizer.pad_token_id, np.int32)
        for row, ids in zip(out, read, strict=True):
            kept = ids if len(ids) <= self.length else [*ids[: self.length - 1], ids[-1]]
            row[: len(kept)] = kept
        return out, np.array([len(ids) for ids in read])

    def __call__(self, prompts, truncate=False):
        """[B] str -> ids [B,length] int32.

        A prompt that is too long raises InputError; if `truncate`, it is cut with a warning.
        """
        prompts = list(prompts)
        out, lengths = self.cut(prompts)
        for prompt, n in zip(prompts, lengths, strict=True):
            if n > self.length and truncate:
                left = self.tokenizer(prompt, verbose=False).input_ids[self.length - 1 : -1]
                warnings.warn(
                    f'prompt of {n} tokens cut to {self.length} (start and end included); '
                    f'left out: {self.tokenizer.decode(left)!r}',
                    stacklevel=2,
                )
            elif n > self.length:
                raise InputError(
                    f'prompt of {n} tokens (start and end included); this '
                    f'model takes at most {self.length}: {prompt!r}'
                )
        return out


def is_text(text):
    """Whether a str is valid Unicode, without halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


@functools.cache
def vocabulary():
    """CLIP's byte-pair encoding (OpenAI, MIT licence) -> ({token: id}, [(first, second)])."""
    text = gzip.decompress(MERGES.read_bytes()).decode()
    merges = [tuple(line.split()) for line in text.splitlines()[1:]]  # after '#version: 0.2'
    # Bytes as visible characters: those that print, then the others from 256 on (GPT-2's encoder).
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]
    tokens = [*symbols, *(s + '</w>' for s in symbols), *map(''.join, merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges
