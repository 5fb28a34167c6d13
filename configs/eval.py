"""Every key of an evaluation, once, with its unit. The configs eval_*.py override some of them."""

import ml_collections


def get_config():
    c = ml_collections.ConfigDict()

    c.model = 'emoji'  # drawn with, unless a way says otherwise: as in configs/default.py
    c.dtype = ''  # of the networks: float32, bfloat16; empty: float32 on CPUs, else bfloat16
    c.ways = ()  # rows of label, sampler and, if you like, model, lora ('FILE:SCALE + FILE:SCALE'),
    # guidance (default 1: none, whatever the sampler and the model) and steps, a number or several
    # each (every combination is a cell), and spacing of the times
    c.steps = (1, 2, 4, 8)  # of the sampler, for ways that do not say
    c.reference = ''  # label of the way, with one number of steps, whose pictures all others are
    # compared with one by one, from the same noise; empty: none

    c.sets = ()  # rows (name, source whose captions are drawn, how many pictures of each cell; 0: one
    # of each caption; more than there are: several of each)
    c.real = ''  # source of the real pictures that FID and KID are taken to
    c.resolution = 64  # px, that real pictures are resized and cut to (from the middle)
    c.paired = 512  # of each cell's pictures, evenly apart, that are compared with the reference's
    c.seed = 0  # of the captions' choice and the noise
    c.batch = 64  # pictures drawn at a time, by each process

    c.features = (
        'emoji'  # network of FID and KID: emoji, clip:FOLDER, inception:FILE, inception-tf:FILE,
    )
    # inception-clean:FILE
    c.clip = 'emoji'  # network of the CLIP score: emoji, clip:FOLDER; empty: none
    c.lpips = (
        'emoji'  # network of LPIPS to the reference: emoji, alex:FILE, vgg:FILE, squeeze:FILE;
    )
    # empty: none

    c.title = ''  # of the report
    c.prompts = ()  # a row of the picture grid each
    return c.lock()
