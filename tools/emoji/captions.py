"""Ways to say one caption, so that the emoji models understand short prompts too."""


def variant(caption, rng):
    """'squid, animal, food, noto emoji' -> e.g. 'a squid, food, noto emoji': random keywords kept."""
    label, *words = caption.split(', ')
    *keywords, style = words
    keep = rng.random(len(keywords)) < rng.choice([0.0, 0.5, 1.0])
    if rng.random() < 0.25:
        label = ('an ' if label[0] in 'aeiou' else 'a ') + label
    return ', '.join([label, *(k for k, kept in zip(keywords, keep, strict=True) if kept), style])
