"""The project as a whole: the notebook in order, one file enough, nothing private, text computed.

One slow test runs the whole notebook on tiny data where Colab is pretended, warnings are errors,
and the folder holds nothing but the notebook and offline/; the others look at what it left.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import notebook as tool
import pytest
from conftest import ROOT, RUNS

NOTEBOOK = ROOT / "assignment3.ipynb"


def read(path):
    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)


@pytest.fixture(scope="module")
def committed():
    return read(NOTEBOOK)


def tags(cell):
    return cell.metadata.get("tags", [])


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook):
    return [output for cell in code_cells(notebook) for output in cell.get("outputs", [])]


def caption(output):
    """The caption of a figure's output, else nothing."""
    return output.get("metadata", {}).get("caption", "")


# ---- the committed notebook ----


def test_notebook_carries_the_utils_it_is_committed_with(committed):
    source = (ROOT / "utils.py").read_text(encoding="utf-8")
    cell = tool.tagged(committed, "helper-module")
    assert cell.source == tool.helper_cell(source), "run `make sync`"
    values = [
        node.value.value
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "UTILS"
    ]
    assert values == [source]
    with pytest.raises(ValueError, match="utils.py"):
        tool.helper_cell("x = " + "'" * 3)


def test_sizes(committed):
    text = (ROOT / "utils.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 1_100 and len(text.encode()) <= 45 * 1024
    assert len(committed.cells) <= 90 and NOTEBOOK.stat().st_size < 5 * 2**20


def test_notebook_is_valid_folded_and_asks_colab_for_a_gpu(committed, tmp_path):
    nbformat.validate(committed)
    assert committed.metadata.accelerator == "GPU" and committed.metadata.colab.gpuType == "T4"
    assert committed.metadata.kernelspec.name == "python3" and "widgets" not in committed.metadata
    for cell in code_cells(committed):
        folded = cell.metadata.get("cellView") == "form"
        assert folded == cell.source.startswith("# @title")
        assert folded == cell.metadata.get("jupyter", {}).get("source_hidden", False)
        if {"appendix", "hide-code", "helper-module"} & set(tags(cell)):
            assert folded, cell.source[:60]
        for output in cell.get("outputs", []):
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
    for tag in ("helper-module", "install", "submission", "front-page", "export"):
        tool.tagged(committed, tag)
    tool.save(read(NOTEBOOK), tmp_path / "again.ipynb")  # what `make sync` writes is what is there
    assert (tmp_path / "again.ipynb").read_bytes() == NOTEBOOK.read_bytes()


def test_notebook_is_executed_in_order_without_error_or_warning(committed):
    cells = code_cells(committed)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    outputs = outputs_of(committed)
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "image/svg+xml", "text/markdown"} <= kinds


PRIVATE = re.compile(
    r"(/root/|/home/\w+|/work/|/tmp/|/Users/\w+|[A-Z]:\\\\?Users|hf_[A-Za-z0-9]{20}|gh[pousr]_\w{20}"
    r"|AKIA[A-Z0-9]{12}|Bearer [\w.-]{16}|-----BEGIN|[\w.]+@[\w-]+\.(?:com|org|edu|ca|net))"
)


def test_nothing_private_is_in_the_notebook(committed):
    for number, cell in enumerate(committed.cells):
        outputs = [
            {"text": o.get("text"), "data": {k: v for k, v in o.get("data", {}).items()
                                             if not k.startswith("image/png")}}
            for o in cell.get("outputs", [])
        ]  # fmt: skip
        found = PRIVATE.search(json.dumps(outputs))
        assert not found, f"cell {number} shows {found[0]}"
        if cell.cell_type == "code" and "helper-module" not in tags(cell):
            assert not PRIVATE.search(cell.source), f"cell {number}"


def test_committed_results_are_those_of_the_notebook_and_of_the_readme(committed):
    results = json.loads((ROOT / "figures" / "results.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results["profile"] == "full"
    assert results["run"]["resumed"] is False and "in one piece" in readme
    glance = tool.table(committed)
    assert glance in readme
    for role, data in results["data"].items():
        assert data["name"].split(" (")[0] in glance and f"{data['name']}: " in readme
        for part in ("single_task", "multi_task"):
            for key in ("test_acc", "suggested_test_acc"):
                assert f"{results[part][role][key]:.2f}" in glance
    captions = list(filter(None, map(caption, outputs_of(committed))))
    numbers = [int(re.match(r"Figure (\d+)\. ", caption)[1]) for caption in captions]
    assert numbers == list(range(1, len(numbers) + 1))
    saved = {p.stem for p in (ROOT / "figures").iterdir() if p.suffix in (".png", ".svg")}
    assert len(saved) == len(numbers)


# ---- text that is true of any run ----

NUMBER = re.compile(r"(?<![\w.-])\d+(?:\.\d+| ?%|,\d{3})")
SETTINGS = {  # decimals, percentages and thousands that are choices of ours, or mathematics
    "0.05", "0.1", "0.2", "0.45", "0.5", "0.8", "95 %", "70 %", "90 %", "1,000", "2,000",
    "10,000", "20,000", "2,400", "1.39", "0.06", "0.4", "0.01",
}  # fmt: skip


def without_links(text):
    return re.sub(r"\]\([^)]*\)", "]", text)


def test_no_markdown_cell_holds_a_number_that_a_run_makes(committed):
    for number, cell in enumerate(committed.cells):
        if cell.cell_type == "markdown" and not cell.source.startswith("## References"):
            found = set(NUMBER.findall(without_links(cell.source))) - SETTINGS
            assert not found, f"cell {number} holds {found}; make the sentence with utils.say"


def strings(source):
    """Every string of a cell's code but docstrings, and bare numbers (colors of Matplotlib)."""
    tree, docstrings = ast.parse(source), set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            docstrings.add(id(body[0].value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings and not re.fullmatch(r"[\d.]+", node.value):
                yield node.value


def test_no_text_of_a_code_cell_holds_a_number_that_a_run_makes(committed):
    """Sentences, captions and tables take their numbers from the run, by f-strings."""
    for number, cell in enumerate(committed.cells):
        if cell.cell_type == "code" and "helper-module" not in tags(cell):
            for text in strings(cell.source):
                found = set(NUMBER.findall(text)) - SETTINGS
                assert not found, f"cell {number}: {found} in {text!r}"


COMPARING = re.compile(
    r"\b(better|worse|higher|lower|faster|slower|outperform\w*|beats?|gains?|loses?|improves?|"
    r"more accurate|less accurate|best|worst) (than|by|of the)\b|"
    r"\b(we|I) (see|observe|found|find) that\b|as expected"
)


def test_no_markdown_cell_states_how_a_run_came_out(committed):
    for number, cell in enumerate(committed.cells):
        if cell.cell_type == "markdown":
            found = COMPARING.search(cell.source)
            assert not found, f"cell {number}: {found[0]!r}"


OLD_WORDS = re.compile(
    r"\b(pictures?|towers?|judges?|entrances?|colou?rs? of speech|colour\w*|grey\w*|neighbour\w*|"
    r"normalis\w*|centre\w*|optimis(?:e[drs]?|ing|ation)|islands?|by a hair|honest\w*)\b",
    re.IGNORECASE,
)  # fmt: skip


def test_words_are_the_standard_american_ones(committed):
    texts = {f"cell {n}": c.source for n, c in enumerate(committed.cells)}
    texts |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "utils.py")}
    for where, text in texts.items():
        found = OLD_WORDS.search(text)
        assert not found, f"{where}: {found[0]!r}"


# ---- the helper and install cells, in a fresh interpreter ----


def python(code, folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | environment,
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip


def helper(committed, folder, after="", before=""):
    (folder / "cell.py").write_text(
        tool.tagged(committed, "helper-module").source, encoding="utf-8"
    )
    run = "exec(open('cell.py', encoding='utf-8').read())"
    return python(f"{before}\n{run}\n{after}", folder)


def test_helper_cell_writes_once_and_never_overwrites(committed, tmp_path):
    assert helper(committed, tmp_path).stdout == ""
    text = (tmp_path / "utils.py").read_text(encoding="utf-8")
    assert text == (ROOT / "utils.py").read_text(encoding="utf-8")
    crlf = text.replace("\n", "\r\n").encode()
    (tmp_path / "utils.py").write_bytes(crlf)  # a checkout with Windows's line ends is no change
    assert helper(committed, tmp_path).stdout == ""
    (tmp_path / "utils.py").write_text("mine = 1\n", encoding="utf-8")
    done = helper(committed, tmp_path, after="import utils; print(utils.mine)")
    assert "differs" in done.stdout and done.stdout.endswith("1\n")
    assert (tmp_path / "utils.py").read_text(encoding="utf-8") == "mine = 1\n"


@pytest.mark.parametrize("case", ["package beside", "loaded before"])
def test_a_foreign_utils_is_named(committed, tmp_path, case):
    if case == "package beside":
        foreign = tmp_path / "utils" / "__init__.py"
        before = ""
    else:
        foreign = tmp_path / "elsewhere" / "utils.py"
        before = f"import sys; sys.path.insert(0, {str(foreign.parent)!r}); import utils"
    foreign.parent.mkdir()
    foreign.write_text("x = 1\n", encoding="utf-8")
    done = helper(committed, tmp_path, before=before)
    assert done.returncode and "ImportError" in done.stderr and str(foreign) in done.stderr
    assert "restart" in done.stderr


def test_another_utils_earlier_on_the_path_does_not_matter(committed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "utils.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "utils.py").write_text("ours = 5\n", encoding="utf-8")
    before = f"import sys; sys.path.insert(0, {str(tmp_path / 'elsewhere')!r})"
    done = helper(committed, tmp_path, before=before, after="import utils; print(utils.ours)")
    assert done.stdout.endswith("5\n"), done.stderr


def test_a_pip_that_fails_does_not_stop_the_run(committed, tmp_path):
    source = tool.tagged(committed, "install").source
    assert '"typst": "typst"' in source
    missing = source.replace('"typst": "typst"', '"no_such_module_a3": "no-such-package-a3"')
    (tmp_path / "cell.py").write_text("import sys\n" + missing + "\nprint('went on')")
    done = python("exec(open('cell.py').read())", tmp_path, PIP_NO_INDEX="1")
    assert done.returncode == 0 and done.stdout.endswith("went on\n") and not done.stderr
    assert "no-such-package-a3" in done.stdout


def test_the_install_cell_knows_what_is_imported(committed):
    """Every package of ours is in the install cell, so that Colab or a bare Jupyter gets it."""
    source = tool.tagged(committed, "install").source
    text = (ROOT / "utils.py").read_text(encoding="utf-8")
    text += "".join("\n" + c.source for c in code_cells(committed) if "install" not in tags(c))
    known = {"torch", "numpy", "matplotlib", "google", "utils"}
    known |= {"nbformat", "bs4", "joblib", "PIL", "IPython"}  # these come with others
    for name in imported(text) - known:
        assert f'"{name}":' in source, f"{name} is imported and not among PACKAGES"


# ---- the project ----


def imported(source):
    """Top modules of all imports of a text, standard library left out."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names


INSTALLED_AS = {"sklearn": "scikit-learn", "PIL": "", "bs4": "", "IPython": "",
                "pypandoc": "pypandoc-binary", "google": "", "nbclient": ""}  # fmt: skip
TOOLS = {"ipykernel", "papermill", "pytest", "nbmake", "ruff"}  # used by name, not by import


def test_requirements_are_what_is_imported(committed):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {
        re.match(r"[\w-]+", line)[0].replace("_", "-") for line in lines if line[:1].isalpha()
    }
    sources = [p.read_text(encoding="utf-8") for p in ROOT.glob("*.py")]
    for folder in ("tests", "tools", "offline"):
        sources += [p.read_text(encoding="utf-8") for p in (ROOT / folder).glob("*.py")]
    sources += [c.source for c in code_cells(committed)]
    names = set().union(*(imported(source) for source in sources))
    ours = {p.stem for folder in (".", "tests", "tools", "offline")
            for p in (ROOT / folder).glob("*.py")} | {"utils", "offline"}  # fmt: skip
    needed = {INSTALLED_AS.get(name, name.replace("_", "-")) for name in names - ours} - {""}
    text = " ".join(p.read_text(encoding="utf-8") for p in ROOT.glob("*.py"))
    # nbformat comes with nbconvert; what is imported by name stands in utils.py as text.
    assert needed - required <= {"nbformat"}
    idle = required - needed - TOOLS
    used = text.replace("_", "-")
    assert {name for name in idle if name.removesuffix("-binary") not in used} == set()


def test_make_targets_and_ci(tmp_path):
    def dry(target):
        return subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    for target in ("all", "run", "pdf", "results", "fast-test", "lint", "format", "sync",
                   "publish", "bench", "clean"):  # fmt: skip
        assert dry(target)
    assert "--nbmake" in dry("test") and "A3_PROFILE=tiny" in dry("test")
    assert "--nbmake-kernel=python3" in dry("test")  # whatever kernel a user's file names
    script = (ROOT / ".ci" / "run").read_bytes()
    assert b"make test" in script and b"\r" not in script


def test_a_checkout_has_unix_line_ends_and_a_run_leaves_no_trace():
    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout

    if git("rev-parse", "--is-inside-work-tree").strip() != "true":
        pytest.skip("not a git checkout")
    for name in (".ci/run", "Makefile", "utils.py", "assignment3.ipynb"):
        assert git("check-attr", "eol", name).strip().endswith("eol: lf")
    for name in ("build/x", "runs/x", "data/x", ".venv/x", "__pycache__/x", ".pytest_cache/x"):
        assert git("check-ignore", name), name


def test_code_is_linted_and_formatted():
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_sync_works_in_a_c_locale(tmp_path):
    for name in ("utils.py", "assignment3.ipynb", "tools/notebook.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    notebook = read(tmp_path / "assignment3.ipynb")
    tool.tagged(notebook, "helper-module").source = "# @title stale"
    tool.save(notebook, tmp_path / "assignment3.ipynb")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "tools/notebook.py", "sync"], cwd=tmp_path, env=os.environ | plain,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    synced = tool.tagged(read(tmp_path / "assignment3.ipynb"), "helper-module").source
    assert synced == tool.helper_cell((ROOT / "utils.py").read_text(encoding="utf-8"))


def test_every_file_is_opened_as_utf_8():
    """No read or write of text depends on the locale."""
    calls = re.compile(r"\.(?:read_text|write_text)\((?![^()]*(?:\([^()]*\)[^()]*)*encoding=)")
    paths = [ROOT / "utils.py", *(ROOT / "tools").glob("*.py"), *(ROOT / "offline").glob("*.py")]
    for path in paths:
        found = calls.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found[0]}"


def executed_notebook(*extra):
    text = {"text/markdown": "| a | b |\n| - | - |\n| 1 | 2 |"}
    table = nbformat.v4.new_output("display_data", text)
    cells = [nbformat.v4.new_code_cell("# @title x\n1", metadata={"tags": ["front-page"]})]
    cells[0].outputs = [nbformat.v4.new_output("display_data", {"text/plain": ""}), table, *extra]
    return nbformat.v4.new_notebook(cells=cells)


def test_publish_copies_a_run_and_nothing_else_does(tmp_path, monkeypatch):
    marks = "before\n" + tool.MARKS[0] + "\nold\n" + tool.MARKS[1] + "\nafter ±\n"
    (tmp_path / "README.md").write_text(marks, encoding="utf-8")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "stale.png").touch()
    run = tmp_path / "build" / "assignment3.ipynb"
    figures = run.parent / "runs" / "figures"
    figures.mkdir(parents=True)
    (figures / "new.svg").write_text("<svg/>", encoding="utf-8")
    results = {"data": {"a": {"name": "MNIST", "train": 60000, "test": 10000}},
               "machine": "2 cores",
               "run": {"wall_seconds": 600, "resumed": False, "cores": 2, "jobs": 2}}  # fmt: skip
    (figures / "results.json").write_text(json.dumps(results), encoding="utf-8")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "NOTEBOOK", tmp_path / "assignment3.ipynb")
    monkeypatch.delenv("A3_RUNS")
    stderr = nbformat.v4.new_output("stream", name="stderr", text="a warning")
    nbformat.write(executed_notebook(stderr), run)
    with pytest.raises(SystemExit, match="stderr"):
        tool.publish(run)
    assert (tmp_path / "figures" / "stale.png").exists()
    nbformat.write(executed_notebook(), run)
    tool.publish(run)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| 1 | 2 |" in text and "MNIST: 60,000 training" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after ±\n")
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"new.svg", "results.json"}
    outputs = read(tmp_path / "assignment3.ipynb").cells[0].outputs
    assert len(outputs) == 1 and read(tmp_path / "assignment3.ipynb").cells[0].execution_count == 1


# ---- one run of the whole notebook ----

COLAB = {
    "__init__.py": "",
    "drive.py": "def mount(path): print('mounted', path)\n",
    "files.py": "def download(path): print('offered', path)\n",
    "_message.py": "import json\ndef blocking_request(*_, **__):\n"
    "    with open('assignment3.ipynb', encoding='utf-8') as file:\n"
    "        return {'ipynb': json.load(file)}\n",
}
RUN = """
import nbclient, nbformat
nb = nbformat.read("assignment3.ipynb", as_version=4)
client = nbclient.NotebookClient(nb, timeout=600, kernel_name="python3")
try:
    client.execute()
finally:
    nbformat.write(nb, "done.ipynb")
"""


@pytest.fixture(scope="module")
def colab_run(tmp_path_factory):
    """A folder with only the notebook and offline/, in a pretended Colab; warnings are errors."""
    folder = tmp_path_factory.mktemp("colab")
    notebook = read(NOTEBOOK)
    for cell in notebook.cells:  # a user who turns both switches on
        cell.source = cell.source.replace("KEEP_ON_DRIVE = False", "KEEP_ON_DRIVE = True")
        cell.source = cell.source.replace("/content/drive/MyDrive", str(folder / "drive"))
        cell.source = cell.source.replace("MAKE_PDF = False", "MAKE_PDF = True")
        if cell.cell_type == "code":
            cell.outputs = []
    nbformat.write(notebook, folder / "assignment3.ipynb")
    (folder / "offline").symlink_to(ROOT / "offline")
    (folder / "google" / "colab").mkdir(parents=True)
    for name, text in COLAB.items():
        (folder / "google" / "colab" / name).write_text(text, encoding="utf-8")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("A3_") and name != "PYTHONPATH"
    }
    environment |= {"A3_PROFILE": "tiny", "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", RUN], cwd=folder, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, read(folder / "done.ipynb")


def results_of(path):
    """The results of a run, without what a clock measured and where it ran."""
    results = json.loads(path.read_text(encoding="utf-8"))
    for name in ("seconds", "run", "machine"):
        results.pop(name)
    return results


@pytest.mark.slow
def test_the_notebook_runs_alone_in_colab(colab_run):
    folder, done = colab_run
    assert (folder / "utils.py").read_bytes() == (ROOT / "utils.py").read_bytes()
    assert not [o["text"] for o in outputs_of(done) if o.get("name") == "stderr"]
    printed = json.dumps([o.get("text", "") for o in outputs_of(done)])
    assert "mounted" in printed and "offered" in printed
    drive = folder / "drive" / "assignment3"
    assert list(drive.rglob("*.pt")) and list(folder.glob("*.pdf"))
    results = json.loads((drive / "runs" / "figures" / "results.json").read_text(encoding="utf-8"))
    assert results["profile"] == "tiny" and not results["run"]["resumed"]
    assert {"wall_seconds", "resumed", "cores", "jobs"} <= set(results["run"])
    figures = {p.stem for p in (drive / "runs" / "figures").iterdir()} - {"results"}
    captions = list(filter(None, map(caption, outputs_of(done))))
    assert len(figures) == len(captions) > 5
    smoke = ROOT / (RUNS or "none") / "figures" / "results.json"
    if smoke.exists():  # nbmake ran the notebook a moment ago: the same numbers, every one
        assert results_of(smoke) == results_of(drive / "runs" / "figures" / "results.json")


@pytest.mark.slow
def test_stand_ins_are_never_called_by_the_real_names(colab_run):
    """Computed text names the data that made it; the real names stand only where they must."""
    _, done = colab_run
    allowed = re.compile(r"(stands in for \*\*|No accuracy of Question 1 is one of )(MNIST|SVHN)")
    # Question 3's digit model was trained on the real sets, and its classes bear their names.
    before = [cell.source.startswith("## Question 3") for cell in done.cells].index(True)
    for output in outputs_of(nbformat.v4.new_notebook(cells=done.cells[:before])):
        text = output.get("data", {}).get("text/markdown", "")
        text = allowed.sub("", text + caption(output))
        assert not re.search(r"\b(MNIST|SVHN)\b", text), text
    boxes = [o.data["text/markdown"] for o in tool.tagged(done, "front-page").outputs
             if o.get("data", {}).get("text/markdown", "").startswith(">")]  # fmt: skip
    assert len(boxes) == 2


@pytest.mark.slow
def test_no_sentence_contradicts_its_interval(colab_run):
    _, done = colab_run
    texts = [o.get("data", {}).get("text/markdown", "") for o in outputs_of(done)]
    sentence = re.compile(
        r"[^.\n]*?(better|worse|differ|above|below)[^.\n]*?\(([+−]\d+\.\d+) ± (\d+\.\d+)"
    )
    found = [match for text in texts for match in sentence.finditer(text)]
    assert len(found) >= 4
    for match in found:
        word, mean, half = match[1], float(match[2].replace("−", "-")), float(match[3])
        if word == "differ":
            assert abs(mean) <= half + 0.005, match[0]
        else:
            assert (mean > 0) == (word in ("better", "above")) and abs(mean) >= half - 0.005


@pytest.mark.slow
def test_every_number_of_the_pdf_is_in_the_run(colab_run, tmp_path):
    from pypdf import PdfReader

    import utils

    _, done = colab_run
    (tmp_path / "done.ipynb").write_text(nbformat.writes(done), encoding="utf-8")
    utils.export_pdf(tmp_path / "done.ipynb", tmp_path / "done.pdf")
    text = "\n".join(page.extract_text() for page in PdfReader(tmp_path / "done.pdf").pages)
    decimals = re.compile(r"\d+\.\d+")
    known = [cell.source for cell in done.cells]
    for output in outputs_of(done):
        data = output.get("data", {})
        known += [data.get("text/markdown", ""), output.get("text", "")]
        known += [data.get("image/svg+xml", ""), caption(output)]
    known = " ".join(known)
    assert len(set(decimals.findall(text))) > 50
    unknown = set(decimals.findall(text)) - set(decimals.findall(known))
    assert not unknown, sorted(unknown)
