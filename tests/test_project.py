"""The project: sync, run and publish in a folder with a difficult name, and what it requires."""

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

from tools import notebook as tool

# ---- sync, run, publish ----


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project in a folder with a space and an accent, to be filled by a test."""
    folder = tmp_path / "projet d'été"
    folder.mkdir()
    monkeypatch.setattr(tool, "ROOT", folder)
    monkeypatch.setattr(tool, "NOTEBOOK", folder / "assignment3.ipynb")
    monkeypatch.delenv("A3_RUNS")
    return folder


def write_notebook(path, *cells):
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)


def code(source, tag=None, outputs=(), count=None):
    cell = nbformat.v4.new_code_cell(source, execution_count=count, outputs=list(outputs))
    cell.metadata = nbformat.from_dict({"tags": [tag]} if tag else {})
    return cell


@pytest.mark.skipif(
    not sys.prefix.isascii(), reason="without UTF-8, pyzmq cannot be imported from such a folder"
)
def test_sync_works_in_a_c_locale(project):
    (project / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "notebook.py", project / "tools")
    (project / "utils.py").write_text("SIGN = '±'\n", encoding="utf-8")
    write_notebook(project / "assignment3.ipynb", code("# @title stale", "helper-module"))
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "tools/notebook.py", "sync"]
    subprocess.run(command, cwd=project, env=os.environ | plain, check=True)
    cell = tool.only_tagged(tool.read(project / "assignment3.ipynb"), "helper-module")
    assert cell.source == tool.helper_cell("SIGN = '±'\n")
    assert cell.metadata.cellView == "form"


def test_a_utils_that_would_end_the_quotation_is_refused():
    with pytest.raises(ValueError, match=r"utils\.py"):
        tool.helper_cell("x = " + "'" * 3)


def test_save_keeps_what_colab_and_nbconvert_need(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[code("# @title Figure 1\n1"), code("2")])
    tool.save(notebook, tmp_path / "saved.ipynb")
    saved = tool.read(tmp_path / "saved.ipynb")
    assert saved.metadata.accelerator == "GPU" and saved.metadata.colab.gpuType == "T4"
    assert saved.metadata.language_info.file_extension == ".py"
    assert saved.metadata.language_info.nbconvert_exporter == "python"
    assert [cell.id for cell in saved.cells] == ["cell-000", "cell-001"]
    assert [cell.metadata.get("cellView") for cell in saved.cells] == ["form", None]


PROGRESS = """
import sys
for step in range(3):
    print(f"\\rstep {step}", end="", flush=True)
print("\\r      \\rtraining: 3 steps ±", flush=True)
"""


def test_a_run_shows_what_cells_print_and_keeps_what_came_before_an_error(project, capfd):
    write_notebook(
        project / "assignment3.ipynb",
        nbformat.v4.new_markdown_cell("# Solution\n\n## Question 1"),
        code(PROGRESS),
        code("# @title Broken\nraise ValueError('stop here')"),
        code("print('never')"),
    )
    output = project / "build" / "assignment3.ipynb"
    with pytest.raises(SystemExit, match=r"^Cell \[2\] \(Broken\) failed: ValueError: stop here"):
        tool.run_notebook(output)
    printed = capfd.readouterr()
    assert printed.out == "training: 3 steps ±\n"
    assert printed.err == ""
    training, broken, never = tool.code_cells(tool.read(output))
    assert [part.text for part in training.outputs] == ["training: 3 steps ±\n"]
    assert broken.outputs[0].ename == "ValueError"
    assert never.execution_count is None


TWO_NOTES = """
import sys, time
from IPython.display import display
print("one note", flush=True)
time.sleep(0.5)  # so that the notes come in two messages
print("another", flush=True)
handle = display({"text/plain": "begun"}, raw=True, display_id=True)
"""
LATER = "handle.update({'text/plain': 'ended'}, raw=True)"


def test_a_display_below_printed_lines_can_change_later(project):
    write_notebook(project / "assignment3.ipynb", code(TWO_NOTES), code(LATER))
    tool.run_notebook(project / "build" / "assignment3.ipynb")
    notes, _ = tool.read(project / "build" / "assignment3.ipynb").cells
    printed, shown = notes.outputs
    assert printed.text == "one note\nanother\n"
    assert shown.data["text/plain"] == "ended"


def test_a_run_works_in_the_project_and_writes_beside_its_output(project):
    source = "import os, pathlib\npathlib.Path(os.environ['A3_RUNS']).mkdir()\nos.getcwd()"
    write_notebook(project / "assignment3.ipynb", code(source))
    tool.run_notebook(project / "build" / "assignment3.ipynb")
    assert (project / "build" / "runs").is_dir()
    (cell,) = tool.read(project / "build" / "assignment3.ipynb").cells
    assert cell.outputs[0].data["text/plain"] == repr(str(project))


CHILD = """
import subprocess, sys
sleep = "import time; print('ready', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", sleep], stdout=subprocess.PIPE)
child.stdout.readline()
"""


def test_worker_processes_print_nothing_when_a_run_ends(project, capfd):
    write_notebook(project / "assignment3.ipynb", code(CHILD))
    tool.run_notebook(project / "build" / "assignment3.ipynb")
    # Not "nothing at all": on a busy machine ipykernel may name a task of its own at its end.
    assert "KeyboardInterrupt" not in capfd.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_names_the_cell_and_is_kept(project, signum):
    (project / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "notebook.py", project / "tools")
    waiting = CHILD + "print('waiting', flush=True)\nchild.wait()"
    write_notebook(project / "assignment3.ipynb", code("print('done')"), code(waiting))
    command = [sys.executable, "tools/notebook.py", "run", "build/run.ipynb"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(command, cwd=project, **pipes) as process:
        while process.stdout.readline() != "waiting\n":
            assert process.poll() is None
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in errors
    message = errors[errors.index("Cell [2]") :]  # the kernel may say before that it cut a task
    assert message.startswith("Cell [2] () failed: KeyboardInterrupt\nThe run so far is in ")
    assert message.count("\n") == 2
    done, stopped = tool.read(project / "build" / "run.ipynb").cells
    assert done.outputs[0].text == "done\n" and stopped.outputs[0].text == "waiting\n"


DISPLAY = """
from IPython.display import display

def show(text, **where):
    return display({"text/plain": text}, raw=True, **where)
"""
BAR = """
bar = show("(b): 0 of 2", display_id="bar")
bar.update({"text/plain": "(b): 1 of 2"}, raw=True)
first.update({"text/plain": "full on MNIST. About 3 minutes."}, raw=True)
bar.update({"text/plain": "(b): 2 trainings"}, raw=True)
"""


def test_a_run_prints_the_last_state_of_a_display_that_changes(project, capfd):
    cells = [code(DISPLAY), code("first = show('full on MNIST.', display_id='first')"), code(BAR)]
    write_notebook(project / "assignment3.ipynb", *cells)
    tool.run_notebook(project / "build" / "assignment3.ipynb")
    lines = capfd.readouterr().out.splitlines()
    assert lines[:-1] == ["full on MNIST.", "About 3 minutes.", "(b): 2 trainings"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_progress_bar_as_one_rewritten_line():
    terminal = Terminal()
    console = tool.Console(terminal)
    for text in ("first\n", "\rbar 1", "\rbar 2", "\r     \rdone\n"):
        console.write(text)
    console.progress("epoch 1")
    console.write("a note\n")
    console.progress("epoch 2")
    console.finish()
    frames = terminal.getvalue().split("\r\x1b[K")
    assert frames[1:5] == ["first\n", "bar 1", "bar 2", "done\n"]
    assert frames[5:] == ["epoch 1", "a note\n", "epoch 1", "epoch 2", "epoch 2\n"]


TABLE = "<table><tr><th>test</th><th>MNIST</th></tr><tr><td>b</td><td>99.6</td></tr></table>"
RESULTS = {
    "profile": "full",
    "machine": "2 cores",
    "data": {
        "handwritten": {"name": "MNIST", "train": 60000, "test": 10000, "real": True},
        "street": {"name": "SVHN", "train": 73257, "test": 6000, "real": True},
    },
    "claims": {"Ours is better": True},
    "run": {"wall_seconds": 600, "resumed": False, "jobs": 2},
}


def executed_cells(printed="fine"):
    table = nbformat.v4.new_output("display_data", {"text/html": TABLE})
    stream = nbformat.v4.new_output("stream", text=printed)
    return [
        code("show()", "answers", outputs=[table], count=1),
        code("print(text)", outputs=[stream], count=2),
        nbformat.v4.new_markdown_cell("text of the run"),
    ]


@pytest.fixture
def run_of(project):
    """A function that lays down a finished run, with the results and printed text it is given."""
    readme = f"before\n{tool.README_START}\nold\n{tool.README_END}\nafter ±\n"
    (project / "README.md").write_text(readme, encoding="utf-8")
    (project / "figures").mkdir()
    (project / "figures" / "stale.png").touch()
    text = nbformat.v4.new_markdown_cell("text, corrected")
    write_notebook(tool.NOTEBOOK, code("show()", "answers"), code("print(text)"), text)

    def lay_down(results, printed="fine"):
        figures = project / "build" / "runs" / "figures"
        figures.mkdir(parents=True)
        (figures / "new.svg").write_text("<svg/>", encoding="utf-8")
        (figures / "results.json").write_text(json.dumps(results), encoding="utf-8")
        write_notebook(project / "build" / "assignment3.ipynb", *executed_cells(printed))
        return project / "build" / "assignment3.ipynb"

    return lay_down


def test_publish_makes_a_run_the_committed_one(project, run_of):
    tool.publish(run_of(RESULTS))
    readme = (project / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("before\n") and readme.endswith("after ±\n") and "old" not in readme
    assert "| test | MNIST |\n| :--- | ---: |\n| b | 99.6 |" in readme
    assert "- SVHN: 73,257 training and 6,000 test images.\n" in readme
    assert {path.name for path in (project / "figures").iterdir()} == {"new.svg", "results.json"}
    show, say, text = tool.read(tool.NOTEBOOK).cells
    assert show.outputs and say.outputs[0].text == "fine" and say.execution_count == 2
    assert text.source == "text, corrected"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"profile": "short"}, "the profile is short"),
        ({"claims": {"Ours is better": False}}, "does not hold: Ours is better"),
        ({"run": RESULTS["run"] | {"resumed": True}}, "stored trainings"),
        ({"data": {"street": RESULTS["data"]["street"] | {"real": False}}}, "a stand-in"),
    ],
)
def test_publish_refuses_a_run_that_cannot_stand_for_the_project(project, run_of, change, reason):
    with pytest.raises(SystemExit, match=reason):
        tool.publish(run_of(RESULTS | change))
    assert (project / "figures" / "stale.png").exists()
    assert "old" in (project / "README.md").read_text(encoding="utf-8")


def test_publish_refuses_outputs_that_name_this_machine(project, run_of):
    with pytest.raises(SystemExit, match=r"cell \[2\] shows the local name"):
        tool.publish(run_of(RESULTS, printed=f"saved in {project}"))


def test_publish_refuses_a_run_of_other_code(run_of):
    run = run_of(RESULTS)
    write_notebook(tool.NOTEBOOK, code("show()", "answers"), code("print(2 * text)"))
    with pytest.raises(SystemExit, match="not that of the run"):
        tool.publish(run)


def test_publish_names_the_file_that_a_run_has_not_left(run_of):
    run = run_of(RESULTS)
    (run.parent / "runs" / "figures" / "results.json").unlink()
    with pytest.raises(SystemExit, match=r"results\.json is not there"):
        tool.publish(run)


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["run", "a.ipynb", "b.ipynb"], ["publish"], ["sync", "a"], ["other"]]
)
def test_a_command_line_that_is_none_gets_the_usage(arguments):
    with pytest.raises(SystemExit, match=r"python tools/notebook\.py publish RUN\.ipynb"):
        tool.main(arguments)


def test_a_change_of_what_utils_runs_is_other_code_and_one_of_words_or_the_pdf_is_not():
    def runs(*changes):
        module = (
            '"""Words."""\ndef f():\n    """Doc."""\n    return 1\n\n# ---- PDF ----\n\nx = 1\n'
        )
        for old, new in changes:
            module = module.replace(old, new)
        helper = code(tool.helper_cell(module), "helper-module")
        return tool.code_of(nbformat.v4.new_notebook(cells=[helper]))

    assert runs() == runs(
        ("Words", "Others"), ("Doc", "Other"), ("x = 1", "x = 2"), ("1\n\n", "1  # a\n\n")
    )
    assert runs() != runs(("return 1", "return 2"))
    assert runs() != runs(("f()", "g()"))


def test_the_pdf_section_is_the_last_of_utils():
    utils = (ROOT / "utils.py").read_text(encoding="utf-8")
    after = utils.partition(tool.PDF_SECTION)[2]
    assert "class TypstPDFExporter" in after and "\n# ---- " not in after


def test_claims_are_judged_again_where_their_text_was_corrected_after_the_run(project, run_of):
    (project / "utils.py").touch()
    run = run_of(RESULTS)
    claim = "claims |= {'It took ten minutes': results['run']['wall_seconds'] == SECONDS}"
    judged = "results['claims'] = claims\nprint(claims)"

    def cells(seconds):
        source = claim.replace("SECONDS", str(seconds))
        return [code(source, "claims", count=3), code(judged, "claims-table", count=4)]

    write_notebook(run, *executed_cells(), *cells(1))
    text = nbformat.v4.new_markdown_cell("text, corrected")
    shown = [code("show()", "answers"), code("print(text)"), text]
    write_notebook(tool.NOTEBOOK, *shown, *cells(2))
    with pytest.raises(SystemExit, match="does not hold: It took ten minutes"):
        tool.publish(run)
    write_notebook(tool.NOTEBOOK, *shown, *cells(600))
    tool.publish(run)
    results = json.loads((project / "figures" / "results.json").read_text(encoding="utf-8"))
    assert results["claims"] == {"It took ten minutes": True}
    table = tool.only_tagged(tool.read(tool.NOTEBOOK), "claims-table")
    assert "It took ten minutes" in table.outputs[0].text


# ---- requirements ----

INSTALLED_AS = {"sklearn": "scikit-learn", "pypandoc": "pypandoc-binary"}
COME_WITH_OTHERS = {
    "nbformat",
    "jupyter_client",
    "bs4",
    "jinja2",
    "traitlets",
    "IPython",
    "packaging",
    "google",
    "PIL",
}
USED_BY_NAME = {"ipykernel", "nbmake", "ruff", "uv"}


def imported(source):
    """Top-level modules that a text imports, the standard library left out."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names


def test_requirements_are_what_is_imported():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.match(r"[\w-]+", line)[0] for line in lines if line[:1].isalpha()}
    folders = [ROOT, ROOT / "tests", ROOT / "tools", ROOT / "offline", ROOT / "offline/training"]
    files = [path for folder in folders for path in folder.glob("*.py")]
    sources = [path.read_text(encoding="utf-8") for path in files]
    sources += [cell.source for cell in tool.code_cells(tool.read(tool.NOTEBOOK))]
    ours = {path.stem for path in files} | {folder.name for folder in folders}
    modules = set().union(*map(imported, sources)) - ours - COME_WITH_OTHERS
    needed = {INSTALLED_AS.get(name, name).replace("_", "-") for name in modules}
    assert needed | USED_BY_NAME == {name.replace("_", "-") for name in required}
