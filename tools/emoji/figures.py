"""The figures of the emoji model card, as Markdown.

    python tools/emoji/figures.py

Held-out reconstruction, then real pictures, the teacher and the shipped LCM-LoRA on captions that
they were trained on and on held-out ones, as many of each as there are held-out pictures.
"""

import jax
import numpy as np

from lcm_jax.data.emoji import emoji, to_float
from lcm_jax.demo import GUIDANCE
from lcm_jax.encode import batched
from lcm_jax.evaluate import Cell, markdown, table
from lcm_jax.features import open_features
from lcm_jax.models.vae import VAE
from lcm_jax.pipeline import Pipeline


def reconstruction(pipe, pictures):
    """Mean PSNR over pictures [N,H,W,3] uint8 of decode(encode's mean), dB."""
    vae = jax.jit(
        lambda x: VAE(pipe.specs['vae']).apply({'params': pipe.params['vae']}, x).clip(-1, 1)
    )
    x = to_float(pictures)
    return float(np.mean(10 * np.log10(4 / np.mean((batched(vae, x) - x) ** 2, (1, 2, 3)))))


def main():
    teacher, fast = Pipeline.load('emoji'), Pipeline.load('emoji')
    fast.add_lora('lcm')
    cells = [
        Cell('teacher, DDIM 50', teacher, 'ddim', 50, GUIDANCE),
        Cell('LCM-LoRA, 4 steps', fast, 'lcm', 4, 1.0),
    ]
    everything = emoji('heldout')
    psnr = reconstruction(teacher, np.stack([s.picture for s in everything]))
    print(f'VAE, {len(everything)} held-out pictures of three styles: {psnr:.2f} dB\n')
    train, heldout = (emoji(split, ('noto', 'twemoji')) for split in ('train', 'heldout'))
    pick = np.random.default_rng(0).permutation(len(train))[: 2 * len(heldout)]
    mine, other = ([train[i] for i in part] for part in np.split(pick, 2))
    features = open_features('emoji')
    for name, samples in (('training', mine), ('held-out', heldout)):
        print(f'{len(samples)} {name} captions:\n')
        print(markdown(table(cells, features, samples, other)) + '\n')


if __name__ == '__main__':
    main()
