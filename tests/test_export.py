"""The PDF: what is in it, what is left out, what happens when something is missing; and the
links of the notebook's table of contents."""

import ast
import base64
import io
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

import utils

nbformat = pytest.importorskip("nbformat")
pypdf = pytest.importorskip("pypdf")
pytest.importorskip("typst")
pytest.importorskip("pypandoc")

from nbformat.v4 import (  # noqa: E402
    new_code_cell,
    new_markdown_cell,
    new_notebook,
    new_output,
)

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "assignment3.ipynb"
LONG_LINE = "value = some_module.some_function(" + ", ".join(f"name_{i}" for i in range(40)) + ")"
HELPER = '"""The helpers."""\n\n\ndef first_helper():\n    return 1\n\n\ndef last_helper(): ...\n'


def png(width: int = 900, height: int = 340, colour: str = "navy") -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG", dpi=(100, 100))
    return base64.b64encode(file.getvalue()).decode()


def picture(colour: str, alt: str = "") -> dict:
    return new_output(
        "display_data",
        {"image/png": png(colour=colour), "text/plain": "<Figure size 900x340>"},
        metadata={"image/png": {"alt": alt}},
    )


def stream(text: str, name: str = "stdout") -> dict:
    return new_output("stream", name=name, text=text)


def result(**kinds: str) -> dict:
    names = {"plain": "text/plain", "html": "text/html", "latex": "text/latex",
             "markdown": "text/markdown"}  # fmt: skip
    widget = "application/vnd.jupyter.widget-view+json"
    return new_output("display_data", {names.get(k, widget): v for k, v in kinds.items()})


def sample_notebook(**submission: str) -> dict:
    log = "".join(f"line {i} of the log\n" for i in range(500))
    cells = [
        new_markdown_cell("# A title for all\n\nTo [the losses](#Question-1-(b)-Losses), "
                          "[the table](#table) and [nowhere](#nowhere). See `code`."),  # fmt: skip
        new_code_cell(
            f"SOURCE = r'''{HELPER}'''",
            outputs=[stream("helper cell output")],
            metadata={"tags": ["helper-module"]},
        ),
        new_code_cell("NAME = ''", metadata={"tags": ["submission"]}),
        new_code_cell("secret = 1", metadata={"tags": ["hide-pdf"]}),
        new_markdown_cell("## Question 1 (b) Losses\n\nThe loss is $\\frac{1}{N}\\sum_i x_i$ and\n"
                          "\\begin{align}a &= 17 \\\\ b &= 18\\end{align}\n"),  # fmt: skip
        new_code_cell(
            LONG_LINE,
            outputs=[
                stream(log),
                stream("a warning nobody should see", "stderr"),
                stream(" 40%|████      | 4/10\r100%|██████████| 10/10\n"),
                result(plain="  0%|          | 0/10", widget="{}"),
                result(markdown="| data | accuracy |\n|---|--:|\n| digits | 98.76 |"),
                picture("navy", alt="a blue field"),
                result(plain="plain words 4711", html="<b>html words</b>"),
                result(html="<style>b {}</style><b>only html 815</b>",
                       plain="<IPython.core.display.HTML object>"),  # fmt: skip
                result(plain="Matrix([[1]])", latex="$\\displaystyle \\left[\\begin{matrix}123"
                       "\\end{matrix}\\right]$"),  # fmt: skip
                stream("\x1b[31mred\x1b[0m words\n"),
            ],
        ),
        new_markdown_cell("Figure 1. The caption of the blue field.\n\nA discussion."),
        new_markdown_cell('<a id="table"></a>\n## Question 2\n\n### Part (c)\n\n```python\nopen'),
        new_code_cell(
            "draw_a_green_field()", outputs=[picture("green")], metadata={"tags": ["pdf-appendix"]}
        ),
        new_markdown_cell(
            "![An attached square](attachment:square.png)\n\n![gone](http://x.y/z.png)",
            attachments={"square.png": {"image/png": png(300, 300, "red")}},
        ),
        new_markdown_cell("Odd: #let @label <tag> a_b \\foo $\\nosuchmacro{x}$ 🎉 ✓ 李 \x07 $5"),
        new_code_cell("raise ValueError", outputs=[
            new_output("error", ename="ValueError", evalue="no", traceback=["\x1b[1mTrace 99"])]),
    ]  # fmt: skip
    nb = new_notebook(cells=cells, metadata={"submission": submission})
    for number, cell in enumerate(nb.cells):
        cell["id"] = f"cell-{number}"
    return nb


def read_pages(pdf: bytes) -> list[str]:
    return [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(pdf)).pages]


def image_count(pdf: bytes) -> int:
    return sum(len(page.images) for page in pypdf.PdfReader(io.BytesIO(pdf)).pages)


@pytest.fixture(scope="module")
def sample_pdf() -> bytes:
    return utils.notebook_to_pdf(sample_notebook(name="Ada Lovelace"), Path("."))


@pytest.fixture(scope="module")
def sample_pages(sample_pdf) -> list[str]:
    return read_pages(sample_pdf)


@pytest.fixture(scope="module")
def sample_text(sample_pages) -> str:
    return " ".join("\n".join(sample_pages).split())


@pytest.mark.parametrize(
    "words",
    ["A title for all", "Question 1 (b) Losses", "Question 2", "Part (c)", "Contents",
     "Appendix: helper module", "Ada Lovelace", "98.76", "accuracy", "plain words 4711",
     "only html 815", "123", "17", "18", "line 0 of the log", "line 499 of the log",
     "lines left out", "A discussion.",
     "The caption of the blue field", "An attached square", "red words", "Trace 99",
     "Odd: #let @label", ":party popper:", "✓", "name_39", "last_helper", "[picture: gone]"],
)  # fmt: skip
def test_the_pdf_shows(sample_text, words):
    assert words in sample_text


@pytest.mark.parametrize(
    "words",
    ["line 250 of the log", "a warning nobody", "0%|", "100%|", "4/10", "0/10", "html words",
     "IPython.core", "secret", "Figure size", "helper cell output", "Matrix(", "NAME =", "SOURCE",
     "style", "draw_a_green_field", "\\frac", "\\begin", "[31m", "pipe |"],
)  # fmt: skip
def test_the_pdf_leaves_out(sample_text, words):
    body = sample_text.partition("Appendix: supporting code The code")[0]
    assert words not in body


def test_every_picture_once(sample_pdf):
    assert image_count(sample_pdf) == 3


def test_appendix_is_last_and_linked(sample_pages):
    starts = [i for i, page in enumerate(sample_pages) if "def first_helper" in page]
    assert starts == [len(sample_pages) - 1]
    assert "draw_a_green_field" in sample_pages[-2] and "Part (c) ---" in sample_pages[-2]
    assert "Trace 99" in sample_pages[-3]


def test_every_page_has_its_number(sample_pages):
    for number, page in enumerate(sample_pages, 1):
        assert f"{number} / {len(sample_pages)}" in page


def test_no_line_runs_over_the_margin(sample_pages):
    lines = [line for page in sample_pages for line in page.splitlines() if "name_" in line]
    assert len(lines) >= len(LONG_LINE) / 115
    assert max(map(len, lines)) <= 115  # what fits on a line of small type


def test_internal_links_lead_somewhere(sample_pdf):
    reader = pypdf.PdfReader(io.BytesIO(sample_pdf))
    links = [a.get_object() for page in reader.pages for a in page.get("/Annots", [])]
    assert len(links) >= 2 + 4 + 1  # two in the text, the contents, the appendix


def test_reminder_shown_until_filled_in(sample_text):
    assert "Reminder before handing in: fill in student number and discussed with" in sample_text
    assert "not filled in yet" in sample_text
    nb = sample_notebook(name="Ada Lovelace", student_number="4000", discussed_with="nobody")
    text = " ".join(" ".join(read_pages(utils.notebook_to_pdf(nb, Path(".")))).split())
    assert "Reminder" not in text and "not filled in" not in text
    assert "4000" in text and "nobody" in text


@pytest.mark.parametrize(
    "source",
    ["NAME = 'Grace'\nSTUDENT_NUMBER = '12'\nDISCUSSED_WITH = ['Ada', 'Alan']",
     "submission = {'name': 'Grace', 'student_number': 12, 'discussed_with': 'Ada, Alan'}",
     "settings = dict(name='Grace', student_number=12, discussed_with=('Ada', 'Alan'))"],
)  # fmt: skip
def test_settings_cell_wins_over_metadata(source):
    nb = sample_notebook(name="Somebody")
    nb.cells[2].source = source
    details = utils.submission_details(nb)
    expected = {"name": "Grace", "student_number": "12", "discussed_with": "Ada, Alan"}
    assert expected.items() <= details.items()


def test_same_notebook_same_bytes(sample_pdf):
    again = utils.notebook_to_pdf(sample_notebook(name="Ada Lovelace"), Path("."))
    assert again == sample_pdf


def test_figure_stays_with_its_caption():
    cells = []
    for number in range(8):
        cells.append(new_markdown_cell("\n\n".join(["Some words."] * (5 + 3 * number))))
        colour = f"#0000{number:02x}"  # equal pictures would be stored once
        cells.append(new_code_cell("draw()", outputs=[picture(colour)]))
        cells.append(new_markdown_cell(f"*Figure {number}.* Caption {number}."))
    pdf = utils.notebook_to_pdf(new_notebook(cells=cells), Path("."))
    reader = pypdf.PdfReader(io.BytesIO(pdf))
    captions = 0
    for page in reader.pages:
        found = len(re.findall(r"Caption \d\.", page.extract_text()))
        assert found == len(page.images)
        captions += found
    assert captions == 8 and len(reader.pages) > 2


@pytest.mark.parametrize("source", ["%%writefile utils.py\n" + HELPER, HELPER])
def test_helper_cell_in_other_forms(source):
    cell = new_code_cell(source, metadata={"tags": ["helper-module"]})
    nb = new_notebook(cells=[new_markdown_cell("## Only heading"), cell])
    pages = read_pages(utils.notebook_to_pdf(nb, Path(".")))
    assert "last_helper" in pages[-1] and "last_helper" not in "".join(pages[:-1])


def test_empty_notebook_gives_a_page():
    assert "Assignment 3" in read_pages(utils.notebook_to_pdf(new_notebook(), Path(".")))[0]


@given(
    st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=30),
             min_size=1, max_size=120),
    st.integers(3, 50),
)  # fmt: skip
def test_shortened_text(lines, limit):
    short = utils.shorten_text("\n".join(lines), limit).splitlines()
    assert len(short) <= limit
    assert (short[0], short[-1]) == (lines[0], lines[-1])
    if len(lines) <= limit:
        assert short == lines
    else:
        (mark,) = [line for line in short if "left out" in line]
        assert int(re.search(r"\d+", mark)[0]) == len(lines) - (len(short) - 1)


# ---- export_pdf: files, Colab, errors ----


def saved_notebook(folder: Path) -> Path:
    path = folder / "note book.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Saved\n\nwords on disk")]), path)
    return path


def test_export_writes_one_file_and_no_litter(tmp_path, monkeypatch):
    notebook = saved_notebook(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    pdf = utils.export_pdf(notebook)
    assert pdf == notebook.with_suffix(".pdf")
    assert "words on disk" in read_pages(pdf.read_bytes())[0]
    elsewhere = utils.export_pdf(notebook, tmp_path / "new" / "out.pdf")
    assert elsewhere.read_bytes() == pdf.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", notebook.name, pdf.name, "tmp"]
    assert not list((tmp_path / "tmp").iterdir())


def test_colab_exports_the_open_notebook_and_offers_it(tmp_path, monkeypatch):
    live = new_notebook(cells=[new_markdown_cell("# Live\n\nwords in Colab")])
    offered = []
    colab = types.ModuleType("google.colab")
    colab._message = types.SimpleNamespace(
        blocking_request=lambda *args, **kwargs: {"ipynb": json.loads(nbformat.writes(live))}
    )
    colab.files = types.SimpleNamespace(download=offered.append)
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    pdf = utils.export_pdf(tmp_path / "assignment3.ipynb")  # no such file: Colab keeps it in Drive
    assert offered == [str(pdf)]
    assert "words in Colab" in read_pages(pdf.read_bytes())[0]


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="notebook must be a file ending in .ipynb"):
        utils.export_pdf(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="pdf must be a file ending in .pdf"):
        utils.export_pdf(tmp_path / "a.ipynb", tmp_path / "a.doc")
    with pytest.raises(FileNotFoundError, match="a.ipynb; save it"):
        utils.export_pdf(tmp_path / "a.ipynb")


@pytest.mark.parametrize(
    "module, wheel",
    [("pypandoc", "pypandoc_binary"), ("typst", "typst"), ("nbformat", "nbformat")],
)
def test_missing_package_says_what_to_install(tmp_path, monkeypatch, module, wheel):
    notebook = saved_notebook(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=f"(?s)needs {wheel}.*pip install .*typst"):
        utils.export_pdf(notebook)
    assert [p.name for p in tmp_path.iterdir()] == [notebook.name]


def test_missing_pandoc_program_says_what_to_install(tmp_path, monkeypatch):
    def no_pandoc():
        raise OSError("No pandoc was found")

    monkeypatch.setattr("pypandoc.get_pandoc_version", no_pandoc)
    with pytest.raises(RuntimeError, match="(?s)No pandoc was found.*pip install"):
        utils.export_pdf(saved_notebook(tmp_path))


def test_typst_error_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "notebook_to_typst", lambda *args: "#no-such-function()")
    with pytest.raises(RuntimeError, match="typst could not set the PDF.*no-such-function"):
        utils.export_pdf(saved_notebook(tmp_path))


def test_utils_imports_without_the_export_packages():
    tree = ast.parse((ROOT / "utils.py").read_text())
    names = [a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in tree.body if isinstance(n, ast.ImportFrom)]
    assert not {n.split(".")[0] for n in names} & {"typst", "pypandoc", "nbconvert", "nbformat"}


def test_nbconvert_exporter(tmp_path):
    exporters = pytest.importorskip("nbconvert.exporters")
    exporter = exporters.get_exporter("utils.TypstPDFExporter")()
    notebook = saved_notebook(tmp_path)
    content, resources = exporter.from_filename(str(notebook))
    assert resources["output_extension"] == ".pdf"
    assert content == utils.export_pdf(notebook).read_bytes()
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = utils.no_such_name


@pytest.mark.slow
def test_nbconvert_command(tmp_path):
    notebook = saved_notebook(tmp_path)
    command = [sys.executable, "-m", "nbconvert", "--to", "utils.TypstPDFExporter", str(notebook)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert notebook.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


# ---- The committed notebook: fidelity and links ----


@pytest.fixture(scope="module")
def committed():
    if not NOTEBOOK.exists():
        pytest.skip("assignment3.ipynb is not there yet")
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def committed_pdf(committed) -> bytes:
    return utils.notebook_to_pdf(committed, ROOT)


@pytest.fixture(scope="module")
def committed_pages(committed_pdf) -> list[str]:
    return read_pages(committed_pdf)


def without_code(source: str) -> str:
    """Markdown without fenced blocks and inline code, where `#` and `](` mean nothing."""
    source = re.sub(r"(?ms)^ *(```|~~~).*?^ *\1[`~]*\s*?$", "", source)
    return re.sub(r"`[^`\n]*`", "", source)


def markdown_headings(source: str) -> list[str]:
    source = re.sub(r"(?ms)^ *(```|~~~).*?^ *\1[`~]*\s*?$", "", source)
    return [h.strip() for h in re.findall(r"(?m)^ {0,3}#{1,6}\s+(.+?)\s*#*$", source)]


def letters(text: str) -> str:
    """Letters and digits only: line breaks, ligatures and markup do not count."""
    return re.sub(r"[\W_]+", "", text)


def plain_heading(heading: str) -> str:
    """A heading as it is displayed: no HTML, no emphasis, links reduced to their words."""
    heading = re.sub(r"<[^>]+>", "", heading)
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[`*]|(?<!\w)_|_(?!\w)", "", heading).strip()


def is_shown(cell) -> bool:
    return not {"hide-pdf", "submission"} & set(cell.metadata.get("tags", []))


def test_fidelity_headings(committed, committed_pages):
    text = letters("".join(committed_pages))
    for cell in filter(is_shown, committed.cells):
        if cell.cell_type != "markdown":
            continue
        for heading in markdown_headings(cell.source):
            for piece in re.split(r"\$[^$]*\$", plain_heading(heading)):
                assert letters(piece) in text, heading


def test_fidelity_figures(committed, committed_pdf):
    shown = [c for c in committed.cells if is_shown(c) and c.cell_type == "code"]
    kinds = [set(o.get("data", {})) for c in shown for o in c.outputs]
    pictures = sum(bool(kind & {"image/png", "image/jpeg"}) for kind in kinds)
    if not any(c.execution_count for c in shown):
        pytest.skip("assignment3.ipynb is not executed yet")
    assert pictures > 0
    assert image_count(committed_pdf) >= pictures


def test_fidelity_numbers(committed_pages):
    path = ROOT / "figures" / "results.json"
    if not path.exists():
        pytest.skip("figures/results.json is not there yet")
    results = json.loads(path.read_text())
    text = "".join(committed_pages)
    numbers = [
        results[part][data][key]
        for part, key in [("single_task", "test_acc"), ("multi_task", "test_acc"),
                          ("single_task_500", "mean"), ("multi_task_500", "mean")]
        for data in ("handwritten", "street")
    ]  # fmt: skip
    numbers += [results["joint_embedding"][key] for key in ("top1_100", "top1_all")]
    for number in numbers:
        forms = {f"{number:.2f}", f"{number:.1f}", str(number)}
        assert any(re.search(rf"(?<![\d.]){re.escape(f)}(?!\d)", text) for f in forms), number


def test_fidelity_formulas(committed):
    """A formula pandoc cannot read would stand in the PDF as raw TeX."""
    import pypandoc

    cells = [c for c in committed.cells if c.cell_type == "markdown" and is_shown(c)]
    run = subprocess.run(
        [pypandoc.get_pandoc_path(), "-f", "ipynb+raw_tex", "-t", "typst"],
        input=nbformat.writes(new_notebook(cells=cells)),
        encoding="utf-8",
        capture_output=True,
        check=True,
    )
    assert "Could not convert TeX math" not in run.stderr


def test_fidelity_size(committed_pdf, committed_pages):
    assert len(committed_pdf) < 10 * 2**20
    appendix = [i for i, page in enumerate(committed_pages) if "Appendix: " in page and i > 0]
    assert appendix and appendix[0] < 30  # page 0 has the contents; so many pages come before


def heading_slugs(heading: str) -> set[str]:
    """A heading's anchors: GitHub's and Colab's (lower case, no punctuation), JupyterLab's."""
    plain = plain_heading(heading)
    return {
        re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"),
        plain.replace(" ", "-"),
    }


def broken_links(sources: list[str]) -> list[str]:
    """The `](#anchor)` targets in Markdown cells that lead to no heading and no `<a id=...>`,
    and the explicit ids that occur twice."""
    text = "\n\n".join(map(without_code, sources))
    ids = re.findall(r"<a\s[^>]*?(?:id|name)=[\"']?([^\"'\s>]+)", text)
    anchors = set(ids)
    seen: dict[str, int] = {}
    for source in sources:
        for heading in markdown_headings(source):
            for slug in heading_slugs(heading):
                count = seen.get(slug, 0)
                anchors.add(f"{slug}-{count}" if count else slug)
                seen[slug] = count + 1
    targets = re.findall(r"\]\(#((?:[^()\s]|\([^()]*\))*)\)", text)
    twice = {i for i in ids if ids.count(i) > 1}
    return sorted({t for t in targets if unquote(t) not in anchors} | twice)


def test_link_checker_itself():
    good = ["# A Title, (b) *now*\n[x](#a-title-b-now) [y](#A-Title,-(b)-now) [z](#spot)",
            '<a id="spot"></a>\n## Same\n## Same\n[s](#same-1) `[no](#code)`',
            "```\n# not a heading\n[no](#fenced)\n```\n[site](https://a.b/#c)"]  # fmt: skip
    assert broken_links(good) == []
    assert broken_links([*good, "[x](#not-a-heading) [y](#gone)"]) == ["gone", "not-a-heading"]
    assert broken_links(['<a id="p"></a>', "<a name='p'></a>"]) == ["p"]


def test_committed_links(committed):
    sources = [c.source for c in committed.cells if c.cell_type == "markdown"]
    assert broken_links(sources) == []
