"""The PDF: what must be in it, what is shown as source with a notice, and which notebook it is."""

import base64
import io
import json
import re
import sys
import types
from pathlib import Path
from unicodedata import normalize

import nbformat
import pypdf
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook, new_output
from nbformat.v4 import new_markdown_cell as md
from PIL import Image

import utils

SVG = "<svg xmlns='http://www.w3.org/2000/svg' width='80' height='40'><path d='M1 1h9'/></svg>"
WHO = 'NAME = "Ada"  # @param {type:"string"}\nSTUDENT_NUMBER = 4000\nDISCUSSED_WITH = ["Bob"]'


def png(width: int = 60, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, 30)).save(file, kind)
    return file.getvalue()


def code(source: str, *outputs: dict, tags: tuple = ()) -> dict:
    about = {"tags": list(tags)}
    return new_code_cell(source, outputs=list(outputs), metadata=about, execution_count=1)


def shown(data: dict, **about) -> dict:
    return new_output("display_data", data, metadata=about)


def stream(text: str, name: str = "stdout") -> dict:
    return new_output("stream", text=text, name=name)


def notebook(*cells: dict) -> str:
    return nbformat.writes(new_notebook(cells=list(cells)))


class Exported:
    """A PDF read back: words of each page, notices but the one on the name cell, the images."""

    def __init__(self, text: str, folder: Path = ROOT):
        exporter = utils.TypstPDFExporter()
        where = {"metadata": {"path": str(folder)}}
        content, _ = exporter.from_file(io.StringIO(text), where)
        self.reader = pypdf.PdfReader(io.BytesIO(content))
        texts = [normalize("NFKC", page.extract_text()) for page in self.reader.pages]
        self.pages = [" ".join(text.split()) for text in texts]
        self.text = " ".join(self.pages)
        self.all_notices = exporter.notices
        self.notices = [text for text in exporter.notices if "name cell lacks" not in text]
        self.images = sum(len(page.images) for page in self.reader.pages)
        self.links = [link for page in self.reader.pages for link in page.get("/Annots", [])]


def export(*cells: dict, folder: Path = ROOT) -> Exported:
    return Exported(notebook(*cells), folder)


MARKDOWN = {
    "<div>\nthe rate $\\alpha$ and $$x^2$$\n</div>": "the rate α and x2",
    "<div>costs $5 and $\\beta$ holds</div>": "costs $5 and β holds",
    "<div>so $ \\gamma $ and $5 to $6</div>": "so γ and $5 to $6",
    "<div>costs 5$ and 6$ more</div>": "costs 5$ and 6$ more",
    "inline $ x^2 + \\alpha $ here": "inline x2 + α here",
    "<div class='alert'>my own answer</div>\n\n<details><summary>Why?</summary>\n\nbecause of "
    "*this*\n\n</details>": "my own answer Why? because of this",
    "H<sub>2</sub>O<br>and <font color='red'>red</font> <b>bold</b>": "H2O and red bold",
    "Results:\n| $a$ | ![x](p.png) |\n|:--|--:|\n| wide | 2 |": "Results: a wide 2",
    "x #let x = [1] @ref a_b_c \\foo `#c` ~": "x #let x = [1] @ref a_b_c \\foo #c ~",
    "<center>unclosed <div>block": "unclosed block",
    "costs 5 $ or 6 dollars, \\$7 and \\$8": "costs 5 $ or 6 dollars, $7 and $8",
}


def test_markdown_and_html_are_set(tmp_path):
    (tmp_path / "p.png").write_bytes(png())
    pdf = export(*map(md, MARKDOWN), md("the last cell"), folder=tmp_path)
    for source, words in MARKDOWN.items():
        assert words in pdf.text, source
    assert "the last cell" in pdf.text and not pdf.notices and pdf.images == 1
    assert not re.search(r"rgb\(|DejaVu|\||<br|⟦", pdf.text)


def test_links_lead_to_headings_and_the_words_of_broken_ones_stay():
    links = "[1 (b)](#1-(b)-Each-data-set), [git](#1-b-each-data-set), [web](https://a.org/b)"
    links += ", [map](#The-map-$A$)"
    broken = f"[dead](#nowhere), [empty](), [long](http://a/{'x' * 2500})"
    headings = map(md, ["## 1 (b) Each data set", "## Curves", "## Curves", "## The map $A$"])
    html = {"text/html": "<a href='https://a.org/?q=$ab$'>query</a>"}  # no formula
    pdf = export(md(f"# Title\n{links}, {broken}"), *headings, code("f()", shown(html)))
    addresses = [link.get_object().get("/A", {}).get("/URI", "") for link in pdf.links]
    assert "https://a.org/?q=$ab$" in addresses
    assert "1 (b), git, web, map, dead, empty, long" in pdf.text and not pdf.notices
    assert len(pdf.links) == 5


def test_a_link_to_a_heading_that_is_elsewhere_gets_its_label():
    there = "== Here\n<section-2>\n"
    links = "#link(<section-1>)[one] #link(<section-2>)[two]\n"
    assert utils.stubs_of_missing_labels(links + there) == "\n#metadata(none) <section-1>"
    assert utils.stubs_of_missing_labels(there) == ""


def test_what_cannot_be_shown_is_named():
    sources = [
        "![words](gone.png)",
        "PDF/A ![words](data:image/png;base64,AAAA)",
        "![words](attachment:gone.png)",
        "<iframe src='words'></iframe>",
        "<object data='a.swf'><embed src='words'></object>",
    ]
    interactive = [
        {"application/vnd.plotly.v1+json": {}},
        {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "IntSlider()"},
        {"text/html": "<div></div><script>plot()</script>"},
    ]
    cells = [md(f"kept {source} too") for source in sources]
    pdf = export(*cells, *[code("f()", shown(data)) for data in interactive])
    assert [text.partition(":")[0] for text in pdf.notices] == [f"cell {n}" for n in range(1, 9)]
    assert pdf.text.count("kept") == pdf.text.count("too") == 5
    assert "PDF/A" in pdf.text  # these words do not hide that the image is broken
    assert pdf.text.count("not shown here") == 3


def test_images_of_every_kind_are_shown(tmp_path):
    (tmp_path / "a picture.png").write_bytes(png(61))
    attached, in_line, one, other = [base64.b64encode(png(n)).decode() for n in (62, 63, 64, 65)]
    cells = [
        md("![the loss $L_{\\text{KL}}$](a%20picture.png)"),
        md("![](attachment:in.png)", attachments={"in.png": {"image/png": attached}}),
        md(f"<img src='data:a;base64,{in_line}'>"),
        code("f()", shown({"image/png": one}), shown({"image/png": other, "text/markdown": "it"})),
        code("f()", shown({"image/jpeg": base64.b64encode(png(66, "JPEG")).decode()})),
    ]
    pdf = export(*cells, folder=tmp_path)
    widths = [image.image.width for page in pdf.reader.pages for image in page.images]
    assert not pdf.notices and sorted(widths) == [61, 62, 63, 64, 65, 66]


def test_letters_that_no_font_has_are_named():
    pdf = export(md("a letter \U00030000"), code(WHO.replace("Ada", "\U00030001")))
    assert "cell 1: no font here has \U00030000: install one" in pdf.notices
    assert "cell 2: no font here has \U00030001: install one" in pdf.notices


FORMULAS = r"""
\varepsilon \odot \oplus \otimes \cap \bigcap_i \setminus \approx \nabla \emptyset \sum_{i=1}^n
\int_0^1 \arg\min_x \operatorname{softmax}(x) \widehat{xy} \overrightarrow{AB} \mathcal{L}
\bm{x} \boldsymbol{\theta} \mathtt{lr} \text{words} \frac{a}{b} \binom{n}{k} \sqrt[3]{x} 10^{-3}
\left\|x\right\| \left.f\right|_{x=0} \|x\|_2 \boxed{x} \substack{a\\b} \% A^{\mathsf{T}}
x\nonumber x\tag{1} x\label{eq:a} {\bf{x}} \rm{ReLU} {\cal{L}} a<b
"""
INSIDE = ["pmatrix", "vmatrix", "Vmatrix", "cases", "aligned"]
WITHOUT_DOLLARS = ["align", "equation", "eqnarray"]


def test_formulas_that_students_use_are_set():
    inside = [rf"\begin{{{name}}} a & b \\ c & d \end{{{name}}}" for name in INSIDE]
    bare = [rf"\begin{{{name}}} x = 1 + 2 \end{{{name}}}" for name in WITHOUT_DOLLARS]
    formulas = FORMULAS.split() + inside
    cells = [md(f"w{n} $ {f} $ and $${f}$$") for n, f in enumerate(formulas)]
    cells += [md(f"So\n\n{f}\n") for f in bare] + [code("f()", shown({"text/latex": bare[0]}))]
    pdf = export(*cells)
    assert pdf.notices == [] and pdf.text.replace(" ", "").count("x=1+2") == 4
    assert all(f"w{n} " in pdf.text for n in range(len(formulas)))
    assert not re.search(r"\\[a-z]|rgb\(|DejaVu|sect|circle|⟦", pdf.text)


def test_old_fonts_hold_for_all_letters_and_comments_and_quotes_end_where_tex_ends_them():
    assert utils.clean_tex(r"{\rm abc} x") == r"\mathrm{abc} x"
    assert utils.clean_tex("a &= 1 \\\\% secret\nb &= 2 \\%") == "a &= 1 \\\\ b &= 2 \\%"
    assert utils.with_current_symbol_names(r'"a \" sect" sect') == r'"a \" sect" inter'


def test_a_formula_that_cannot_be_set_costs_no_other():
    broken = [r"\nosuchmacro{x}", r"\frac{a}{b", r"{a\over{b}}"]
    pdf = export(*[md(f"w{n} ${tex}$, $a \\odot b$ end") for n, tex in enumerate(broken)])
    numbers = [re.match(r"cell (\d+): formula", text)[1] for text in pdf.notices]
    assert numbers == ["1", "2", "3"]
    assert "\\nosuchmacro{x}" in pdf.text and pdf.text.count("⊙") == 3
    assert all(f"w{n} " in pdf.text for n in range(3)) and pdf.text.count("end") == 3


def test_macros_reach_later_cells():
    definitions = r"$\newcommand{\E}{\mathbb{E}} \def\half{\frac{1}{2}}$"
    cells = [md(definitions), md(r"$\E[x] = \half$")]
    pdf = export(*cells, md(r"$$\DeclareMathOperator{\tr}{tr} \tr A$$"))
    assert not pdf.notices and "E[x]" in pdf.text and "tr A" in pdf.text and "\\" not in pdf.text


def test_outputs_are_shown_in_their_best_form():
    log = "".join(f"line {n} of the log\n" for n in range(500))
    table = "<style>b{}</style><table><tr><td>97.25</td></tr></table>"
    outputs = [
        stream(log),
        stream(" 40%|████   | 4/10\r100%|██████████| 10/10\n", "stderr"),
        stream("\x1b[31mred\x1b[0m words\n"),
        shown({"text/markdown": "| data |\n|---|\n| 98.76 |"}),
        shown({"text/html": table, "text/plain": "<pandas.io.formats.style.Styler at 0x7f>"}),
        shown({"text/html": "<b>html words</b> $x^2 &lt; y$"}),
        shown({"text/html": "<pre>echo $HOME/$USER</pre>"}),
        shown({"text/plain": "", "text/markdown": ""}),
        shown({"text/latex": "$\\displaystyle A \\cap B$", "text/plain": "Intersection(A, B)"}),
        shown(
            {"image/svg+xml": SVG, "text/plain": "<Figure size>"}, caption="Figure 7. Words, $x^2$."
        ),
        shown({"text/markdown": "*Figure 7. Words, $x^2$.*"}, is_caption=True),
        new_output("execute_result", {"text/plain": "value 18"}, execution_count=None),
        new_output("error", ename="AssertionError", evalue="", traceback=["Traceback 17"]),
        new_output("error", ename="E", evalue="e", traceback=["\x1b[1mTrace 99"]),
    ]
    pdf = export(code("f()", *outputs), md("<pre>cd $HOME/$DATA</pre>"))
    there = (
        "line 0 of|line 499 of|lines left out|red words|98.76|97.25|html words x2 < y|A ∩ B|"
        "echo $HOME/$USER|value 18|Traceback 17|Trace 99|cd $HOME/$DATA"
    )
    for words in there.split("|"):
        assert words in pdf.text, words
    for words in ["line 250", "40%", "Styler", "<Figure", "Intersection", "[31m", "[1m"]:
        assert words not in pdf.text, words
    assert pdf.text.count("Figure 7. Words, x2.") == 1 and not pdf.notices


@pytest.mark.parametrize(
    "who", [WHO.replace("NAME =", "NAME: str =", 1), "%env A3_PROFILE=tiny\n" + WHO]
)
def test_names_are_found_with_a_type_and_beside_a_magic(who):
    assert "Name: Ada" in export(md("a"), code(who)).text


def test_a_name_typed_into_a_new_cell_replaces_that_of_the_tagged_one():
    empty = code('NAME = ""\nSTUDENT_NUMBER = ""', tags=("submission",))
    assert "Name: Ada" in export(md("a"), empty, code(WHO)).text


def test_a_claim_is_not_found_within_longer_words():
    short, longer = md("It is fast."), md("It is faster than rain.")
    assert utils.contains_sentence(short, "It is fast")
    assert not utils.contains_sentence(longer, "It is fast")


def test_odd_content_costs_nothing():
    """Control characters, half an emoji, a mark like those of formulas, an impossible dict."""
    cells = [md("# A\x07b"), code("c = '\x1bd'", stream("e\x08f\x00\n"))]
    cells += [md("before \ud83d after"), md("the words ⟦formula 7⟧ and $x$")]
    cells += [code("d = {[1]: 2}"), md("the last cell")]
    pdf = export(*cells)
    for words in ["Ab", "c = 'd'", "ef", "before ? after", "formula 7", "the last cell"]:
        assert words in pdf.text, words
    assert not pdf.notices


def test_no_line_ends_between_a_number_and_its_unit_but_code_keeps_its_spaces():
    pdf = export(
        md("so 95 % in Table 4 and Table A4, `96 %` <!-- not 98 % sure -->"), code("# 97 %")
    )
    words = pdf.reader.pages[0].extract_text()
    assert "sure" not in words
    for text in ("95\xa0%", "Table\xa04", "Table\xa0A4", "96 %", "97 %"):
        assert text in words


def test_colabs_metadata_of_widgets_costs_no_output():
    nb = json.loads(notebook(code("f()", shown({"text/html": "<b>kept 19</b>"}))))
    nb["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {"id": {}}}
    pdf = Exported(json.dumps(nb))
    assert "kept 19" in pdf.text and not pdf.notices


def test_a_table_longer_than_a_page_goes_on_on_the_next():
    rows = "".join(f"<tr><td>{n}</td><td>row{n}end</td></tr>" for n in range(150))
    pdf = export(code("f()", shown({"text/html": f"<table>{rows}</table>"})))
    per_page = [len(re.findall(r"row\d+end", page)) for page in pdf.pages]
    assert sum(per_page) == 150 and len(per_page) > 2 and max(per_page) < 75


def test_a_table_wider_than_the_page_is_set_smaller_and_named():
    cells = "".join(f"<td>{n}.000{n:03}</td>" for n in range(24))
    pdf = export(code("f()", shown({"text/html": f"<table><tr>{cells}</tr></table>"})))
    assert all(f"{n}.000{n:03}" in pdf.text.split() for n in range(24))
    assert pdf.notices and "24 columns" in pdf.notices[0]


def test_a_line_without_a_space_breaks_anywhere():
    line = "0123456789abcdef" * 40
    page = export(md(f"text {line}"), code(f'key = "{line}"', stream(line + "\n"))).reader.pages[0]
    lines = page.extract_text().replace("\u200b", "").splitlines()
    assert max(map(len, lines)) < 140 and len(lines) > 12


def test_head_body_and_appendix():
    claims = {"Ours is better.": True, "It is fast": False, "It is small": False}
    cells = [
        md("# My Title\nintroduction"),
        code(WHO),
        md("## Question 1\nIt is\n**fast**."),
        md("moved words", metadata={"tags": ["cell-in-appendix"]}),
        code("#@title Curves\nplot()", stream("curve output"), tags=("code-in-appendix",)),
        code("#@title Text\nmake_text()", stream("computed words"), tags=("hide-code",)),
        code("check()", shown({"text/plain": "judged"}, claims=claims), tags=("claims",)),
        code("#@title List\nlist_all()", stream("long list"), tags=("cell-in-appendix",)),
        code("secret = 1", stream("secret output"), tags=("hide-pdf",)),
        code("helper_module()", tags=("helper-module",)),
        code("pip()", tags=("install",)),
        code("export()", tags=("export",)),
    ]
    pdf = export(*cells)
    order = "My Title|Name: Ada|4000|Bob|introduction|curve output|computed words|judged|Appendix|"
    order = (order + "moved words|Curves plot()|List list_all()|long list").split("|")
    found = [pdf.text.find(words) for words in order]
    assert found == sorted(found) and min(found) >= 0
    hidden = "@title|make_text|check()|secret|helper_module|pip()|export()|NAME ="
    for words in hidden.split("|"):
        assert words not in pdf.text, words
    assert pdf.all_notices == [
        "cell 3: does not hold in this run: It is fast",
        "cell 7: 2 of 3 claims do not hold",
        "cell 7: does not hold in this run: It is small",  # which stands in no text
    ]


@pytest.mark.parametrize("source", [WHO.replace("Ada", ""), "NAME = '"])
def test_a_missing_name_is_named(source):
    pdf = export(md("a"), code(source, tags=("submission",)))
    assert "Name: empty" in pdf.text and source not in pdf.text
    assert pdf.all_notices[0].startswith("cell 2: the name cell lacks NAME")


def save(path: Path, words: str) -> Path:
    path.write_text(notebook(md(words)), encoding="utf-8")
    return path


def text_of(pdf: Path) -> str:
    return pypdf.PdfReader(pdf).pages[0].extract_text()


def test_the_running_notebook_is_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    one = save(tmp_path / "assignment3.ipynb", "words of one")
    assert "name cell lacks" in utils.export_pdf()[0]
    told = capsys.readouterr().out
    assert "name cell lacks" in told and str(one.with_suffix(".pdf")) in told
    copy = save(tmp_path / "my copy.ipynb", "words of the copy")
    with pytest.raises(FileNotFoundError, match="my copy"):
        utils.export_pdf()
    monkeypatch.setenv("JPY_SESSION_NAME", str(copy))
    utils.export_pdf()
    assert "words of the copy" in text_of(copy.with_suffix(".pdf"))
    monkeypatch.setattr(sys.modules["__main__"], "__vsc_ipynb_file__", str(one), raising=False)
    wanted = tmp_path / "new" / "hand-in v1.2"  # a name that is given stays as it is
    utils.export_pdf(pdf=wanted)
    assert "words of one" in text_of(wanted)


@pytest.mark.parametrize(
    ("kernel", "exported"),
    [
        ("google.colab._shell", "words in Colab"),
        ("ipykernel.zmqshell", "words of the file"),  # google.colab is installed elsewhere
    ],
)
def test_only_colab_is_asked_for_the_open_notebook(kernel, exported, tmp_path, monkeypatch):
    nb = json.loads(notebook(md("words in Colab"))) | {"metadata": {"colab": {"name": "one.ipynb"}}}
    message = types.SimpleNamespace(blocking_request=lambda *_, **__: {"ipynb": nb})
    monkeypatch.setitem(sys.modules, "google.colab._message", message)
    monkeypatch.setattr(utils, "get_ipython", type("Shell", (), {"__module__": kernel}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    save(tmp_path / "one.ipynb", "words of the file")
    utils.export_pdf()  # and a browser that takes no PDF is no error
    assert exported in text_of(tmp_path / "one.pdf")


def letters(text: str) -> str:
    """Letters and digits only: line breaks and markup do not count."""
    return re.sub(r"[\W_]+", "", normalize("NFKC", text))


@pytest.mark.slow
def test_every_heading_caption_and_number_of_the_notebook_is_in_its_pdf():
    text = (ROOT / "assignment3.ipynb").read_text(encoding="utf-8")
    pdf = Exported(text)
    there = letters(pdf.text)
    wanted = []
    for cell in nbformat.reads(text, as_version=4).cells:
        if utils.LEFT_OUT_TAGS & set(cell.metadata.get("tags", [])):
            continue
        if cell.cell_type == "markdown":
            for heading in re.findall(r"(?m)^#+ +(.+)", cell.source):
                wanted += re.split(r"\$.*?\$|<.*?>", heading)
        for output in cell.get("outputs", []):
            data, about = output.get("data", {}), output.get("metadata", {})
            wanted.append(about.get("caption", ""))
            table = re.sub(r"<[^>]*>|\$.*?\$|\]\(.*?\)", " ", data.get("text/html", ""))
            words = re.sub(r"\$.*?\$|\]\(.*?\)", " ", data.get("text/markdown", ""))
            wanted += re.findall(r"\d+\.\d+", table + words)
    missing = [words for words in wanted if letters(words) not in there]
    assert wanted and missing == []
    assert not pdf.notices


def test_a_heading_never_stands_alone_at_the_foot_of_a_page():
    lines = "\n".join(f"line_{n} = {n}" for n in range(14))
    cells = [cell for n in range(12) for cell in (md(f"## Heading {n}"), code(lines))]
    for page in export(*cells).pages:
        assert not re.search(r"Heading \d+ \d+ / \d+$", page)
