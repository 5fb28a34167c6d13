"""Pictures that a run draws of itself: fixed prompts and noise, from what it would export."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from lcm_jax import samplers, sharding
from lcm_jax.atomic import whole
from lcm_jax.diffusion import denoiser, guided, side_by_side
from lcm_jax.draw import decode, to_uint8
from lcm_jax.grid import grid
from lcm_jax.logs import say
from lcm_jax.models.layers import for_strips
from lcm_jax.processes import anywhere

CHANGED = 8 / 255  # a pixel differs from the base's if a channel does by more than this


class Preview:
    """Draws with what is trained, beside the teacher and the base, whose pictures it keeps in `file`.

    told: {'cond', 'null'} of the prompts, in numpy; vae: its parameters, on the host while nothing
    is drawn; size: (height, width) px; made_of: {name: value} of all else that those pictures depend on.
    All processes call it alike, and each gets all pictures.
    """

    def __init__(self, model, program, mesh, config, *, told, vae, size, file, made_of):
        self.model, self.config, self.mesh = model, config, mesh
        self.told, self.vae, self.file = told, vae, Path(file)
        self.made_of = config.to_dict() | made_of | {'size': size}
        self.tile = max(96, min(256, size[1]))
        factor, n = model.specs['vae'].factor, len(config.prompts)
        shape = (n, *(side // factor for side in size), model.specs['vae'].latent_channels)
        self.shape, self.program, self.programs = shape, program, {}
        one = for_strips(1, mesh.devices.flat[0].platform)

        def decoded(vae, z):  # one by one: two of SDXL's at a time take 8 GiB of a TPU, one takes 3
            def picture(z):
                return to_uint8(decode(model.specs['vae'], vae, z[None], one))[0]

            return jax.lax.map(picture, z)

        self.decode = jax.jit(decoded, out_shardings=sharding.replicated(mesh))

    def references(self, base, frozen):
        """Draw what all is compared with, unless the file has it, made of the same.

        base: parameters as at step 0.
        """
        c, settings = self.config, json.dumps(self.made_of, sort_keys=True)
        stale = True
        if self.file.is_file():
            with np.load(self.file) as found:
                stale = str(found.get('settings')) != settings
                self.teacher, self.base = found['teacher'], found['base']
            if stale:
                say(
                    f'{self.file} was drawn with another model or other settings: it is drawn again'
                )
        if not anywhere(stale):  # all draw, or none
            return
        self.teacher = self.draw(base, frozen, 'ddim', c.teacher_steps, c.teacher_guidance)
        self.base = self.draw(base, frozen, c.sampler, c.steps, c.guidance)
        if jax.process_index() == 0:
            with whole(self.file) as part:
                np.savez(part, teacher=self.teacher, base=self.base, settings=settings)

    def __call__(self, trained, frozen):
        """-> grid [H,W,3] uint8, metrics: 'distance' to the teacher's pictures (root mean square, of
        the range 0..1) and 'changed', the share of pixels that differ from the base's."""
        c = self.config
        live = self.draw(trained, frozen, c.sampler, c.steps, c.guidance)
        error = (live.astype(np.float32) - self.teacher) / 255
        changed = np.abs(live.astype(np.float32) - self.base).max(-1) / 255 > CHANGED
        columns = [
            f'teacher\nDDIM {c.teacher_steps}',
            f'base\n{c.sampler} {c.steps}',
            f'trained\n{c.sampler} {c.steps}',
        ]
        cells = [
            [Image.fromarray(x) for x in row]
            for row in zip(self.teacher, self.base, live, strict=True)
        ]
        return np.asarray(grid(list(c.prompts), columns, cells, tile=self.tile)), {
            'distance': float(np.sqrt(np.mean(error**2))),
            'changed': float(changed.mean()),
        }

    def draw(self, trained, frozen, sampler, steps, guidance):
        """-> pictures [N,H,W,3] uint8."""
        if (sampler, steps) not in self.programs:
            self.programs[sampler, steps] = self._program(sampler, steps)
        z = self.programs[sampler, steps](trained, frozen, self.told, np.float32(guidance))
        home = sharding.replicated(self.mesh)
        vae = jax.tree.map(lambda x: sharding.put(x, home), self.vae)
        return np.asarray(self.decode(vae, z))

    def _program(self, sampler, steps):
        schedule, seed = self.model.schedule, self.config.seed
        times = schedule.times(sampler, steps)
        abar = np.asarray(schedule.abar)

        def run(trained, frozen, told, guidance):
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(
                jnp.arange(self.shape[0])
            )
            noise = samplers.fresh(keys)
            w = jnp.full(2 * self.shape[0], self.config.teacher_guidance - 1.0)
            both = jax.tree.map(side_by_side, told['cond'], told['null'])
            net = self.program.net(trained, frozen, w)
            model = denoiser(
                lambda z, t: net(z, t, **both), schedule.prediction_type, jnp.asarray(abar)
            )
            solver = samplers.SAMPLERS[sampler].solver(samplers.low_end(steps, times))
            z = noise(len(abar), self.shape)
            return samplers.sample(
                guided(model, guidance), solver, z, times, jnp.asarray(abar), noise
            )

        return jax.jit(run, out_shardings=sharding.replicated(self.mesh))
