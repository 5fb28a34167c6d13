"""How a run reads its data."""

import dataclasses

from lcm_jax.errors import InputError, choose


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The `data` keys of a config; a filter of 0 is off."""

    source: str = 'emoji'  # see `sources.open_source`
    resolution: int = 64  # px, of the square that is cut out; with buckets, of one of its area
    crop: str = 'random'  # or 'center'
    flip: bool = False  # from left to right, half of the time
    buckets: bool = False  # shapes near each picture's own, one shape a batch
    caption: str = 'txt'  # extension of the caption file, or a field of the JSON or the features
    min_size: int = 0  # px, of the shorter side, as stored and originally
    max_watermark: float = 0.0  # LAION's pwatermark, 0..1
    min_aesthetic: float = 0.0  # LAION's aesthetic score, 0..10
    max_unsafe: float = 0.0  # LAION's punsafe, 0..1
    max_dropped: float = 0.05  # share of broken samples, and of unreadable files, that is borne
    seed: int = 0  # order of the samples, crops and flips
    threads: int = 8  # that read and decode, in each process or worker
    workers: int = 0  # processes that read and decode; 0: the program's own

    def __post_init__(self):
        choose('crop', self.crop, dict.fromkeys(('random', 'center')))
        for key, low, high in (
            ('resolution', 8, 8192),
            ('max_dropped', 0, 1),
            ('seed', 0, 2**63),
            ('threads', 1, 512),
            ('workers', 0, 512),
        ):
            value = getattr(self, key)
            if not low <= value <= high:
                raise InputError(f'data.{key} = {value}: must be from {low} to {high}')


def check_latents(settings):
    """InputError for a resolution whose pictures have no latents: those are an eighth of it."""
    if settings.resolution % 8:
        raise InputError(f'data.resolution = {settings.resolution}: must be a multiple of 8')
