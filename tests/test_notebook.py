"""The notebook as a document: its copy of utils.py, its order, its claims, figures and tables.

The checks of claims and outputs are tried on small notebooks with a fault, then on the committed
one. Slow tests look at one run of the whole notebook.
"""

import ast
import copy
import json
import math
import os
import re
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from conftest import ROOT, code_cell
from scipy import stats

import utils
from tools import notebook as tool


def one_line(text):
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def bold_sentences(notebook):
    """What stands in bold in the discussions."""
    texts = [cell.source for cell in tool.tagged(notebook, "discussion")]
    return [one_line(bold) for text in texts for bold in re.findall(r"\*\*(.+?)\*\*", text, re.S)]


def claim_sentences(notebook):
    """The keys of `claims |= {...}` in the cells tagged `claims`."""
    sentences = []
    for cell in tool.tagged(notebook, "claims"):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "claims":
                sentences += [one_line(ast.literal_eval(key)) for key in node.value.keys]
    return sentences


def cited(notebook):
    """Every "Figure 3" and "Table A2" of the text; "Figures 3 and 5" are two."""
    text = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    found = re.findall(r"\b(Figure|Table)s?\s+(A?\d+(?:(?:, | and )A?\d+)*)", text)
    return {f"{kind} {n}" for kind, numbers in found for n in re.findall(r"A?\d+", numbers)}


def notebook_of(*cells):
    return nbformat.v4.new_notebook(cells=list(cells))


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        (nbformat.v4.new_output("stream", name="stderr", text="a warning\n"), "stderr: a warning"),
        (nbformat.v4.new_output("error", ename="ValueError", evalue="no"), "with ValueError"),
        (nbformat.v4.new_output("stream", text=f"in {ROOT / 'runs'}"), f"name {ROOT}"),
        (nbformat.v4.new_output("display_data", {"text/html": "/home/ann/x"}), "name /home"),
        (nbformat.v4.new_output("display_data", {"image/svg+xml": "/home/ann"}), "name /home"),
        (nbformat.v4.new_output("stream", text="torch on ann-laptop"), "name ann-laptop"),
    ],
)
def test_an_output_that_must_not_be_published_is_found(output, fault, monkeypatch):
    monkeypatch.setattr(tool.socket, "gethostname", lambda: "ann-laptop")
    faults = tool.notebook_faults(notebook_of(code_cell("f()", outputs=[output], count=1)))
    assert all(text.startswith("cell [1] ") for text in faults)
    assert any(fault in text for text in faults)


@pytest.mark.parametrize("counts", [(2, 1), (1, None), (1, 2)])
def test_cells_not_executed_in_order_are_found_but_an_empty_one_need_not_be(counts):
    first, second = (code_cell("f()", count=count) for count in counts)
    faults = tool.notebook_faults(notebook_of(first, code_cell("", count=None), second))
    out_of_order = ["the cells were not executed once each, in order"]
    assert faults == ([] if counts == (1, 2) else out_of_order)


@pytest.fixture(scope="module")
def committed():
    return tool.read(tool.NOTEBOOK)


@pytest.fixture(scope="module")
def results():
    return json.loads((ROOT / "figures" / "results.json").read_text(encoding="utf-8"))


def test_sync_would_change_nothing(tmp_path):
    """So ids, folding and the metadata that asks Colab for a GPU are as they must be."""
    copy = tmp_path / "again.ipynb"
    copy.write_bytes(tool.NOTEBOOK.read_bytes())
    tool.sync(copy)
    assert copy.read_bytes() == tool.NOTEBOOK.read_bytes(), "run `make sync`"


def test_the_notebook_was_executed_in_order_and_shows_nothing_private(committed):
    assert tool.notebook_faults(committed) == []


def test_every_claim_stands_in_bold_and_every_bold_sentence_is_a_claim(committed):
    assert sorted(claim_sentences(committed)) == sorted(bold_sentences(committed))
    assert claim_sentences(committed)


def test_figures_and_tables_are_in_order_and_cited_and_every_figure_is_saved(committed):
    """Those of the PDF's appendix have numbers of their own: A1, A2, ..."""
    appendix = tool.tagged(committed, "cell-in-appendix")
    body = [cell for cell in committed.cells if cell not in appendix]
    names = []
    for cells, mark in ((body, ""), (appendix, "A")):
        captions = tool.captions(notebook_of(*cells))
        own_names = [caption.partition(". ")[0] for caption in captions]
        for kind in ("Figure", "Table"):
            own_kind = [name for name in own_names if name.startswith(kind)]
            assert own_kind == [f"{kind} {mark}{n + 1}" for n in range(len(own_kind))]
            assert own_kind
        names += own_names
    assert set(names) == cited(committed)
    figures = [name for name in names if name.startswith("Figure")]
    assert len(tool.image_files(ROOT / "figures")) == len(figures) > 5


def evaluated_claims(notebook, results):
    names = {"results": results, "claims": {}, "np": np, "math": math, "stats": stats}
    for cell in tool.tagged(notebook, "claims"):
        exec(cell.source, names)
    return {claim: bool(holds) for claim, holds in names["claims"].items()}


def test_all_claims_hold_in_a_full_run_and_follow_from_its_results(committed, results):
    assert tool.results_faults(results) == []
    assert evaluated_claims(committed, results) == results["claims"]


def test_the_readme_shows_the_answers_of_the_run(committed, results):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tool.readme_with(tool.answers_table(committed), results) == readme


SOURCE = "SIGN = '±'\n" * 500


def run_helper(folder, before=""):
    """What is printed by the helper cell of a utils.py with the text SOURCE, and by a use of it."""
    code = f"{before}\n{tool.helper_cell(SOURCE)}\nimport utils\nprint(utils.SIGN)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        # unbuffered: what is printed and what fails come in their order
        env=os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    return done.stdout


def test_the_helper_cell_writes_utils_once_and_never_overwrites(tmp_path):
    assert run_helper(tmp_path) == "±\n"
    assert (tmp_path / "utils.py").read_text(encoding="utf-8") == SOURCE
    (tmp_path / "utils.py").write_text("SIGN = 1\n", encoding="utf-8")
    printed = run_helper(tmp_path)
    assert "differs from this copy" in printed and printed.endswith("\n1\n")


def test_a_full_disk_leaves_no_half_written_utils(tmp_path):
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
    assert "OSError" in run_helper(tmp_path, before=full)
    assert not (tmp_path / "utils.py").exists()
    assert run_helper(tmp_path) == "±\n"


def test_the_install_cell_the_pdf_and_the_requirements_ask_for_the_same_versions(committed):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {line.partition(" ")[0] for line in lines}
    cell = tool.single_tagged_cell(committed, "install").source
    for package, version in utils.NEEDED_VERSIONS.items():
        assert f"{package}>={version}" in required
        assert f'"{package}>={version}"' in cell


FAKE_COLAB = {
    "__init__.py": "",
    "drive.py": "def mount(path): print('mounted', path)\n",
    "files.py": "def download(path): print('offered', path)\n",
    "_message.py": "import json\n"
    "def blocking_request(*_, **__):\n"
    "    with open('assignment3.ipynb', encoding='utf-8') as file:\n"
    "        return {'ipynb': json.load(file)}\n",
}
COLAB_SHELL = """
shell = get_ipython()
shell.__class__ = type("Shell", (type(shell),), {"__module__": "google.colab._shell"})
"""


def run_in_colab(folder):
    """Run the notebook in a folder with nothing but offline/, in a pretended Colab."""
    (folder / "google" / "colab").mkdir(parents=True)
    for name, text in FAKE_COLAB.items():
        (folder / "google" / "colab" / name).write_text(text, encoding="utf-8")
    (folder / "offline").symlink_to(ROOT / "offline")
    notebook = tool.clear_outputs(tool.read(tool.NOTEBOOK))
    notebook.cells.insert(0, code_cell(COLAB_SHELL, "hide-pdf"))
    for cell in tool.code_cells(notebook):  # a user who turns both switches on
        cell.source = cell.source.replace("KEEP_ON_DRIVE = False", "KEEP_ON_DRIVE = True")
        cell.source = cell.source.replace("/content/drive/MyDrive", str(folder / "drive"))
        cell.source = cell.source.replace("MAKE_PDF = False", "MAKE_PDF = True")
    nbformat.write(notebook, folder / "assignment3.ipynb")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", folder]
    command += ["--nbmake", "--overwrite", "--nbmake-kernel=python3", "--nbmake-timeout=900"]
    done = subprocess.run(
        [*command, "assignment3.ipynb"],
        cwd=folder,
        env=os.environ | {"A3_PROFILE": "tiny"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return tool.read(folder / "assignment3.ipynb")


@pytest.mark.slow
def test_the_notebook_runs_alone_in_colab_and_keeps_all_on_the_drive(tmp_path):
    folder = tmp_path / "été 1"
    done = run_in_colab(folder)
    assert [fault for fault in tool.notebook_faults(done) if "local name" not in fault] == []
    outputs = [output for cell in tool.code_cells(done) for output in cell.outputs]
    printed = "".join(text for output in outputs for text in tool.texts_of(output))
    assert "mounted" in printed and "offered" in printed and "\r" not in printed
    assert (folder / "utils.py").read_bytes() == (ROOT / "utils.py").read_bytes()
    assert (folder / "assignment3.pdf").read_bytes().startswith(b"%PDF")
    assert tool.answers_table(done)
    runs = folder / "drive" / "assignment3" / "runs"
    assert list(runs.rglob("*.pt"))
    figures = [caption for caption in tool.captions(done) if caption.startswith("Figure")]
    files = [path for path in (runs / "figures").iterdir() if path.suffix != ".json"]
    assert len(files) == len(figures)
    results = json.loads((runs / "figures" / "results.json").read_text(encoding="utf-8"))
    assert results["profile"] == "tiny" and results["run"]["resumed"] is False
    assert results["dynamics"]["matrix_by_autograd"]
    assert results["dynamics"]["closed_form_error"] < 1e-12
    assert sorted(map(one_line, results["claims"])) == sorted(claim_sentences(done))
    for data in results["data"].values():  # a stand-in is never called by the real name
        assert data["real"] is False and data["name"] not in {"MNIST", "SVHN"}


@pytest.mark.parametrize(
    ("place", "value", "beginning"),
    [  # just outside of what the words allow
        ("single_task/handwritten/test_acc", 99.5, "The baselines classify 99.3 %"),
        ("single_task/street/test_acc", 93.5, "The baselines classify 99.3 %"),
        ("multi_task/street/test_acc", 95.7, "The selected two-head and single-task models"),
        ("joint_embedding/neighbors_of_other_set/trained", 30, "only a quarter of the ten nearest"),
    ],
)
def test_a_claim_fails_on_numbers_that_its_words_do_not_allow(
    committed, results, place, value, beginning
):
    results = copy.deepcopy(results)
    part, role, name = place.split("/")
    results[part][role][name] = value
    judged = evaluated_claims(committed, results)
    (holds,) = [holds for claim, holds in judged.items() if claim.startswith(beginning)]
    assert not holds


def test_the_answers_of_e_are_those_of_the_chosen_seed(results):
    joint = results["joint_embedding"]
    for name, key in (("top1_100", "100"), ("top1_all", "all"), ("reverse_top1", "reverse")):
        assert joint[name] in joint["per_seed"][key]


def test_the_differences_in_the_tables_are_those_of_the_runs_accuracies(committed, results, nb):
    shown = set()
    for cell in tool.code_cells(committed):
        for output in cell.outputs:
            shown |= {text for row in tool.table_rows(output) for text in row}
    expected = []
    for role in ("handwritten", "street"):
        two_heads = results["multi_task"][role]["per_seed"]
        single = results["single_task"][role]["per_seed"]
        expected.append(nb.unpaired_difference(two_heads, single))
    for models in results["few_samples"]["test_acc"].values():
        pairs = zip(models["two heads"], models["single task"], strict=True)
        expected += [nb.paired_difference(shared, alone) for shared, alone in pairs]
    assert len(expected) == 12
    assert {text.replace("-", "−") for text in expected} <= shown
