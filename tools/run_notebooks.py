"""Execute notebooks and keep in them what they show: `make notebooks`.

    python tools/run_notebooks.py notebooks/*.ipynb

Each runs in an empty folder that is thrown away, and whose name is taken out of what is printed. Of
pictures, which PIL gives as PNG and as JPEG, the JPEG is kept: a quarter of the size.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

METADATA = {
    'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
    'language_info': {'name': 'python'},
}


def execute(file, folder, timeout=None, env=None):
    """A notebook file, executed in `folder` -> notebook with its outputs.

    timeout: seconds for a cell; env: variables besides those of this process. Raises nbclient's
    CellExecutionError where a cell fails.
    """
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name='python3',
        coalesce_streams=True,  # a progress bar is kept as it ended
        record_timing=False,
        resources={'metadata': {'path': str(folder)}},
    )
    client.execute(env=os.environ | (env or {}))
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        for output in cell.get('outputs', ()):
            tidy(output, f'{Path(folder).resolve()}/')
    return notebook


def tidy(output, prefix):
    """Take `prefix` out of an output's text, and the larger of a picture's two forms, in place."""
    if 'text' in output:
        output.text = output.text.replace(prefix, '')
    data = output.get('data', {})
    if 'text/plain' in data:
        data['text/plain'] = data['text/plain'].replace(prefix, '')
    if 'image/jpeg' in data:
        data.pop('image/png', None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('notebooks', nargs='+', type=Path)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # no alarm where compiling takes minutes
    for file in parser.parse_args().notebooks:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(file, folder), file)
        seconds, kb = time.perf_counter() - start, file.stat().st_size / 1000
        print(f'{file}: {seconds:.0f} s, {kb:.0f} kB', file=sys.stderr)


if __name__ == '__main__':
    main()
