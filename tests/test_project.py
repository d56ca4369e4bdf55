"""The project as a whole: one file is enough, the notebook is in order, nothing private leaks."""

import ast
import json
import os
import re
import subprocess
import sys

import nbformat
import notebook as tool
import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "assignment3.ipynb"


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_notebook_carries_the_utils_it_is_committed_with(committed):
    cell = tool.tagged(committed, "helper-module")
    source = (ROOT / "utils.py").read_text()
    assert cell.source == tool.helper_cell(source), "run `make sync`"
    values = [
        node.value.value
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "UTILS"
    ]
    assert values == [source]


def test_helper_cell_writes_once_and_never_overwrites(committed, tmp_path, monkeypatch, capsys):
    source = tool.tagged(committed, "helper-module").source
    monkeypatch.chdir(tmp_path)
    exec(source, {})
    assert (tmp_path / "utils.py").read_text() == (ROOT / "utils.py").read_text()
    (tmp_path / "utils.py").write_text("mine = 1\n")
    exec(source, {})
    assert (tmp_path / "utils.py").read_text() == "mine = 1\n"
    assert "differs" in capsys.readouterr().out


def test_helper_text_that_cannot_be_quoted_is_refused():
    with pytest.raises(ValueError, match="utils.py"):
        tool.helper_cell("x = " + "'" * 3)


def test_notebook_is_valid_small_and_reads_without_widgets(committed):
    nbformat.validate(committed)
    assert NOTEBOOK.stat().st_size < 5 * 2**20
    assert "widgets" not in committed.metadata
    for cell in committed.cells:
        for output in cell.get("outputs", []):
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def test_notebook_is_executed_in_order_without_error_or_warning(committed):
    cells = [c for c in committed.cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs)


def test_nothing_private_is_in_the_notebook(committed):
    home = re.compile(r"(/root/|/home/\w+|/work/|/tmp/|/Users/\w+|[A-Z]:\\Users)")
    for number, cell in enumerate(committed.cells):
        for output in cell.get("outputs", []):
            text = json.dumps({k: v for k, v in output.get("data", {}).items() if k[:5] == "text/"})
            found = home.search(text + output.get("text", ""))
            assert not found, f"cell {number} shows a local path: {found[0]}"


def test_committed_results_are_those_of_the_notebook(committed):
    path = ROOT / "figures" / "results.json"
    results = json.loads(path.read_text())
    shown = json.dumps([cell.get("outputs", []) for cell in committed.cells])
    sys.path.insert(0, str(ROOT))
    import utils

    assert results["profile"] == "full"
    for name, value in utils.results_rows(results):
        assert f"| {name} | {value} |" in shown, name
    for row in utils.summary(results)[1]:
        assert json.dumps("| " + " | ".join(row) + " |")[1:-1] in shown, row


def test_readme_shows_the_committed_results():
    text = (ROOT / "README.md").read_text()
    table = tool.readme_table(ROOT / "figures" / "results.json")
    assert table in text, "run `make readme`"


def smoke(folder):
    """Run the folder's notebook from a fresh kernel, tiny, away from the repository."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("A3_") and name != "PYTHONPATH"
    }
    environment |= {"A3_PROFILE": "tiny", "OMP_NUM_THREADS": "1"}
    code = (
        "import nbclient, nbformat\n"
        "nb = nbformat.read('assignment3.ipynb', as_version=4)\n"
        "nbclient.NotebookClient(nb, timeout=600, kernel_name='python3').execute()\n"
        "nbformat.write(nb, 'done.ipynb')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(folder / "done.ipynb", as_version=4)


def measured(folder):
    """The results of the run in `folder`, without what a clock measured."""
    (path,) = folder.rglob("results.json")
    results = json.loads(path.read_text())
    del results["seconds"]
    return results


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The notebook, run as the only file of a folder."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "assignment3.ipynb").write_bytes(NOTEBOOK.read_bytes())
    return folder, smoke(folder)


@pytest.mark.slow
def test_one_file_alone_in_a_folder_runs(alone):
    folder, done = alone
    assert (folder / "utils.py").read_text() == (ROOT / "utils.py").read_text()
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    assert not [o["text"] for o in outputs if o.get("name") == "stderr"]
    assert measured(folder)["profile"] == "tiny"


@pytest.mark.slow
def test_runs_where_google_colab_is_and_gives_the_same_numbers(alone, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:  # a user who turns both Colab switches on
        cell.source = cell.source.replace("KEEP_ON_DRIVE = False", "KEEP_ON_DRIVE = True")
        cell.source = cell.source.replace("/content/drive/MyDrive", str(tmp_path / "drive"))
        cell.source = cell.source.replace("MAKE_PDF = False", "MAKE_PDF = True")
    nbformat.write(notebook, tmp_path / "assignment3.ipynb")
    package = tmp_path / "google" / "colab"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "drive.py").write_text("def mount(path): print('mounted', path)\n")
    (package / "files.py").write_text("def download(path): print('offered', path)\n")
    done = smoke(tmp_path)
    text = json.dumps([cell.get("outputs", []) for cell in done.cells])
    assert "mounted" in text and "offered" in text
    assert list((tmp_path / "drive").rglob("*.pt")) and list(tmp_path.glob("*.pdf"))
    # Two fresh processes, the same seeds: the same numbers, every one.
    assert measured(tmp_path) == measured(alone[0])
