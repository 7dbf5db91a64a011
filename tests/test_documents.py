"""The README's and the documents' code runs, and their commands are ones that `cprec` takes."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model

from cprec_recbole import compress, load_pretrained, recover
from cprec_recbole.commands.cli import _parser, recbole_options
from cprec_recbole.host.library import recbole_config
from cprec_recbole.models import MODELS
from tests.studies import grid, study_of

ROOT = Path(__file__).parent.parent
PAGES = [p for p in sorted((ROOT / "docs").glob("*.md")) if "```python" in p.read_text("utf-8")]
FEW_USERS = "[0,60]"  # of MovieLens-100K, by their interactions
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# RecBole reads the command line, so the README's code is run as it stands, but for its cost
CHEAP = ["--epochs=1", "--MAX_ITEM_LIST_LENGTH=5", "--block_num=1", "--n_layers=1", "--state=ERROR"]
CHEAP.append(f"--user_inter_num_interval={FEW_USERS}")


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_the_readmes_python_runs(tmp_path):
    code = "\n".join(blocks(ROOT / "README.md", "python"))
    assert "compress(model" in code
    script = tmp_path / "readme.py"
    # trained models where the README expects them
    script.write_text(
        "from pathlib import Path\nimport cprec_recbole\n"
        "for name in ('SASRec', 'CpSASRec'):\n"
        "    cprec_recbole.run_recbole(model=name, dataset='ml-100k')\n"
        "    folder = Path('runs') / name.lower()\n"
        "    folder.mkdir(parents=True)\n"
        "    next(Path('saved').glob(f'{name}-*.pth')).rename(folder / 'best.pth')\n" + code
    )
    done = subprocess.run(
        [sys.executable, str(script), *CHEAP],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def at_hand(tmp_path_factory):
    """What a page takes for granted: a RecBole model, its data, a small one, a study."""
    folder = tmp_path_factory.mktemp("documents")
    options = {"hidden_size": 16, "inner_size": 16, "n_layers": 1, "state": "ERROR"}
    options |= {"MAX_ITEM_LIST_LENGTH": 5, "user_inter_num_interval": FEW_USERS}
    config = recbole_config("SASRec", "ml-100k", options)
    train_data, valid_data, _ = data_preparation(config, create_dataset(config))
    model = get_model("SASRec")(config, train_data._dataset)
    small = compress(model, ranks=[16, 4, 1])
    small.save_pretrained(folder / "small")
    study_of(folder / "study", grid(seeds=(2020,), ratios=(4.0,)))
    return folder, {"model": model, "train_data": train_data, "valid_data": valid_data}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_pages_python_runs(path, at_hand, monkeypatch, capsys):
    folder, names = at_hand
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["page", *CHEAP])
    names = {**names, "__name__": "page", "compress": compress, "recover": recover}
    if path.name == "search.md":  # its model is one that has been compressed
        names["model"] = load_pretrained(folder / "small")
    known = list(MODELS)
    try:
        exec(compile("\n".join(blocks(path, "python")), str(path), "exec"), names)
    finally:
        MODELS[:] = known
    capsys.readouterr()


@pytest.mark.parametrize("name", ["partition", "tree", "sharing"])
def test_the_pictures_are_those_of_the_script(name):
    drawn = runpy.run_path(str(ROOT / "docs" / "pictures.py"))[name]()
    assert drawn == (ROOT / "docs" / f"{name}.svg").read_text(encoding="utf-8")


def test_the_site_builds_and_asks_nothing_of_a_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= set(pages)
    for name, page in pages.items():
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]*\bsrc=[\"']?(\S+)", page)
        fetched += re.findall(r"<link[^>]*\bhref=[\"']?([^\s\"'>]+)", page)
        assert not [link for link in fetched if re.match(r"[\"']?(https?:)?//", link)], name
    assert "<math" in pages["method.html"]
    assert "arithmatex" not in pages["method.html"]
    assert "cross_block" in pages["reference.html"]


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
