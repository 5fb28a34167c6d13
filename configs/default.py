"""Every key of a training run, once, with its unit. The other configs override some of them."""

import ml_collections


def get_config():
    c = ml_collections.ConfigDict()

    c.model = 'emoji'  # the base: a shipped model's name, a folder, a single file or a hub id
    c.dtype = (
        'float32'  # of the frozen base and of all networks' arithmetic: float32 or bfloat16 (TPUs
    )
    # multiply float32 in bfloat16 too, unless JAX_DEFAULT_MATMUL_PRECISION=highest)
    c.vae_dtype = 'float32'  # of the VAE: SDXL's overflows in float16
    c.objective = 'lcm'  # lcm: distillation; lcf: consistency fine-tuning; denoise: plain training
    c.trains = 'lora'  # lora: an adapter; full: the UNet itself

    c.data = ml_collections.ConfigDict()
    c.data.source = 'emoji'  # FAMILY:WHAT; families: emoji, emoji-heldout, wds, tfds, array_record,
    # folder, synthetic, cache (see lcm_jax/data/sources.py)
    c.data.cache = False  # encode all of it once, into workdir/cache: crops and flips are fixed
    c.data.validation = ''  # a source that is not trained on, for the metric 'validation'
    c.data.validation_batches = 4  # of it that are judged by, always the same
    c.data.resolution = 64  # px, of the square cut out; with buckets, of one of their area
    c.data.crop = 'random'  # or center
    c.data.flip = False  # from left to right, half of the time
    c.data.buckets = False  # cut each picture to a shape near its own, one shape a batch
    c.data.caption = 'txt'  # extension of the caption file, or a field of the JSON
    c.data.min_size = 0  # px, of the shorter side; this filter and the next three: 0 is off
    c.data.max_watermark = 0.0  # LAION's pwatermark, 0..1
    c.data.min_aesthetic = 0.0  # LAION's aesthetic score, 0..10
    c.data.max_unsafe = 0.0  # LAION's punsafe, 0..1
    c.data.max_dropped = 0.05  # share of broken samples and of unreadable files that is borne
    c.data.seed = 0  # order of the samples, crops and flips
    c.data.threads = 8  # that read and decode, in each process
    c.data.workers = 0  # processes that read and decode; 0: the trainer's own

    c.lora = ml_collections.ConfigDict()
    c.lora.rank = 64  # of the update, down @ up
    c.lora.alpha = 0.0  # the update is alpha / rank * down @ up; 0: alpha is the rank
    c.lora.targets = ()  # rows (regex on parameter paths, rank, alpha), the first match counts; rank 0:
    # left alone. Empty: the modules that LCM-LoRA adapts, with the rank and alpha above

    c.full = ml_collections.ConfigDict()
    c.full.trainable = '.*'  # regex on parameter paths of the UNet
    c.full.w_dim = 256  # width of the guidance input that objective lcm adds; 0: none

    c.distill = ml_collections.ConfigDict()
    c.distill.solver = 'ddim'  # of the teacher's step: ddim; dpm or dpm++ (two evaluations)
    c.distill.solver_steps = 50  # N: times at which the LCM is defined, 1000 / N apart
    c.distill.skip = 0  # k: length of the teacher's step, a multiple of 1000 / N; 0: 1000 / N
    c.distill.w = 'script'  # guidance of the teacher in the papers' convention, usual scale - 1:
    # W, LOW:HIGH, or paper 2:14, report 7.5, script 5:15, script_sdxl 3:15
    c.distill.null = 'model'  # the teacher's null condition: model (as trained), empty, zeros
    c.distill.distance = 'huber'  # huber or l2
    c.distill.huber_c = 0.001  # latent units
    c.distill.target = 'student'  # network that gives the target: student or ema
    c.distill.min_snr = 0.0  # gamma of the weighting, for objective denoise; 0: none

    c.train = ml_collections.ConfigDict()
    c.train.steps = 1000  # optimizer steps
    c.train.batch = 16  # samples per step, over all devices
    c.train.accumulate = 1  # parts that a batch is taken in, one after the other
    c.train.remat = 'none'  # what the student's backward pass computes again: none, or blocks
    c.train.lr = 1e-4  # peak
    c.train.warmup = 50  # steps
    c.train.decay = False  # cosine to 1 % of the peak over the run (else constant)
    c.train.b2 = 0.999  # Adam's second decay
    c.train.weight_decay = 0.0  # Adam's, times the learning rate
    c.train.clip = 1.0  # largest global gradient norm; 0: no limit
    c.train.ema_decay = (
        0.95  # per step, reached by min(ema_decay, (1 + step) / (10 + step)); 0: no average
    )
    c.train.caption_dropout = 0.0  # share of captions replaced by the null condition
    c.train.seed = 0  # of the start, noise, times and guidance
    c.train.max_skipped = 10  # steps in a row that are not finite before the run ends
    c.train.log_every = 20  # steps
    c.train.save_every = 200  # steps; pictures are drawn then too
    c.train.keep = 2  # newest checkpoints that are kept
    c.train.best = 'distance'  # what the best is kept and exported by: distance to the teacher's
    # pictures (not for denoise), validation (the loss on data.validation), or '': none

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = -1  # devices along each axis; -1: all that are left
    c.mesh.fsdp = 1  # divides samples and parameters
    c.mesh.tensor = 1  # divides parameters and features
    c.mesh.dcn = 1  # groups of devices joined by a slower network; they divide `data`
    c.mesh.rules = ()  # rows (regex on paths state/... and frozen/..., axes of the last dimensions)
    # that come before those of lcm_jax/sharding.py

    c.preview = ml_collections.ConfigDict()  # pictures drawn at each checkpoint
    c.preview.prompts = (  # one picture each
        'red heart, emotion, heart, love, red, noto emoji',
        'cat face, animal, cat, face, kitten, kitty, pet, twemoji',
        'strawberry, berry, fruit, noto emoji',
        'avocado, food, fruit, twemoji',
    )
    c.preview.sampler = 'lcm'  # lcm, ddim, dpm, dpm++, euler
    c.preview.steps = 4  # of the sampler
    c.preview.guidance = 1.0  # its scale; 1: none
    c.preview.teacher_steps = 50  # DDIM, of the base: what the pictures' distance is taken to
    c.preview.teacher_guidance = 4.0  # scale of the teacher's guidance
    c.preview.seed = 0  # of the noise that all pictures start from

    c.export = ml_collections.ConfigDict()
    c.export.name = 'lora'  # NAME.safetensors, or the folder NAME, in the workdir; and NAME_best
    c.export.weights = 'params'  # params or ema
    return c.lock()  # so that a config which overrides keys cannot misspell one
