"""Describe what lies outside the pipeline, teacher and text, in files that DVC can follow.

DVC follows paths inside the project. It cannot follow what a pattern matches, a folder elsewhere, a
revision on the hub, or the running Python's library. Under DVC, stages/inputs.py therefore runs
each time and writes the hashes of all these to paths.inputs. `fetch` and `corpus` depend on the two
files, which stay as they are, byte for byte, as long as nothing has changed. It is a stage of its
own because DVC copies the links that make up a stage's output before it runs the stage: a corpus of
gigabytes must not be copied only to find that it is up to date.
"""

from __future__ import annotations

from pipeline.config.params import Params
from pipeline.data.text_hashes import text_made_from
from pipeline.io.files import read_json_object, write_json
from pipeline.io.hashes import SEEN_TEACHER, SEEN_TEXT
from pipeline.runtime.console import announce
from pipeline.teacher.teacher_hashes import teacher_made_from

TEACHER, TEXT = "teacher.json", "text.json"


def write_inputs(params: Params) -> list[str]:
    """Write both files; return the names of those that have changed.

    A source that has gone since is taken to be as it was: on a machine that has only what was made
    from it, none of it can have changed.

    Raises:
        DecantError: a source is not there and never was, or cannot be reached.
    """
    folder = params.paths.inputs
    announce(
        "inputs",
        f"hashes what teacher.source={params.teacher.source} and {params.corpus.named} name, "
        "as far as it has changed",
    )
    before = {name: read_json_object(folder / name) for name in (TEACHER, TEXT)}
    now = {
        TEACHER: teacher_made_from(params.teacher, before[TEACHER], folder / SEEN_TEACHER),
        TEXT: text_made_from(params.corpus, before[TEXT], folder / SEEN_TEXT),
    }
    changed = [name for name in now if now[name] != before[name]]
    for name in changed:
        write_json(folder / name, now[name])
    return changed
