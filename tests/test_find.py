"""LoRAs by file, folder, hub id and shipped name; and which of them accelerate."""

import shutil

import pytest

from lcm_jax.errors import InputError
from lcm_jax.lora_files.find import LORAS, accelerates, find

USUAL = 'pytorch_lora_weights.safetensors'


def test_files_folders_and_names(tmp_path):
    assert find('lcm') == LORAS['lcm']
    with pytest.raises(InputError, match=r"'lmc' is neither a shipped LoRA .*did you mean 'lcm'"):
        find('lmc')
    with pytest.raises(InputError, match=r'no \.safetensors file; name one LoRA file'):
        find(tmp_path)
    for name in ('one', 'two'):
        file = shutil.copy(LORAS['fluent'], tmp_path / f'{name}.safetensors')
        if name == 'one':
            assert find(tmp_path) == find(file) == file
    with pytest.raises(InputError, match=r'holds one\.safetensors, two\.safetensors; name one'):
        find(tmp_path)
    usual = shutil.copy(LORAS['fluent'], tmp_path / USUAL)
    (tmp_path / 'adapter_config.json').write_text('{}')
    assert find(str(tmp_path)) == usual
    with pytest.raises(InputError, match='nor a file'):
        find(tmp_path / 'three.safetensors')


def test_hub_ids_from_the_cache(hub):
    repo = hub / 'models--someone--lcm-lora-tiny'
    snapshot = repo / 'snapshots' / ('a' * 40)
    snapshot.mkdir(parents=True)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('a' * 40)
    shutil.copy(LORAS['lcm'], snapshot / USUAL)
    file = find('someone/lcm-lora-tiny')
    assert file == snapshot / USUAL and accelerates(file, {})
    with pytest.raises(InputError, match="'someone/other' is no folder or file here"):
        find('someone/other')


@pytest.fixture
def listed(monkeypatch, tmp_path):
    """listed(files) -> what is asked of a hub whose repositories hold these."""

    def snapshot_download(repo, **options):
        asked.update(options)
        for name in options['allow_patterns']:
            shutil.copy(LORAS['lcm'], tmp_path / name)
        return tmp_path

    def listed(files):
        monkeypatch.setattr('huggingface_hub.list_repo_files', lambda repo, **_: files)
        monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
        return asked

    asked = {}
    return listed


def test_several_loras_are_refused_before_any_is_downloaded(listed):
    files = ['README.md', 'a.safetensors', 'b.safetensors', 'old/c.safetensors']
    asked = listed(files)
    with pytest.raises(
        InputError, match=r'o/styles holds a.safetensors, b.safetensors; name one LoRA'
    ):
        find('o/styles')
    listed(files[:1])
    with pytest.raises(InputError, match=r'o/styles holds no \.safetensors file'):
        find('o/styles')
    assert not asked
    listed([*files[:2], files[3], 'adapter_config.json'])
    assert find('o/styles').name == 'a.safetensors'
    assert asked['allow_patterns'] == ['a.safetensors', 'adapter_config.json']


@pytest.mark.parametrize(
    ('file', 'metadata', 'name', 'fast'),
    [
        ('style.safetensors', {}, '', False),
        ('style.safetensors', {'lcm_jax.accelerates': 'true'}, '', True),
        ('LCM_LoRA_SDv15.safetensors', {}, '', True),
        ('style.safetensors', {}, 'my-lcm', True),
        (f'lcm-lora-sdxl/{USUAL}', {}, '', True),
        (f'models--latent-consistency--lcm-lora-sdv1-5/snapshots/1/{USUAL}', {}, '', True),
        (f'models--o--LCM_LoRA-x/snapshots/1/fp16/{USUAL}', {}, '', True),
        (f'models--lcm-lora-fans--style/snapshots/1/{USUAL}', {}, '', False),
        (f'lcm-lora-experiments/watercolor/{USUAL}', {}, '', False),
        (f'style/{USUAL}', {}, '', False),
        ('lcm_lora_runs/style.safetensors', {}, '', False),
    ],
)
def test_which_accelerate(file, metadata, name, fast):
    assert accelerates(f'/somewhere/{file}', metadata, name) == fast
