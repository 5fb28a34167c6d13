"""Models of the Hugging Face hub, through its client's cache."""

import re
from pathlib import Path

from lcm_jax.errors import InputError, first_line

ID = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?')  # OWNER/NAME or OWNER/NAME@REVISION


def download(name, needed):
    """A hub id -> the folder of its snapshot in the cache, with the files that `needed` names.

    needed: all file names of the repository -> those wanted, or patterns of them. Offline, or with
    HF_HUB_OFFLINE=1, what the cache holds is taken. Raises InputError if there is no such model, and
    before the download what `needed` raises.
    """
    import huggingface_hub as hf  # a second to import: only for models of the hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    repo, _, revision = name.partition('@')
    options = {'revision': revision or None}
    try:
        try:
            names = hf.list_repo_files(repo, **options)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:  # no network, in any of its ways to fail
            options['local_files_only'] = True
        else:
            options['allow_patterns'] = list(needed(names))
        return Path(hf.snapshot_download(repo, **options))
    except InputError:  # of `needed`
        raise
    except Exception as e:  # the client raises many types, of its own and of its transport
        raise InputError(
            f'{name!r} is no folder or file here, and the hub does not give it: {first_line(e)}'
        ) from e
