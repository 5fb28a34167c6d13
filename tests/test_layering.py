"""Imports inside the package run strictly downward, and torch and tensorflow stay outside it."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

import lcm_jax

ROOT = Path(lcm_jax.__file__).parent

# Each line may import only from the lines above it. `lcm_jax` is the package's own __init__.
LAYERS = [
    line.split()
    for line in """
    errors original aot atomic
    tree diffusion images data.settings data.order chips flops hlo text tensors hub metrics peers
    grid data.samples stop loop logs orbax_io models.flash
    data.files saves report models.attention
    data.tars flags
    data.emoji data.folders
    data.emoji_tfds
    data.records
    data.cache
    data.sources
    processes
    sharding
    weights lora samplers plan models.layers
    models.clip models.unet models.vae models.inception models.lpips
    models.tiny
    models.configs models.shapes models.zoo distill lora_files.dialects conditioning
    encode data.pictures resize lora_files.find
    data.loader
    data.cache_fill data.pairs
    data.check
    infer lora_files.family lora_files.algebra lora_files.peft_config
    single lora_files.methods lora_files.programs
    lora_files.files lora_files.describe
    checkpoint scheduler families adapters draw
    request model convert student backbones
    step
    pipeline workloads preview run_cache export features cells
    lcm_jax feed lora_files.verbs judge measure sweep artist
    train evaluate
    demo lora_cli data_cli plan_cli eval_cli
    cli
""".strip().splitlines()
]
PACKAGES = 'data', 'models', 'lora_files'
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

NEVER = {'torch', 'torchvision', 'tensorflow', 'diffusers', 'peft', 'accelerate'}


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix('').parts
    return '.'.join(p for p in parts if p != '__init__') or 'lcm_jax'


FILES = {module_name(file): file for file in sorted(ROOT.rglob('*.py'))}


def imported(file):
    """Absolute dotted names of what a file imports, inside functions too; `from a import b` -> a.b."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, (
                f'{file}:{node.lineno} imports relatively; write the package name'
            )
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def own(name):
    """'lcm_jax.models.unet.UNet' -> 'models.unet': the longest module that the name lies in."""
    parts = name.split('.')[1:]
    while parts and '.'.join(parts) not in FILES:
        parts.pop()
    return '.'.join(parts) or 'lcm_jax'


@pytest.mark.parametrize('module', [m for m in FILES if m not in PACKAGES])
def test_imports_run_downward(module):
    assert module in RANK, f'{module} is new: give it a line in LAYERS'
    for name in imported(FILES[module]):
        package = name.split('.')[0]
        assert package not in NEVER, f'{module} imports {name}'
        assert package != 'configs', f'{module} imports configs'
        if package == 'lcm_jax':
            target = own(name)
            assert RANK[target] < RANK[module], f'{module} imports {target}, which is not below it'


def test_what_is_imported_is_required():
    """An installation without the extra of the tests has all of it."""
    project = tomllib.loads((ROOT.parent / 'pyproject.toml').read_text())['project']
    extras = project['optional-dependencies']
    required = {
        re.match(r'[\w-]+', line)[0].lower().replace('_', '-')
        for line in project['dependencies'] + extras['tfds'] + extras['tpu']
    }
    of = importlib.metadata.packages_distributions()
    tops = {name.split('.')[0] for file in FILES.values() for name in imported(file)}
    assert 'flax' in tops
    for top in tops - sys.stdlib_module_names - {'lcm_jax'}:
        mine = {name.lower().replace('_', '-') for name in of[top]}
        assert mine & required, f'{top} is of {mine}, which pyproject.toml does not require'


@pytest.mark.parametrize('package', PACKAGES)
def test_packages_are_empty(package):
    assert not FILES[package].read_text().strip()


def test_configs_import_nothing_of_ours():
    for file in sorted((ROOT.parent / 'configs').glob('*.py')):
        assert not any(name.split('.')[0] == 'lcm_jax' for name in imported(file)), file
