"""How well the emoji VAE reconstructs the held-out pictures.

python tools/emoji/vae_psnr.py
"""

import jax
import numpy as np

from lcm_jax.data.emoji import emoji
from lcm_jax.encode import batched
from lcm_jax.images import signed
from lcm_jax.models.vae import VAE
from lcm_jax.pipeline import Pipeline


def main():
    pipe = Pipeline.load('emoji')
    vae = jax.jit(
        lambda x: VAE(pipe.specs['vae']).apply({'params': pipe.params['vae']}, x).clip(-1, 1)
    )
    x = signed(np.stack([s.picture for s in emoji('heldout')]))
    psnr = np.mean(10 * np.log10(4 / np.mean((batched(vae, x) - x) ** 2, (1, 2, 3))))
    print(f'VAE, {len(x)} held-out pictures of three styles: {psnr:.2f} dB')


if __name__ == '__main__':
    main()
