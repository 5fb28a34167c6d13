"""Results of an evaluation -> tables, plots and picture grids."""

from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from lcm_jax.grid import grid


class Metric(NamedTuple):
    """How a number is shown."""

    key: str
    title: str
    scale: float = 1.0
    digits: int = 2
    log: bool = False  # axis of the plots


METRICS = (
    Metric('fid', 'FID (lower is better)', log=True),
    Metric('kid', 'KID x 1000 (lower is better)', 1000, 1),
    Metric('clip', 'CLIP score (higher is better)', digits=1),
    Metric('retrieval', 'share that finds its caption among 100 (higher is better)'),
    Metric('lpips', 'LPIPS to the reference (lower is better)', digits=3),
    Metric('psnr', 'PSNR to the reference, dB (higher is better)', digits=1),
    Metric('seconds', 'seconds per picture', digits=3),
)
PLOTTED = ('fid', 'clip', 'lpips')


def write(workdir, results, title, prompts):
    """report.md, quality-SET.png and grid.png of results as `evaluate.run` makes them."""
    for one in results['sets']:
        plot(one['rows']).savefig(workdir / f'quality-{one["folder"]}.png', dpi=100)
    if prompts:
        rows = results['sets'][0]['rows']
        picture_grid(workdir / 'grid', rows, prompts).save(workdir / 'grid.png')
    (workdir / 'report.md').write_text(markdown(results, title, prompts))


def markdown(results, title, prompts):
    """-> the report: a table of ways x steps for each metric and set, and the protocol."""
    lines = [f'# {title}', ''] if title else []
    lines += ['![pictures](grid.png)', ''] if prompts else []
    for one in results['sets']:
        n = one['rows'][0]['n']
        lines += [f'## {one["set"]}', '', f'{n:,} captions of `{one["source"]}`', '']
        for metric in METRICS:
            lines += table(one['rows'], metric)
        lines += [f'![quality](quality-{one["folder"]}.png)', '']
    return '\n'.join([*lines, *said(results)]) + '\n'


def table(rows, metric):
    """Rows, a Metric -> lines of Markdown; none if no row has it."""
    rows = [r for r in rows if r.get(metric.key) is not None]
    steps = sorted({r['steps'] for r in rows if r['steps']})
    if not steps:
        return []
    found = {(r['label'], r['steps']): r[metric.key] * metric.scale for r in rows}
    labels = list(dict.fromkeys(r['label'] for r in rows))

    def cell(label, n):
        value = found.get((label, n))
        return '' if value is None else f'{value:.{metric.digits}f}'

    lines = [f'{metric.title}:', '', '| | ' + ' | '.join(map(str, steps)) + ' |']
    lines.append('|---' * (len(steps) + 1) + '|')
    for label in labels:
        one = cell(label, None)  # of real pictures: there are no steps
        name = f'{label}: {one}' if one else label
        lines.append(f'| {name} | ' + ' | '.join(cell(label, n) for n in steps) + ' |')
    return [*lines, '']


def said(results):
    """-> lines about how all was measured."""
    p = results['protocol']
    rows = [r for one in results['sets'] for r in one['rows']]
    drawn = [r for r in rows if r['steps']]
    ways = dict.fromkeys(
        f'- {r["label"]}: `{r["model"]}`'
        + (f' with LoRA `{r["lora"]}`' if r['lora'] else '')
        + f', sampler `{r["sampler"]}`'
        + (f' at `{r["spacing"]}` times' if r['spacing'] else '')
        + f', guidance {r["guidance"]:g}'
        for r in drawn
    )
    lines = [
        *ways,
        '',
        f'FID and KID: features {p["features"]}, to {p["real_pictures"]:,} real pictures of '
        f'`{p["real"]}`, resized and cut to {p["resolution"]} px.',
    ]
    if any(r['biased'] for r in rows):
        lines.append(
            'With fewer than 10,000 pictures FID is biased upwards (KID is not): compare numbers of '
            'one table, of equally many pictures, only.'
        )
    among = [one['set'] for one in results['sets'] if one['source'] == p['real']]
    if among:
        lines.append(
            f'The real pictures of {", ".join(among)} are among those that FID and KID are taken to: '
            'what they have is no floor.'
        )
    if p['clip']:
        lines.append(f'CLIP score: {p["clip"]}.')
    if any('psnr' in r for r in rows):
        lines.append(
            f'Compared one by one with the pictures of {p["reference"]}: {p["paired"]:,} of a set, '
            'evenly apart, or all if there are fewer'
            + (f'; LPIPS: {p["lpips"]}.' if p['lpips'] else '.')
        )
    lines.append(
        f'Seed {p["seed"]}; every way draws the same captions from the same noise. Seconds are the '
        f'median batch of {p["batch"]}, compiled program warm, text encoders and VAE included, on '
        f'{", ".join(dict.fromkeys(r["device"] for r in drawn))} of one process.'
    )
    return lines


def plot(rows):
    """Rows -> figure: each of PLOTTED against steps, and against seconds per picture."""
    shown = [m for m in METRICS if m.key in PLOTTED and any(m.key in r for r in rows)]
    figure = Figure(figsize=(4.2 * len(shown), 6.4), layout='constrained')
    axes = figure.subplots(2, len(shown), squeeze=False)
    drawn = sorted((r for r in rows if r['steps']), key=lambda r: r['steps'])
    labels = list(dict.fromkeys(r['label'] for r in rows if r['steps']))
    for column, metric in zip(axes.T, shown, strict=True):
        there = [r for r in drawn if r.get(metric.key) is not None]
        for axis, key, name in zip(
            column, ('steps', 'seconds'), ('steps', 's / picture'), strict=True
        ):
            for i, label in enumerate(labels):
                points = [
                    (r[key], r[metric.key] * metric.scale)
                    for r in there
                    if r['label'] == label and r[key] is not None
                ]
                if points:
                    axis.plot(
                        *zip(*points, strict=True), marker='.', color=f'C{i % 10}', label=label
                    )
            axis.set(xlabel=name, xscale='log', yscale='log' if metric.log else 'linear')
            for side in (axis.xaxis, axis.yaxis):
                if side.get_scale() == 'log':
                    side.set_major_locator(LogLocator(subs=(1, 2, 5)))
                    side.set_major_formatter(FuncFormatter(lambda x, _: f'{x:g}'))
                    side.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
        steps = sorted({r['steps'] for r in there})
        column[0].set_xticks(steps, map(str, steps))
        column[0].xaxis.minorticks_off()
        column[0].set_title(metric.title, fontsize='medium')
    lines = axes[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc='outside lower center', ncols=max(1, len(shown)), fontsize='small')
    return figure


def picture_grid(folder, rows, prompts):
    """A set's cells as columns, the config's prompts as rows -> PIL image."""
    rows = [r for r in rows if r.get('file')]
    columns = []
    for r in rows:
        with Image.open(folder / f'{r["file"]}.png') as strip:
            side = strip.width // len(prompts)
            columns.append(
                [
                    strip.crop((i * side, 0, (i + 1) * side, strip.height))
                    for i in range(len(prompts))
                ]
            )
    return grid(
        prompts,
        [f'{r["label"]}\n{r["steps"]}' for r in rows],
        list(zip(*columns, strict=True)),
        tile=max(80, min(160, side)),
    )
