"""Every command that the documents show is one: its verb, options, config and keys are there."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from lcm_jax import cli, flags

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')  # ml_collections' own
ROOT = Path(cli.__file__).parents[1]
DOCUMENTS = [
    *('README.md', 'docs/training.md', 'docs/results.md', 'lcm_jax/emoji/README.md'),
    *(f'configs/{file.name}' for file in sorted((ROOT / 'configs').glob('*.py'))),
]
STANDS_FOR = {  # what is left to the reader
    'configs/NAME.py': 'configs/emoji_lcm_lora.py',
    'CONFIG': 'configs/sd15_lcm_lora.py',
    'CHIPS': '16',
    '--processes=N --process=I': '--processes=2 --process=0',
}
MODULES = {'train': 'train', 'evaluate': 'ways'}  # run by python -m -> a key of flags.KINDS


BEFORE = r'^ *(?:.*(?:&& |per-node=\d+ ))?(?:JAX_\w+=\w+ )?'  # in a line, before a command


def commands(text):
    """-> [words] of the commands in lines of their own and in backticks, not of bare mentions of a verb."""
    for name, one in STANDS_FOR.items():
        text = text.replace(name, one)
    text = re.sub(r' *\\\n\s*', ' ', text)
    spans = re.findall(r'`([^`]+)`', re.sub(r'```.*?```', '', text, flags=re.S))
    found = [' '.join(span.split()).removeprefix('JAX_PLATFORMS=cpu ') for span in spans]
    found += re.findall(BEFORE + r'((?:lcm-jax|python) .*)$', text, re.M)
    for line in found:
        if re.match(r'lcm-jax |python (-m lcm_jax|tools/)', line):
            line = line.removesuffix('"') if line.count('"') % 2 else line
            if not re.fullmatch(r'lcm-jax( [a-z]+){1,2}', line):
                yield shlex.split(line, comments=True)


def check(words):
    """Raises what the program would raise for these arguments, before it does anything."""
    if words[1] == '-m':
        name = words[2].removeprefix('lcm_jax.')
        p = argparse.ArgumentParser()
        flags.add_run(p, MODULES[name])
        flags.settled(flags.arguments(p, words[3:]), MODULES[name])
    elif words[0] == 'python':
        assert (ROOT / words[1]).is_file(), words[1]
    else:
        args = flags.arguments(cli.parser(), words[1:])
        if hasattr(args, 'config'):
            flags.settled(args, 'ways' if words[1] == 'evaluate' else 'train')


@pytest.mark.parametrize('document', DOCUMENTS)
def test_commands(document, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [*commands((ROOT / document).read_text())]
    for words in found:
        try:
            check(words)
        except (Exception, SystemExit) as e:
            raise AssertionError(f'{document}: {shlex.join(words)}: {e}') from e
    if document == 'README.md':
        assert len(found) > 25 and any(words[1] == '-m' for words in found)


def test_commands_that_are_none(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = """
    lcm-jax sample "a cat" --lora lcm --step 4 --colour red    # no such option
    `lcm-jax train --config configs/emoji_lcm_lora.py --workdir x
    --config.train.step=5` and `python tools/none.py --help`
    gcloud ssh --command="cd x && python -m lcm_jax.train \\
        --config=configs/none.py --workdir=x"
"""
    found = [*commands(text)]
    assert len(found) == 4
    for words in found:
        with pytest.raises((Exception, SystemExit)):
            check(words)
