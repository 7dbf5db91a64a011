"""The README's and the documents' code runs, and their commands are ones that `cprec` takes."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cprec_recbole.cli import _parser, recbole_options

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# RecBole reads the command line, so the README's code is run as it stands, but for its cost
CHEAP = ["--epochs=1", "--MAX_ITEM_LIST_LENGTH=5", "--block_num=1", "--n_layers=1", "--state=ERROR"]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readmes_python_runs(tmp_path):
    code = "\n".join(blocks(ROOT / "README.md", "python"))
    assert "compress(model" in code
    script = tmp_path / "readme.py"
    # a trained SASRec where the README expects one
    script.write_text(
        "from pathlib import Path\nimport cprec_recbole\n"
        "cprec_recbole.run_recbole(model='SASRec', dataset='ml-100k')\n"
        "next(Path('saved').glob('SASRec-*.pth')).rename('saved/SASRec.pth')\n" + code
    )
    done = subprocess.run(
        [sys.executable, str(script), *CHEAP],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_ones_that_cprec_takes(path):
    for block in blocks(path, "(?:sh|console|bash)"):
        for line in block.splitlines():
            if line.startswith("cprec "):
                _, rest = _parser().parse_known_args(shlex.split(line, comments=True)[1:])
                assert isinstance(recbole_options(rest), dict)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link
