"""The networks of metrics in torch, as functions of a file's tensors: pytorch-fid's Inception-v3 and
lpips' distance on torchvision's backbones. What those packages themselves give is in PACKAGES."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# Of pytorch-fid 0.3.0, torch-fidelity 0.4.0, clean-fid 0.1.35's resizing before pytorch-fid's network,
# and lpips 0.1.4 with torchvision 0.28.0: the first features of NOISE[0], the mean of all of both
# pictures, and the distance of the two; all with random_weights of the keys in their own files.
NOISE = np.random.default_rng(1).integers(0, 256, (2, 40, 52, 3), dtype=np.uint8)
PACKAGES = {
    'inception': [0.01964309, 16.66332, 0.1523953, 3.83222],
    'inception-tf': [0.0151367, 16.77802, 0.1736117, 3.83691],
    'inception-clean': [0.01838448, 19.63703, 0.1323262, 4.557381],
    'alex': [0.09895878],
    'vgg': [0.1349983],
    'squeeze': [0.1131224],
}


def random_weights(shapes, seed=0):
    """{key: shape} -> {key: float32}, such that activations stay of order one."""
    rng, out = np.random.default_rng(seed), {}
    for key in sorted(shapes):
        if key.endswith('running_var'):
            x = rng.uniform(0.5, 1.5, shapes[key])
        elif len(shapes[key]) == 4:
            x = rng.normal(size=shapes[key]) * np.sqrt(2 / np.prod(shapes[key][1:]))
        else:
            x = 0.2 * rng.normal(size=shapes[key]) + ('bn.weight' in key)
        out[key] = np.float32(x)
    return out


def nchw(pictures):
    """uint8 [B,H,W,3] -> float32 [B,3,H,W]."""
    return torch.tensor(pictures).permute(0, 3, 1, 2).float()


# --- resizing


def torch_bilinear(pictures):
    """uint8 [B,H,W,3] -> [B,3,299,299] in -1..1, as pytorch-fid's network."""
    x = F.interpolate(nchw(pictures) / 255, (299, 299), mode='bilinear', align_corners=False)
    return 2 * x - 1


def tensorflow_bilinear(pictures):
    """The same as TensorFlow 1's `resize_bilinear` without aligned corners."""
    x = pictures.astype(np.float64)
    for axis in (1, 2):
        x, n = np.moveaxis(x, axis, 0), x.shape[axis]
        rows = []
        for i in range(299):
            low = i * n // 299
            part = i * n / 299 - low
            rows.append((1 - part) * x[low] + part * x[min(low + 1, n - 1)])
        x = np.moveaxis(np.stack(rows), 0, axis)
    return (nchw(x) - 128) / 128


def pil_bicubic(pictures):
    """The same as clean-fid: each channel by PIL, in float32."""

    def channel(x):
        image = Image.fromarray(np.ascontiguousarray(x, np.float32), mode='F')
        return np.asarray(image.resize((299, 299), resample=Image.BICUBIC)).clip(0, 255)

    x = np.stack([[channel(p[..., c]) for c in range(3)] for p in pictures])
    return (torch.tensor(x) - 128) / 128


RESIZED = {
    'inception': torch_bilinear,
    'inception-tf': tensorflow_bilinear,
    'inception-clean': pil_bicubic,
}


# --- FID's Inception-v3


def inception(w, x):
    """Tensors of the file, pictures [B,3,299,299] in -1..1 -> features [B,2048]."""

    def conv(x, name, stride=1, pad=0):
        x = F.conv2d(x, w[f'{name}.conv.weight'], stride=stride, padding=pad)
        bn = (w[f'{name}.bn.{key}'] for key in ('running_mean', 'running_var', 'weight', 'bias'))
        return F.relu(F.batch_norm(x, *bn, eps=1e-3))

    def average(x):
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def a(x, m):
        five = conv(conv(x, f'{m}.branch5x5_1'), f'{m}.branch5x5_2', pad=2)
        three = conv(conv(x, f'{m}.branch3x3dbl_1'), f'{m}.branch3x3dbl_2', pad=1)
        three = conv(three, f'{m}.branch3x3dbl_3', pad=1)
        pool = conv(average(x), f'{m}.branch_pool')
        return torch.cat([conv(x, f'{m}.branch1x1'), five, three, pool], 1)

    def b(x, m):
        three = conv(conv(x, f'{m}.branch3x3dbl_1'), f'{m}.branch3x3dbl_2', pad=1)
        three = conv(three, f'{m}.branch3x3dbl_3', 2)
        return torch.cat([conv(x, f'{m}.branch3x3', 2), three, F.max_pool2d(x, 3, 2)], 1)

    def c(x, m):
        seven = conv(conv(x, f'{m}.branch7x7_1'), f'{m}.branch7x7_2', pad=(0, 3))
        seven = conv(seven, f'{m}.branch7x7_3', pad=(3, 0))
        double = conv(x, f'{m}.branch7x7dbl_1')
        for i, pad in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
            double = conv(double, f'{m}.branch7x7dbl_{i}', pad=pad)
        pool = conv(average(x), f'{m}.branch_pool')
        return torch.cat([conv(x, f'{m}.branch1x1'), seven, double, pool], 1)

    def d(x, m):
        three = conv(conv(x, f'{m}.branch3x3_1'), f'{m}.branch3x3_2', 2)
        seven = conv(conv(x, f'{m}.branch7x7x3_1'), f'{m}.branch7x7x3_2', pad=(0, 3))
        seven = conv(conv(seven, f'{m}.branch7x7x3_3', pad=(3, 0)), f'{m}.branch7x7x3_4', 2)
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)

    def e(x, m, pool):
        three = conv(x, f'{m}.branch3x3_1')
        double = conv(conv(x, f'{m}.branch3x3dbl_1'), f'{m}.branch3x3dbl_2', pad=1)
        return torch.cat(
            [
                conv(x, f'{m}.branch1x1'),
                conv(three, f'{m}.branch3x3_2a', pad=(0, 1)),
                conv(three, f'{m}.branch3x3_2b', pad=(1, 0)),
                conv(double, f'{m}.branch3x3dbl_3a', pad=(0, 1)),
                conv(double, f'{m}.branch3x3dbl_3b', pad=(1, 0)),
                conv(pool(x), f'{m}.branch_pool'),
            ],
            1,
        )

    x = conv(conv(x, 'Conv2d_1a_3x3', 2), 'Conv2d_2a_3x3')
    x = F.max_pool2d(conv(x, 'Conv2d_2b_3x3', pad=1), 3, 2)
    x = F.max_pool2d(conv(conv(x, 'Conv2d_3b_1x1'), 'Conv2d_4a_3x3'), 3, 2)
    for block, stage, letters in ((a, 5, 'bcd'), (b, 6, 'a'), (c, 6, 'bcde'), (d, 7, 'a')):
        for letter in letters:
            x = block(x, f'Mixed_{stage}{letter}')
    x = e(x, 'Mixed_7b', average)
    x = e(x, 'Mixed_7c', lambda x: F.max_pool2d(x, 3, 1, 1))
    return x.mean((2, 3))


# --- LPIPS


def _vgg(conv, pool, x):
    out, i = [], 0
    for width in (2, 2, 3, 3, 3):
        x, i = (pool(x, 2, 2), i + 1) if out else (x, i)
        for _ in range(width):
            x, i = conv(x, f'features.{i}', 1, 1), i + 2
        out.append(x)
    return out


def _alex(conv, pool, x):
    one = conv(x, 'features.0', 4, 2)
    two = conv(pool(one, 3, 2), 'features.3', 1, 2)
    three = conv(pool(two, 3, 2), 'features.6', 1, 1)
    four = conv(three, 'features.8', 1, 1)
    return one, two, three, four, conv(four, 'features.10', 1, 1)


def _squeeze(conv, pool, x):
    def fire(x, i):
        x = conv(x, f'features.{i}.squeeze', 1, 0)
        both = (conv(x, f'features.{i}.expand{n}x{n}', 1, n // 2) for n in (1, 3))
        return torch.cat([*both], 1)

    def shrink(x):
        return pool(x, 3, 2, ceil_mode=True)

    out = [conv(x, 'features.0', 2, 0)]
    out.append(fire(fire(shrink(out[-1]), 3), 4))
    out.append(fire(fire(shrink(out[-1]), 6), 7))
    out.append(fire(shrink(out[-1]), 9))
    for i in (10, 11, 12):
        out.append(fire(out[-1], i))
    return out


TRUNKS = {'alex': _alex, 'vgg': _vgg, 'squeeze': _squeeze}


def lpips(kind, w, heads, a, b):
    """Tensors of the backbone and of the heads, pictures uint8 [B,H,W,3] -> distances [B]."""

    def conv(x, name, stride, pad):
        return F.relu(F.conv2d(x, w[f'{name}.weight'], w[f'{name}.bias'], stride, pad))

    def maps(x):
        shift, scale = (
            torch.tensor(v)[:, None, None]
            for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450])
        )
        out = TRUNKS[kind](conv, F.max_pool2d, (nchw(x) / 127.5 - 1 - shift) / scale)
        return [y / (y.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for y in out]

    pairs = zip(maps(a), maps(b), strict=True)
    return sum(
        F.conv2d((x - y) ** 2, heads[f'lin{i}.model.1.weight']).mean((1, 2, 3))
        for i, (x, y) in enumerate(pairs)
    )
