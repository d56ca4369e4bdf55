"""The project: run and publish, in a folder with a difficult name."""

import json

import nbformat
import pytest
from conftest import ROOT
from conftest import code_cell as code

from tools import notebook as tool


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
    return path


def run_cells(project, *cells):
    """Run a notebook of these cells: its cells after the run."""
    write_notebook(project / "assignment3.ipynb", *cells)
    output = project / "build" / "assignment3.ipynb"
    tool.run_notebook(output)
    return tool.read(output).cells


PROGRESS = """
for step in range(3):
    print(f"\\rstep {step}", end="", flush=True)
print("\\r      \\rtraining: 3 steps ±", flush=True)
"""


def test_a_run_shows_what_cells_print_and_keeps_what_came_before_an_error(project, capfd):
    broken = code("# @title Broken\nraise ValueError('stop here')")
    with pytest.raises(SystemExit, match=r"^Cell \[2\] \(Broken\) failed: ValueError: stop here"):
        run_cells(project, code(PROGRESS), broken, code("print('never')"))
    printed = capfd.readouterr()
    assert printed.out == "training: 3 steps ±\n" and printed.err == ""
    training, broken, never = tool.read(project / "build" / "assignment3.ipynb").cells
    assert [part.text for part in training.outputs] == ["training: 3 steps ±\n"]
    assert broken.outputs[0].ename == "ValueError"
    assert never.execution_count is None


def test_a_run_writes_beside_its_output_and_drops_the_figures_of_an_earlier_run_only(project):
    figures = project / "build" / "runs" / "figures"
    figures.mkdir(parents=True)
    (figures / "someones.svg").touch()
    (cell,) = run_cells(project, code("import os\nprint(os.getcwd(), os.environ['A3_RUNS'])"))
    assert cell.outputs[0].text == f"{project} {project / 'build' / 'runs'}\n"
    assert (figures / "someones.svg").exists()
    (figures / "results.json").touch()
    run_cells(project, code("1"))
    assert not figures.exists()


FIGURES = """
import os, pathlib
figures = pathlib.Path(os.environ["A3_RUNS"], "figures")
figures.mkdir(parents=True)
(figures / "results.json").touch()
"""


def test_a_run_stops_where_utils_is_not_the_notebooks_copy_or_changes_meanwhile(project):
    (project / "utils.py").write_text("x = 0", encoding="utf-8")
    with pytest.raises(SystemExit, match="make sync"):
        run_cells(project, code(tool.helper_cell("x = 1"), "helper-module"))
    helper = code(tool.helper_cell("x = 0"), "helper-module")
    change = code(FIGURES + "pathlib.Path('utils.py').write_text('x = 1')")
    with pytest.raises(SystemExit, match=r"utils\.py changed during the run"):
        run_cells(project, helper, change)
    assert not (project / "build" / "runs" / "figures" / "results.json").exists()


def test_line_ends_of_windows_are_no_change_of_utils():
    helper = code(tool.helper_cell("x = 0\n"), "helper-module")
    notebook = nbformat.v4.new_notebook(cells=[helper])
    tool.require_same_copy(notebook, b"x = 0\r\n")
    with pytest.raises(SystemExit):
        tool.require_same_copy(notebook, b"x = 1\r\n")


TABLE = "<table><tr><th>test</th><th>MNIST</th></tr><tr><td>b</td><td>99.6</td></tr></table>"
RESULTS = {
    "profile": "full",
    "machine": "2 cores",
    "data": {"street": {"name": "SVHN", "train": 73257, "test": 6000, "real": True}},
    "claims": {"Ours is better": True},
    "run": {"wall_seconds": 600, "resumed": False, "jobs": 2},
}


LAST_LINE = "One run of 10.0 minutes on 2 cores."


def executed_cells(printed=LAST_LINE):
    table = nbformat.v4.new_output("display_data", {"text/html": TABLE})
    stream = nbformat.v4.new_output("stream", text=printed)
    figure = nbformat.v4.new_output(
        "display_data", {"image/svg+xml": "<svg/>"}, metadata={"caption": "Figure 1. A line."}
    )
    return [
        code("show()", "answers", outputs=[table], count=1),
        code("print(text)", outputs=[stream, figure], count=2),
        nbformat.v4.new_markdown_cell("text of the run"),
    ]


def committed_cells():
    text = nbformat.v4.new_markdown_cell("text, corrected")
    return [code("show()", "answers"), code("print(text)"), text]


@pytest.fixture
def run_of(project):
    """A function that lays down a finished run, with the results and printed text it is given."""
    readme = f"before\n{tool.README_START}\nold\n{tool.README_END}\nafter ±\n"
    (project / "README.md").write_text(readme, encoding="utf-8")
    (project / "figures").mkdir()
    (project / "figures" / "stale.png").touch()
    write_notebook(tool.NOTEBOOK, *committed_cells())

    def lay_down(results=RESULTS):
        figures = project / "build" / "runs" / "figures"
        figures.mkdir(parents=True)
        (figures / "new.svg").write_text("<svg/>", encoding="utf-8")
        (figures / "results.json").write_text(json.dumps(results), encoding="utf-8")
        return write_notebook(project / "build" / "assignment3.ipynb", *executed_cells())

    return lay_down


def test_publish_makes_a_run_the_committed_one(project, run_of):
    tool.publish(run_of())
    readme = (project / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("before\n") and readme.endswith("after ±\n") and "old" not in readme
    assert "| test | MNIST |\n| :--- | ---: |\n| b | 99.6 |" in readme
    assert "- SVHN: 73,257 training and 6,000 test images.\n" in readme
    assert {path.name for path in (project / "figures").iterdir()} == {"new.svg", "results.json"}
    show, say, text = tool.read(tool.NOTEBOOK).cells
    assert show.outputs and say.outputs[0].text == LAST_LINE and say.execution_count == 2
    assert text.source == "text, corrected"


REASONS = [
    "the profile is short",
    "does not hold: Ours is better",
    "it resumed trainings",
    "results.json is of another run than the notebook",
    "SVHN is a stand-in",
    "cell [2] shows the local name",
    "has other figures than the notebook",
    "is not that of the run",
]


def test_publish_refuses_a_run_that_cannot_stand_for_the_project_with_every_reason(project, run_of):
    about = {
        "profile": "short",
        "claims": {"Ours is better": False},
        "data": {"street": RESULTS["data"]["street"] | {"real": False}},
        "run": RESULTS["run"] | {"resumed": True, "wall_seconds": 606},
    }
    run = run_of(RESULTS | about)
    write_notebook(run, *executed_cells(printed=f"{LAST_LINE} saved in {project}"))
    (run.parent / "runs" / "figures" / "renamed.png").touch()
    write_notebook(tool.NOTEBOOK, code("show()", "answers"), code("print(2 * text)"))
    with pytest.raises(SystemExit) as refused:
        tool.publish(run)
    assert [reason for reason in REASONS if reason not in str(refused.value)] == []
    assert (project / "figures" / "stale.png").exists()
    assert "old" in (project / "README.md").read_text(encoding="utf-8")


def test_a_run_never_overwrites_the_committed_notebook(project):
    path = write_notebook(project / "assignment3.ipynb", code("1"))
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="name another"):
        tool.run_notebook(path)
    assert path.read_bytes() == before


def test_a_change_of_what_utils_runs_is_other_code_and_one_of_words_or_the_pdf_is_not():
    def code_with(old="", new=""):
        module = '"""Words."""\ndef f():\n    """Doc."""\n    return 1\n\n# ---- PDF ----\nx = 1\n'
        helper = code(tool.helper_cell(module.replace(old, new)), "helper-module")
        return tool.code_of(nbformat.v4.new_notebook(cells=[helper]))

    for old, new in [("Words", "Others"), ("Doc", "Other"), ("x = 1", "x = 2")]:
        assert code_with(old, new) == code_with()
    for old, new in [("return 1", "return 2"), ("f()", "g()")]:
        assert code_with(old, new) != code_with()


def test_the_pdf_section_is_the_last_of_utils():
    utils = (ROOT / "utils.py").read_text(encoding="utf-8")
    after = utils.partition(tool.PDF_SECTION)[2]
    assert "class TypstPDFExporter" in after and "\n# ---- " not in after


def test_claims_are_judged_again_where_their_text_was_corrected_after_the_run(project, run_of):
    (project / "utils.py").touch()

    def claim_cells(seconds):
        claim = f"'It took ten minutes': results['run']['wall_seconds'] == {seconds}"
        table = "results['claims'] = claims\nprint(claims)"
        claims = code(f"claims |= {{{claim}}}", "claims", count=3)
        return [claims, code(table, "claims-table", count=4)]

    run = write_notebook(run_of(), *executed_cells(), *claim_cells(1))
    write_notebook(tool.NOTEBOOK, *committed_cells(), *claim_cells(2))
    with pytest.raises(SystemExit, match="does not hold: It took ten minutes"):
        tool.publish(run)
    write_notebook(tool.NOTEBOOK, *committed_cells(), *claim_cells(600))
    tool.publish(run)
    results = json.loads((project / "figures" / "results.json").read_text(encoding="utf-8"))
    assert results["claims"] == {"It took ten minutes": True}
    table = tool.single_tagged_cell(tool.read(tool.NOTEBOOK), "claims-table")
    assert "It took ten minutes" in table.outputs[0].text


def test_code_and_magics_count_whatever_the_tag_and_a_comment_may_be_corrected_after_the_run():
    def code_with(text, tag="code-in-appendix"):
        return tool.code_of(nbformat.v4.new_notebook(cells=[code(text, tag)]))

    for tag in ("definitions", "hide-code", "hide-pdf"):
        assert code_with("f(1)", tag) != code_with("f(2)", tag)
    assert code_with("f(1)  # of Table 5") == code_with("f(1)  # of Table 4")
    assert code_with("%pip install a") != code_with("%pip install b")


def test_a_readme_whose_marks_are_missing_or_in_the_wrong_order_is_left_alone():
    assert tool.fill_readme("a\nS\nold\nE\nb", "S", "new", "E") == "a\nS\n\nnew\n\nE\nb"
    for readme in ("S\n", "E\n", "E\nS\nb"):
        with pytest.raises(SystemExit, match="must hold the lines S and E"):
            tool.fill_readme(readme, "S", "new", "E")


def test_definitions_are_executed_as_in_the_notebook(tmp_path):
    cell = code("def f(x: Undefined):\n    return x", "definitions")
    path = write_notebook(tmp_path / "one.ipynb", cell)
    with pytest.raises(NameError, match="Undefined"):
        tool.load_definitions(path)


def test_sync_quotes_the_definition_of_now_and_keeps_the_words_around_it(project):
    text = "def f():\n    return 3\n\nclass A:\n    @cached\n    def f(self):\n        return 2\n"
    (project / "utils.py").write_text(text, encoding="utf-8")
    body = "@cached\ndef f(self):\n    return 2"
    quotation = f"From `utils.py`: `A.f`\n\n```python\n{body}\n```\n\nAfter"
    old = quotation.replace("return 2", "return 1")
    cell = nbformat.v4.new_markdown_cell(old, metadata={"tags": ["quotes-code"]})
    path = write_notebook(project / "one.ipynb", code("", "helper-module"), cell)
    tool.sync(path)
    assert tool.read(path).cells[1].source == quotation
    with pytest.raises(ValueError, match=r"A\.g is quoted, but not defined"):
        tool.definition_source(text, "A.g")
