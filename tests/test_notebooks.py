"""The notebooks run from the first cell to the last, and are kept as they ran."""

import ast
import concurrent.futures
import getpass
import re
import socket
import tomllib
from pathlib import Path

import nbformat
import pytest
from run_notebooks import execute

FOLDER = Path(__file__).parents[1] / 'notebooks'
NAMES = sorted(file.stem for file in FOLDER.glob('*.ipynb'))
CPU = {'JAX_PLATFORMS': 'cpu'}
FEW_STEPS = {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'LCM_JAX_NOTEBOOK_STEPS': '4'}
ENVIRONMENTS = {'distill': CPU | FEW_STEPS}  # the others draw more than they compile
SIZE = 600_000  # bytes, pictures included
PATH = re.compile(r'(?<![\w:/.)\]])/[a-zA-Z]\w*/|[A-Z]:\\')  # absolute; not of an address


@pytest.fixture(scope='module')
def running(tmp_path_factory):
    """Name -> Future of the executed notebook; all at once, as compiling keeps one core busy."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield {
            name: pool.submit(
                execute,
                FOLDER / f'{name}.ipynb',
                tmp_path_factory.mktemp(name),
                timeout=600,
                env=ENVIRONMENTS.get(name, CPU),
            )
            for name in NAMES
        }


@pytest.fixture(params=NAMES)
def notebook(request):
    """As it is kept."""
    return nbformat.read(FOLDER / f'{request.param}.ipynb', as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def python(cell):
    """A cell's tree, without its shell commands and magics."""
    return ast.parse(re.sub(r'^( *)[!%].*', r'\1pass', cell.source, flags=re.M))


def texts(cell):
    for output in cell.outputs:
        yield output.get('text') or output.get('data', {}).get('text/plain', '')


def kinds(cell):
    """What a cell shows: 'text' on stdout, 'picture'."""
    for output in cell.outputs:
        if output.output_type == 'stream' and output.name == 'stdout':
            yield 'text'
        if {'image/png', 'image/jpeg'} & {*output.get('data', {})}:
            yield 'picture'


@pytest.mark.parametrize('name', NAMES)
def test_it_runs_and_shows_what_is_kept(name, running):
    done = running[name].result()
    kept = nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)
    for now, before in zip(code(done), code(kept), strict=True):
        assert now.source == before.source
        assert [*kinds(now)] == [*kinds(before)], now.source


def test_it_is_kept_as_it_ran_in_one_go(notebook):
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    for cell in cells:
        assert not [o for o in cell.outputs if o.output_type == 'error'], cell.source
        said = ''.join(texts(cell))
        assert 'Traceback' not in said and 'Warning' not in said, said
        last = python(cell).body[-1]
        speaks = 'print(' in cell.source or (
            isinstance(last, ast.Expr) and isinstance(last.value, ast.Call)
        )
        assert cell.outputs or not speaks, cell.source


def test_it_tells_nothing_of_the_machine(notebook):
    for cell in code(notebook):
        for said in texts(cell):
            assert not PATH.search(said), PATH.search(said)[0]
            assert f'{getpass.getuser()}@' not in said
            assert len(socket.gethostname()) < 4 or socket.gethostname() not in said


def test_it_installs_then_looks_for_an_accelerator(notebook):
    first, second, *_ = code(notebook)
    assert "if not importlib.util.find_spec('lcm_jax')" in first.source and '%pip' in first.source
    extras = tomllib.loads((FOLDER.parent / 'pyproject.toml').read_text())['project'][
        'optional-dependencies'
    ]
    assert {*re.findall(r'\[([\w,]+)\]', first.source)} <= extras.keys()
    assert ''.join(texts(first)) == 'lcm_jax is installed\n'
    assert 'jax.devices()' in second.source


def test_it_defines_nothing(notebook):
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef
    for cell in code(notebook):
        assert not [node for node in ast.walk(python(cell)) if isinstance(node, kinds)], cell.source


@pytest.mark.parametrize('name', NAMES)
def test_it_is_small_and_its_links_lead_somewhere(name):
    file = FOLDER / f'{name}.ipynb'
    assert file.stat().st_size < SIZE
    for cell in nbformat.read(file, as_version=4).cells:
        for link in re.findall(r'\]\(([^):#]+)\)', cell.source):
            assert (FOLDER / link).is_file(), link
