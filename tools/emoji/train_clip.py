"""Train the emoji CLIP on all three styles: `text_encoder` (frozen condition) and `image_encoder` (metrics).

    python tools/emoji/train_clip.py --workdir runs/clip

Resumes from its workdir. The image tower projects into the text tower's own width, so the pooled text
is the text embedding and the text folder is a plain CLIPTextModel. Prints retrieval among 100 at
each checkpoint: the share of pictures whose own caption scores highest among 100 captions.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_loop
from captions import variant

from lcm_jax import metrics, weights
from lcm_jax.data.emoji import emoji
from lcm_jax.data.order import shuffled
from lcm_jax.images import signed
from lcm_jax.models.clip import ImageEncoder, TextEncoder, TextSpec, VisionSpec
from lcm_jax.models.configs import text_config, vision_config
from lcm_jax.tensors import write_tensors
from lcm_jax.text import Tokenizer

IMAGE = VisionSpec(width=128, layers=4, heads=4, mlp=512, projection=128, size=64, patch=8)


def text_spec(vocab):
    return TextSpec(width=128, layers=3, heads=4, mlp=512, vocab=vocab, length=32, eos=vocab - 1)


def augment(x, key):
    """Shift, scale, contrast, blur and noise of pictures [B,H,W,3] in -1..1, each at random."""
    b, h, w, _ = x.shape
    ks = jax.random.split(key, 6)
    scale = jax.random.uniform(ks[0], (b,), minval=0.85, maxval=1.1)
    shift = jax.random.uniform(ks[1], (b, 2), minval=-4, maxval=4) + (1 - scale[:, None]) * h / 2

    def place(picture, scale, shift):
        return 1 + jax.image.scale_and_translate(
            picture - 1,
            (h, w, 3),
            (0, 1),
            jnp.stack([scale, scale]),
            shift,
            'linear',
            antialias=False,
        )

    x = jax.vmap(place)(x, scale, shift)
    near = (x + jnp.roll(x, 1, 1) + jnp.roll(x, -1, 1) + jnp.roll(x, 1, 2) + jnp.roll(x, -1, 2)) / 5
    x += jax.random.uniform(ks[2], (b, 1, 1, 1)) * (near - x)
    x *= jax.random.uniform(ks[3], (b, 1, 1, 1), minval=0.85)
    return x + 0.15 * jax.random.uniform(ks[4], (b, 1, 1, 1)) * jax.random.normal(ks[5], x.shape)


def init(spec, key, x, ids):
    """The parameters of both towers, for a batch such as (x, ids), and the logarithm of the scale."""
    keys = jax.random.split(key)
    return {
        'text': TextEncoder(spec).init(keys[0], ids)['params'],
        'image': ImageEncoder(IMAGE).init(keys[1], x)['params'],
        'logit_scale': jnp.log(14.0),
    }


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def embed_text(spec, params, ids):
    return unit(TextEncoder(spec).apply({'params': params['text']}, ids).pooled)


def embed_image(params, x):
    return unit(ImageEncoder(IMAGE).apply({'params': params['image']}, x))


def retrieval(images, texts):
    """Embedded pairs [N,D] -> the share of pictures that find their caption among 100."""
    return float(metrics.retrieved(images, texts, range(len(images))).mean())


def loss(params, ema, frozen, batch, key, *, spec):
    """CLIP's symmetric cross-entropy; the temperature is learnt, 100 at most."""
    x, ids = batch
    scale = jnp.exp(jnp.minimum(params['logit_scale'], jnp.log(100.0)))
    logits = scale * embed_image(params, augment(x, key)) @ embed_text(spec, params, ids).T
    rows = jnp.arange(len(x))
    cross = optax.softmax_cross_entropy_with_integer_labels
    return (cross(logits, rows).mean() + cross(logits.T, rows).mean()) / 2


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--out', default='lcm_jax/emoji/pipeline')
    parser.add_argument('--steps', type=int, default=1200)
    parser.add_argument('--batch', type=int, default=192)
    parser.add_argument('--lr', type=float, default=1e-3)
    args = parser.parse_args()
    out = Path(args.out)

    tokenizer = Tokenizer(out / 'tokenizer')
    spec = text_spec(len(tokenizer.tokenizer))
    train, heldout = emoji('train'), emoji('heldout')
    pictures = np.stack([s.picture for s in train])
    indices = shuffled(len(train), args.batch, 0)

    def batch_at(i):
        rng, at = np.random.default_rng((1, i)), indices(i)
        return signed(pictures[at]), tokenizer([variant(train[j].caption, rng) for j in at])

    params = jax.jit(partial(init, spec))(jax.random.key(0), *batch_at(0))
    warmup = min(100, args.steps // 4)
    rate = optax.warmup_cosine_decay_schedule(0, args.lr, warmup, args.steps, args.lr / 50)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.1))
    texts, images = jax.jit(partial(embed_text, spec)), jax.jit(embed_image)

    def report(i, state):
        found = {}
        for name, samples in (('train', train[::16]), ('heldout', heldout)):
            found[f'retrieval_{name}'] = retrieval(
                np.asarray(images(state.ema, signed(np.stack([s.picture for s in samples])))),
                np.asarray(texts(state.ema, tokenizer([s.caption for s in samples]))),
            )
        return found

    options = {'ema_decay': 0.99, 'save_every': 200, 'report': report}
    state = small_loop.train(partial(loss, spec=spec), tx, params, None, batch_at, args, **options)

    for folder, config, tree in (
        ('text_encoder', text_config(spec), state.ema['text']),
        ('image_encoder', vision_config(IMAGE), state.ema['image']),
    ):
        write_tensors(
            out / folder / 'model.safetensors', weights.dump(optax.tree.cast(tree, jnp.float16))
        )
        (out / folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
        print(f'wrote {out / folder}')


if __name__ == '__main__':
    main()
