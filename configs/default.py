"""Every key of a training run, once, with its unit. The other configs override some of them."""

import ml_collections


def get_config():
    c = ml_collections.ConfigDict()

    c.model = 'emoji'  # teacher: a shipped model's name or a diffusers folder
    c.dtype = 'float32'  # of the frozen base: float32 or bfloat16

    c.data = ml_collections.ConfigDict()
    c.data.styles = ('noto', 'twemoji')  # of the shipped emoji set
    c.data.seed = 0  # order of the samples

    c.lora = ml_collections.ConfigDict()
    c.lora.rank = 64
    c.lora.alpha = 64.0  # the update is alpha / rank * down @ up
    c.lora.targets = ''  # regex on parameter paths; empty: the modules that LCM-LoRA adapts

    c.distill = ml_collections.ConfigDict()
    c.distill.solver_steps = 50  # N: times at which the LCM is defined; the skip is 1000 / N
    c.distill.w_min = 5.0  # guidance of the teacher, papers' convention: usual scale = 1 + w
    c.distill.w_max = 15.0
    c.distill.distance = 'huber'  # huber or l2
    c.distill.huber_c = 0.001  # latent units
    c.distill.target = 'student'  # network that gives the target: student or ema

    c.train = ml_collections.ConfigDict()
    c.train.steps = 1000  # optimizer steps
    c.train.batch = 16  # samples per step, over all devices
    c.train.lr = 1e-4  # peak
    c.train.warmup = 0  # steps
    c.train.decay = False  # cosine to 1 % of the peak over the run (else constant)
    c.train.weight_decay = 0.0
    c.train.clip = 1.0  # global gradient norm
    c.train.ema_decay = 0.95  # per step
    c.train.seed = 0
    c.train.log_every = 20  # steps
    c.train.save_every = 200  # steps; pictures are drawn then too

    c.export = ml_collections.ConfigDict()
    c.export.weights = 'params'  # params or ema
    return c.lock()  # so that a config which overrides keys cannot misspell one
