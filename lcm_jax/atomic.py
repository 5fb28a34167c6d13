"""Files that appear whole or not at all, whatever ends the program."""

import contextlib
import json
import os
import uuid
from pathlib import Path


@contextlib.contextmanager
def whole(file):
    """The path to write to, of the same suffix: it becomes `file` at the end, or goes after an error."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f'.part-{uuid.uuid4().hex[:8]}-{file.name}')
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_json(file, value):
    """A JSON file of the value."""
    with whole(file) as part:
        part.write_text(json.dumps(value, indent=1) + '\n', encoding='utf-8')
