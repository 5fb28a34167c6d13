"""Prompts -> token ids, with transformers' tokenizers."""

import warnings
from pathlib import Path

import numpy as np

from lcm_jax.errors import InputError

FILES = (('tokenizer.json',), ('vocab.json', 'merges.txt'))  # transformers 5 writes the first


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
            self.tokenizer = CLIPTokenizer.from_pretrained(str(folder))
        except Exception as e:  # the tokenizers library raises bare Exception for a bad file
            raise InputError(f'cannot read the tokenizer in {folder}: {e}') from e
        self.length = min(self.tokenizer.model_max_length, 77)

    def __call__(self, prompts, truncate=False):
        """[B] str -> ids [B,length] int32.

        A prompt that is too long raises InputError; if `truncate`, it is cut with a warning.
        """
        out = []
        for prompt, ids in zip(
            prompts, self.tokenizer(list(prompts), verbose=False).input_ids, strict=True
        ):
            if len(ids) > self.length and truncate:
                warnings.warn(
                    f'prompt of {len(ids)} tokens cut to {self.length} (start and end included); '
                    f'left out: {self.tokenizer.decode(ids[self.length - 1 : -1])!r}',
                    stacklevel=2,
                )
                ids = [*ids[: self.length - 1], ids[-1]]
            elif len(ids) > self.length:
                raise InputError(
                    f'prompt of {len(ids)} tokens (start and end included); this '
                    f'model takes at most {self.length}: {prompt!r}'
                )
            out.append(ids + [self.tokenizer.pad_token_id] * (self.length - len(ids)))
        return np.asarray(out, np.int32)
