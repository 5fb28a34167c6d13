"""Times our programs beside diffusers' with the same random weights, in turns, in one process.

    python tools/benchmark.py unet --peer diffusers    # SD 1.5's UNet, 512 px, batch 1, float32
    python tools/benchmark.py vae --peer diffusers     # decoding
    python tools/benchmark.py text --peer diffusers
    python tools/benchmark.py generate --peer diffusers --size 256    # prompt to picture, four steps
    python tools/benchmark.py step --peer diffusers --size 256    # LCM-LoRA training; its memory too
    JAX_PLATFORMS=cpu python tools/benchmark.py compiled --model sdxl --size 1024 --dtype bfloat16

Prints seconds (median and least), their ratio, the largest difference of the outputs relative to the
largest output, and what the compiler says of our program; `compiled` only compiles it, for TPUs that
need not be here. CPU seconds count both sides' threads:
they hold on a busy machine, where wall-clock seconds do not. SD 1.5 in float32 needs 11 GB of memory.
"""

import argparse
import gc
import resource
import statistics
import tempfile
import time
from typing import NamedTuple

import benchmark_step
import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax import chips, hlo, plan, sharding, weights, workloads
from lcm_jax.models import configs, shapes
from lcm_jax.models.clip import TextEncoder
from lcm_jax.models.tiny import autoencoder
from lcm_jax.models.unet import UNet
from lcm_jax.models.zoo import MODELS
from lcm_jax.pipeline import Pipeline
from lcm_jax.text import Tokenizer


class Case(NamedTuple):
    """A thing to time: two calls that wait for their result and return it as one NHWC array."""

    ours: callable
    compiled: jax.stages.Compiled  # or None, where ours is more than one program
    peer: callable  # or None


def compiled_call(fn, *args):
    """Compile fn for args -> (call, compiled), with the seconds it took printed."""
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    print(f'compiled, or found in the cache, in {time.perf_counter() - start:.1f} s')
    return lambda: jax.block_until_ready(compiled(*args)), compiled


def random_weights(abstract, rng):
    """Without a peer: kernels of variance 1 / fan-in, all else 0."""

    def draw(x):
        if x.ndim == 1:
            return jnp.zeros(x.shape, x.dtype)
        scale = np.prod(x.shape[:-1]) ** -0.5
        return jnp.asarray(rng.standard_normal(x.shape, np.float32) * scale, x.dtype)

    return jax.tree.map(draw, abstract)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def unet(args):
    """One forward pass of the UNet."""
    model = MODELS[args.model]
    spec, side = model.unet, args.size // model.vae.factor
    inputs = {
        'z': normal(args.batch, side, side, spec.in_channels),
        't': np.linspace(999, 1, args.batch, dtype=np.float32),
        'context': normal(args.batch, workloads.TOKENS, spec.context_dim, seed=1),
    }
    if spec.pooled_dim:
        inputs['pooled'] = normal(args.batch, spec.pooled_dim, seed=2)
        inputs['sizes'] = np.tile(
            np.float32([args.size, args.size, 0, 0] + [args.size] * 2), (args.batch, 1)
        )
    keep = ('t', 'sizes')  # precision follows the data; numbers with a unit stay in float32
    typed = {k: jnp.asarray(x, jnp.float32 if k in keep else args.dtype) for k, x in inputs.items()}
    return case(
        args,
        shapes.unet_shapes(spec, args.dtype),
        lambda params, x: UNet(spec).apply({'params': params}, **x),
        typed,
        lambda diffusers: (diffusers.UNet2DConditionModel, configs.unet_config(spec, side)),
        lambda net: unet_peer(net, inputs),
    )


def vae(args):
    """Latents -> pictures."""
    spec = MODELS[args.model].vae
    side = args.size // spec.factor
    z = normal(args.batch, side, side, spec.latent_channels)
    return case(
        args,
        shapes.vae_shapes(spec, args.dtype),
        lambda params, z: autoencoder(spec).apply({'params': params}, z, method='decode'),
        jnp.asarray(z, args.dtype),
        lambda diffusers: (diffusers.AutoencoderKL, configs.vae_config(spec, args.size)),
        lambda net: pictures(lambda z: net.decode(z).sample, net, z),
    )


def text(args):
    """Token ids -> hidden states, by the (first) text encoder."""
    spec = MODELS[args.model].text[0]
    ids = np.random.default_rng(0).integers(0, spec.vocab, (args.batch, workloads.TOKENS), np.int32)
    return case(
        args,
        shapes.text_shapes(spec, args.dtype),
        lambda params, ids: TextEncoder(spec).apply({'params': params}, ids).hidden,
        ids,
        lambda _: (clip_text, configs.text_config(spec)),
        lambda net: lambda: net(torch_tensor(ids, net)).last_hidden_state.float().cpu().numpy(),
    )


def generate(args):
    """A prompt -> a picture in four steps: text encoder, UNet, VAE; the same noise for both sides."""
    import diffusers
    import torch

    if args.peer != 'diffusers' or args.model not in ('sd15', 'sd21'):
        raise SystemExit('generate takes --peer diffusers and --model sd15 or sd21')
    model = MODELS[args.model]
    side = args.size // model.vae.factor
    latents = normal(args.batch, side, side, model.vae.latent_channels)
    prompts = ['a photo of a cat'] * args.batch
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            'unet': (diffusers.UNet2DConditionModel, configs.unet_config(model.unet, side)),
            'vae': (diffusers.AutoencoderKL, configs.vae_config(model.vae, args.size)),
            'text_encoder': (clip_text, configs.text_config(model.text[0])),
        }
        peer = diffusers.StableDiffusionPipeline(
            **{name: torch_model(*part, args.dtype)[0] for name, part in parts.items()},
            tokenizer=Tokenizer.clip().tokenizer,
            scheduler=diffusers.DDIMScheduler(
                beta_schedule='scaled_linear',
                beta_start=0.00085,
                beta_end=0.012,
                prediction_type=model.prediction_type,
                steps_offset=1,
                set_alpha_to_one=False,
                clip_sample=False,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        peer.save_pretrained(folder)
        ours = Pipeline.load(folder, args.dtype)
    peer.set_progress_bar_config(disable=True)
    steps = {'num_inference_steps': 4, 'guidance_scale': 1.0, 'output_type': 'np'}
    size = (args.size, args.size)
    start = torch.tensor(latents).movedim(-1, 1).to(peer.device, peer.unet.dtype)

    def draw():
        pictures = ours(prompts, steps=4, sampler='ddim', guidance=1.0, latents=latents, size=size)
        return np.stack([np.asarray(p) for p in pictures]) / 255

    def draw_peer():
        return peer(prompts, latents=start, height=args.size, width=args.size, **steps).images

    return Case(draw, None, draw_peer)


def case(args, abstract, apply, inputs, peer_class, peer_call):
    """A network as a Case: apply(params, inputs) is ours.

    peer_class(diffusers) -> (class, config) and peer_call(net) -> call are asked only for a peer.
    """
    if args.peer == 'none':
        params = random_weights(abstract, np.random.default_rng(0))
        return Case(*compiled_call(apply, params, inputs), None)
    import diffusers

    net, tensors = torch_model(*peer_class(diffusers), args.dtype)
    params = jax.device_put(weights.load(abstract, tensors, 'the random model'))
    del tensors
    return Case(*compiled_call(apply, params, inputs), peer_call(net))


def clip_text(**config):
    import transformers

    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))


def torch_tensor(x, net):
    import torch

    return torch.tensor(x, device=net.device)


def pictures(fn, net, x):
    """The call of fn, NCHW -> NCHW, on our NHWC input."""
    x = torch_tensor(x, net).to(net.dtype).movedim(-1, 1).contiguous()
    return lambda: fn(x).float().movedim(1, -1).cpu().numpy()


def torch_model(cls, config, dtype):
    """A random model of diffusers' class -> (it, {key: float32 array}), views of it in float32."""
    import torch

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    net = cls(**config).to(getattr(torch, dtype)).eval()
    tensors = {k: x.float().numpy() for k, x in net.state_dict().items()}
    return net.to('cuda' if jax.default_backend() == 'gpu' else 'cpu'), tensors


def unet_peer(net, inputs):
    """The call of a diffusers UNet on our inputs."""
    tensors = {k: torch_tensor(x, net) for k, x in inputs.items()}
    added = 'pooled' in tensors and {
        'text_embeds': tensors['pooled'].to(net.dtype),
        'time_ids': tensors['sizes'],
    }
    context = tensors['context'].to(net.dtype)

    def forward(z):
        return net(z, tensors['t'], context, added_cond_kwargs=added or None).sample

    return pictures(forward, net, inputs['z'])


def in_turns(calls, repeat):
    """{name: call} -> {name: ([wall seconds], [CPU seconds])}, after one call of each to warm up."""
    seconds = {name: ([], []) for name in calls}
    for i in range(repeat + 1):
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if i:
                seconds[name][0].append(time.perf_counter() - wall)
                seconds[name][1].append(time.process_time() - cpu)
    return seconds


def report(case, repeat):
    """Time the case and print the table."""
    gc.collect()
    ours = np.asarray(case.ours(), np.float32)
    if case.peer:
        theirs = case.peer()
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        print(f'largest difference {error:.1e} of the largest output')
    calls = {'lcm_jax': case.ours} | ({'diffusers': case.peer} if case.peer else {})
    seconds = in_turns(calls, repeat)
    print(f'{"":10}  {"median s":>8}  {"least s":>8}  {"CPU s":>8}')
    rows = {
        name: (statistics.median(w), min(w), statistics.median(c))
        for name, (w, c) in seconds.items()
    }
    for name, row in rows.items():
        print(f'{name:10}  ' + '  '.join(f'{x:8.3f}' for x in row))
    if case.peer:
        ratio = [a / b for a, b in zip(rows['lcm_jax'], rows['diffusers'], strict=True)]
        print(f'{"ratio":10}  ' + '  '.join(f'{x:8.2f}' for x in ratio))
    if not case.compiled:
        return
    cost, memory = case.compiled.cost_analysis(), case.compiled.memory_analysis()
    print(
        f'our program: {cost["flops"] / 1e9:.0f} GFLOP and {cost["bytes accessed"] / 1e9:.1f} GB moved '
        f"(the compiler counts a loop's body once), {memory.temp_size_in_bytes / 2**20:.0f} MiB of "
        f'temporaries; peak memory of this process '
        f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB'
    )


def compiled(args):
    """Compile one forward pass for TPUs and print what a chip would do."""
    forward = workloads.FORWARDS[args.part](MODELS[args.model], args.size, args.batch, args.dtype)
    mesh = sharding.make_mesh(devices=chips.devices_of(args.topology))
    cost = plan.compiled(workloads.on_mesh(forward, mesh))
    squares = ', '.join(f'{hlo.squares(cost.hlo, n)} of {n} x {n}' for n in sorted(forward.tokens))
    print(
        f'{args.part} on {args.topology}: compiled in {cost.seconds:.0f} s; each chip '
        f'{cost.flops / 1e12:.2f} TFLOP outside custom kernels, {cost.bytes_accessed / 1e9:.1f} GB '
        f'moved, {cost.temporaries / 2**20:.0f} MiB of temporaries, '
        f'{cost.arguments / 2**20:.0f} MiB of arguments; arrays of [tokens x tokens]: {squares}'
    )


CASES = {'unet': unet, 'vae': vae, 'text': text, 'generate': generate}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('case', choices=(*CASES, 'step', 'compiled'))
    parser.add_argument('--model', default='sd15', choices=MODELS)
    parser.add_argument('--size', type=int, default=512, help='side of the picture, px')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16', 'float16'))
    parser.add_argument('--peer', default='none', choices=('diffusers', 'none'))
    parser.add_argument('--repeat', type=int, default=5, help='timed calls of each side, in turns')
    parser.add_argument('--part', default='unet', choices=workloads.FORWARDS, help='to be compiled')
    parser.add_argument('--topology', default='v5e:2x2', help='chips to compile for')
    train = parser.add_argument_group('step')
    train.add_argument('--rank', type=int, default=64, help='of the adapter')
    train.add_argument('--remat', default='none', help='what our backward pass computes again')
    train.add_argument('--checkpointing', action='store_true', help="the peer's way to do so")
    train.add_argument('--dump', help='file for the text of our compiled step')
    args = parser.parse_args()
    if args.case == 'step':
        return benchmark_step.step(args)
    if args.case == 'compiled':
        return compiled(args)
    device = jax.devices()[0]
    print(
        f'{args.case}, {args.model}, {args.size} px, batch {args.batch}, {args.dtype}, '
        f'on {device.device_kind} ({device.platform})'
    )
    report(CASES[args.case](args), args.repeat)


if __name__ == '__main__':
    main()
