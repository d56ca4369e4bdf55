"""The PDF: what must be in it, what is shown as source with a notice, and which notebook it is."""

import base64
import io
import json
import re
import sys
import types
from pathlib import Path

import pytest
from PIL import Image

import utils

pypdf = pytest.importorskip("pypdf")
for _name in ("nbconvert", "pypandoc", "typst"):
    pytest.importorskip(_name)

ROOT = Path(__file__).resolve().parents[1]
SVG = "<svg xmlns='http://www.w3.org/2000/svg' width='80' height='40'><path d='M1 1h9'/></svg>"
LONG_LINE = "value = function(" + ", ".join(f"name_{i}" for i in range(40)) + ")"
WHO = 'NAME = "Ada"\nSTUDENT_NUMBER = 4000\nDISCUSSED_WITH = ["Bob", "Eve"]'


def png(width: int = 60, height: int = 30, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


GIF = "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def md(source: str, *tags: str, **fields) -> dict:
    return {"cell_type": "markdown", "metadata": {"tags": list(tags)}, "source": source} | fields


def code(source: str, *outputs: dict, tags: tuple = ()) -> dict:
    cell = {"cell_type": "code", "metadata": {"tags": list(tags)}, "execution_count": 1}
    return cell | {"source": source, "outputs": list(outputs)}


def shown(data: dict, **about) -> dict:
    return {"output_type": "display_data", "data": data, "metadata": about}


def stream(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


def export(*cells, folder: Path = ROOT) -> tuple[list[str], list[str], pypdf.PdfReader]:
    """Words of each page, notices without the reminder of the name cell, and the PDF."""
    pdf, notices = utils.notebook_to_pdf({"cells": list(cells), "metadata": {}}, folder)
    reader = pypdf.PdfReader(io.BytesIO(pdf))
    pages = [" ".join(page.extract_text().split()) for page in reader.pages]
    return pages, [text for text in notices if "name cell lacks" not in text], reader


def images(reader: pypdf.PdfReader) -> int:
    return sum(len(page.images) for page in reader.pages)


# ---- Markdown and HTML ----

MARKDOWN = {
    "inline $ x^2 + \\alpha $ here": "inline 𝑥2 + 𝛼 here",
    "<div class='alert'>my own answer</div>\n\n<details><summary>Why?</summary>\n\nbecause of "
    "*this*\n\n</details>": "my own answer Why? because of this",
    "H<sub>2</sub>O<br>and <font color='red'>red</font> <b>bold</b>": "H2O and red bold",
    "Results:\n| a | b |\n|---|---|\n| 1 | 2 |": "Results: a b 1 2",
    "Results:\n| $a$ | ![x](p.png) |\n|:--|--:|\n| wide | 2 |": "Results: 𝑎 wide 2",
    "- [x] done\n- [ ] open": "• ☒ done • ☐ open",
    "x #let x = [1] @ref a_b_c \\foo `#c` ~": "x #let x = [1] @ref a_b_c \\foo #c ~",
    "<center>unclosed <div>block": "unclosed block",
    "```python\ndef open(): pass": "def open(): pass",
    "a [dead](#nowhere), [empty](), [here](#H) link\n\n# H": "a dead, empty, here link",
    "<a id='spot'></a> [to it](#spot)": "to it",
    "Привет, ελληνικά": "Привет, ελληνικά",
    "costs 5 $ or 6 dollars": "costs 5 $ or 6 dollars",
    "= not a heading\n\n/ term: x": "= not a heading / term: x",
}


def test_markdown(tmp_path):
    (tmp_path / "p.png").write_bytes(png())
    pages, notices, reader = export(*map(md, MARKDOWN), md("the last cell"), folder=tmp_path)
    text = " ".join(pages)
    for source, words in MARKDOWN.items():
        assert words in text, source
    assert "the last cell" in text and not notices and images(reader) == 1
    assert not re.search(r"rgb\(|DejaVu|\||<br", text)


def test_what_cannot_be_shown_is_named():
    sources = ["![words](gone.png)", "<img src='gone.png' alt='words'>", "<svg id='words'></svg>",
               "![words](attachment:gone.png)", "![words](http://a.b/c.png)",
               "![words](data:image/png;base64,AAAA)", "<iframe src='words'></iframe>",
               "<video src='words'></video>"]  # fmt: skip
    pages, notices, _ = export(*[md(f"kept{n} {source} too") for n, source in enumerate(sources)])
    assert sorted(text.partition(":")[0] for text in notices) == [f"cell {n + 1}" for n in range(8)]
    assert all(f"kept{n}" in pages[0] for n in range(8)) and pages[0].count("too") == 8
    assert pages[0].count("[image: words]") == 5 and pages[0].count("is not shown") == 3


def test_images_of_every_kind(tmp_path):
    (tmp_path / "a picture.png").write_bytes(png(61))
    sources = [
        "![one](a%20picture.png)",
        "![two](attachment:in.png)",
        f"<img src='data:a;base64,{GIF}'>",
    ]
    attached = {"in.png": {"image/png": base64.b64encode(png(62)).decode()}}
    cells = [md(source, attachments=attached) for source in sources]
    kinds = [{"image/png": base64.b64encode(png(9000, 9000, "1")).decode()}, {"image/gif": GIF}]
    pages, notices, reader = export(*cells, code("f()", *map(shown, kinds)), folder=tmp_path)
    assert not notices and images(reader) >= 4


# ---- Formulas ----

SET = r"""
\alpha \varepsilon \vartheta \varphi \Gamma \Omega \pm \mp \times \div \cdot \ast \circ \bullet
\odot \oplus \ominus \otimes \oslash \cap \cup \sqcap \uplus \vee \wedge \setminus \dagger \leq
\geq \neq \equiv \approx \cong \sim \simeq \propto \ll \gg \prec \succeq \subset \supseteq \in
\notin \ni \perp \parallel \mid \models \vdash \triangleq \coloneqq \lesssim \leftarrow \to \gets
\leftrightarrow \Rightarrow \Leftrightarrow \mapsto \longrightarrow \implies \iff \uparrow
\hookrightarrow \rightsquigarrow \xrightarrow{a} \infty \partial \nabla \forall \exists \emptyset
\varnothing \Re \Im \hbar \ell \top \bot \neg \prime \square \checkmark \therefore \ldots \cdots
\vdots \ddots \sum_{i=1}^n \prod_i \int_0^1 \iint \oint \bigcap_i \bigcup_i \bigoplus_i
\bigotimes_i \bigodot_i \sin \log \exp \lim_{x\to0} \max_x \arg\min_x \sup \det \dim \ker \gcd \Pr
\operatorname{softmax}(x) \operatorname*{arg\,max}_x \hat{x} \widehat{xy} \bar{x} \overline{xy}
\underline{xy} \tilde{x} \widetilde{xy} \vec{x} \dot{x} \ddot{x} \check{x} \overrightarrow{AB}
\overbrace{a+b}^{n} \underbrace{a+b}_{n} \overset{!}{=} \underset{x}{\min} \stackrel{d}{=}
\mathbb{R} \mathcal{L} \mathscr{L} \mathfrak{g} \mathbf{x} \boldsymbol{\theta} \bm{x} \mathrm{d}x
\mathit{ab} \mathsf{ab} \mathtt{lr} \text{words} \textbf{b} \texttt{c} \mbox{m} \frac{a}{b}
\dfrac{a}{b} \tfrac{a}{b} \binom{n}{k} \sqrt{x} \sqrt[3]{x} a^{b_c} x_{i,j}^{(t+1)}
x' \left(\frac{a}{b}\right) \left[x\right] \left\{x\right\} \left|x\right| \left\|x\right\|
\lfloor{x}\rfloor \lceil{x}\rceil \langle{x}\rangle \left.f\right|_{x=0} \bigl(x\bigr) \Big[x\Big]
\lvert{x}\rvert \|x\|_2 a\,b a\;b a\!b a\quad{b} a~b \phantom{x} \displaystyle{x} \color{red}{x}
\boxed{x} \cancel{x} \substack{a\\b} \% \# \& \_ \{x\} \backslash x^\top
A^{\mathsf{T}} 10^{-3} a\bmod{b} a\pmod{3} x\nonumber x\tag{1} x\label{eq:a} {\bf{x}}
\rm{ReLU} {\cal{L}} a<b a>b"""
BLOCKS = [  # environments, and what has spaces
    *(rf"\begin{{{name}}} a & b \\ c & d \end{{{name}}}" for name in
      ["matrix", "pmatrix", "bmatrix", "vmatrix", "Vmatrix", "Bmatrix", "smallmatrix", "cases",
       "aligned", "align", "align*", "split", "eqnarray"]),
    r"\begin{equation} a = b \end{equation}", r"\begin{gather} a \\ b \end{gather}",
    r"\begin{array}{c|c} a & b \\ \hline c & d \end{array}",
    r"D_{\mathrm{KL}}(p \,\|\, q) = \mathbb{E}_{x \sim p} \left[ \log \frac{p(x)}{q(x)} \right]",
]  # fmt: skip
SHOWN_AS_SOURCE = r"""\nosuchmacro{x} \frac{a}{b x^{2 a&b \begin{tabular}{c}a\end{tabular} #1
\sideset{}{'}\sum {a\over{b}} \require{physics} \cfrac{a}{b} \textcolor{red}{x} x\notag
a\middle|b""".split()


def test_formulas_that_students_use_are_set():
    formulas = SET.split() + BLOCKS
    assert len(formulas) > 180
    cells = [md(f"w{n} $ {f} $ and $${f}$$") for n, f in enumerate(formulas)]
    pages, notices, _ = export(*cells)
    assert notices == []
    text = "".join(pages)
    assert all(f"w{n} " in text for n in range(len(formulas)))
    assert not re.search(r"\\[a-z]|rgb\(|DejaVu|sect|circle", text)


def test_formulas_that_cannot_be_set_are_shown_as_source():
    cells = [md(f"w{n} ${f}$, $a \\odot b$ end") for n, f in enumerate(SHOWN_AS_SOURCE)]
    pages, notices, _ = export(*cells)
    assert [re.match(r"cell (\d+): formula", text)[1] for text in notices] == [
        str(n) for n in range(1, len(cells) + 1)
    ]
    assert "\\nosuchmacro{x}" in pages[0] and all(f"w{n} " in pages[0] for n in range(len(cells)))
    assert pages[0].count("end") >= len(cells) and pages[0].count("⊙") == len(cells)


def test_macros_reach_other_cells():
    cells = [md(r"$\newcommand{\E}{\mathbb{E}}\def\half{\frac{1}{2}}$"), md(r"$\E[x] = \half$")]
    pages, notices, _ = export(*cells, md(r"$$\DeclareMathOperator{\tr}{tr} \tr A$$"))
    assert not notices and "𝔼[𝑥]" in pages[0] and "tr 𝐴" in pages[0] and "\\" not in pages[0]


def test_a_macro_without_end_costs_no_more_than_the_formulas():
    pages, notices, _ = export(md(r"kept $\newcommand{\loop}{\loop}\loop$"), md("$x^2$ too"))
    assert "kept" in pages[0] and "x^2 too" in pages[0] and len(notices) == 2


# ---- Outputs, and notebooks as found in the wild ----


def test_outputs():
    log = "".join(f"line {n} of the log\n" for n in range(500))
    table = "<style>b{}</style><table><tr><th>acc</th></tr><tr><td>97.25</td></tr></table>"
    styler, page = "<pandas.io.formats.style.Styler at 0x7f>", "<IPython.core.display.HTML object>"
    outputs = [
        stream(log),
        stream(" 40%|████   | 4/10\r100%|██████████| 10/10\n", "stderr"),
        stream("\x1b[31mred\x1b[0m words\nold state\rnew state\n"),
        shown({"text/markdown": "| data | accuracy |\n|---|--:|\n| digits | 98.76 |"}),
        shown({"text/html": table, "text/plain": styler}),
        shown({"text/html": "<b>only html 815</b>", "text/plain": page}),
        shown({"text/plain": "plain words 4711", "text/html": "<b>html words</b>"}),
        shown({"text/latex": "$\\displaystyle A \\cap B$", "text/plain": "Intersection(A, B)"}),
        shown({"image/svg+xml": SVG, "text/plain": "<Figure size>"}, caption="Figure 7. Words."),
        shown({"text/plain": ""}),
        shown({"text/markdown": "*for the screen*"}, is_caption=True),
        {"output_type": "error", "ename": "E", "evalue": "e", "traceback": ["\x1b[1mTrace 99"]},
    ]
    pages, notices, reader = export(code(LONG_LINE, *outputs))
    text = " ".join(pages)
    there = "line 0 of|line 499 of|lines left out|red words|new state|98.76|97.25|only html 815"
    for words in (there + "|html words|𝐴 ∩ 𝐵|Trace 99|Figure 7. Words.|name_39").split("|"):
        assert words in text, words
    gone = "line 250|40%|old state|Styler|IPython.core|<Figure|for the screen|Intersection|[31m|[1m"
    for words in gone.split("|"):
        assert words not in text, words
    assert not notices
    lines = [line for line in reader.pages[0].extract_text().splitlines() if "name_" in line]
    assert len(lines) > 3 and max(map(len, lines)) <= 120


def test_interactive_outputs_say_so():
    widget = "application/vnd.jupyter.widget-view+json"
    kinds = [
        {"application/vnd.plotly.v1+json": {}},
        {"application/javascript": "x()"},
        {"text/html": "<div></div><script>plot()</script>"},
        {widget: {}},
    ]
    pages, notices, _ = export(*[code("f()", shown(data)) for data in kinds])
    assert pages[0].count("not shown here") == 4
    assert [text.partition(":")[0] for text in notices] == [f"cell {n}" for n in range(1, 5)]


def test_fields_that_are_missing():
    cells = [
        {"cell_type": "markdown", "metadata": {"tags": None}, "source": ["kept ", "words"]},
        {"cell_type": "code", "source": "x1"}, {"cell_type": "raw", "source": "raw words"},
        {"cell_type": "code", "source": "y1", "outputs": [
            {"output_type": "stream", "text": ["told"]}, {"output_type": "display_data"},
            {"output_type": "display_data", "data": {"text/plain": ["seen"]}},
            {"output_type": "error", "ename": "Err", "evalue": "why"}]},
    ]  # fmt: skip
    text = " ".join(export(*cells)[0])
    assert all(w in text for w in ["kept words", "x1", "y1", "told", "seen", "why", "raw words"])
    assert utils.notebook_to_pdf({}, ROOT)[0].startswith(b"%PDF")


def test_letters_that_no_font_has_are_named():
    cells = [md("a letter \U00030000"), code('NAME = "\U00030001"', tags=("submission",))]
    pages, notices, _ = export(*cells, md("✅ passed"))
    if any("✅" in text for text in notices):  # else this machine has a font of emoji
        assert "cell 3: no font here has ✅" in "".join(notices)
    assert {"cell 1: no font here has \U00030000: install one",
            "cell 2: no font here has \U00030001: install one"} <= set(notices)  # fmt: skip
    assert "passed" in pages[0]


# ---- Pages ----


def test_first_page_body_and_appendix():
    table = {"text/markdown": "| | MNIST |\n|:--|--:|\n| 1 (b) single | 99.4 |\n| Question 2 | x |"}
    stand_in = {"text/markdown": "> rendered numbers stand in"}
    cells = [
        md("# My Title\nintroduction"),
        code(WHO),
        md("## Question 1\n### 1 (b) Each\nbody words"),
        code("#@title Curves\nplot()  # fmt: skip", stream("curve output"), tags=("appendix",)),
        code("#@title Text\nmake_text()", stream("computed words"), tags=("hide-code",)),
        md("## Question 2"),
        code("secret = 1", stream("secret output"), tags=("hide-pdf",)),
        code("helper_module()", tags=("helper-module",)),
        code("pip()", tags=("install",)),
        code("#@title x\nglance()", shown(table), shown(stand_in), tags=("front-page",)),
        code("export()", tags=("export", "hide-pdf")),
    ]
    pages, notices, reader = export(*cells)
    order = "My Title|Ada|4000|Bob, Eve|Answers at a glance|1 (b) single|99.4|rendered numbers"
    order = (order + "|introduction|body words|curve output|computed words").split("|")
    found = [pages[0].find(words) for words in order]
    assert found == sorted(found) and min(found) >= 0 and not notices
    assert "Appendix" in pages[-1] and "Curves plot()" in pages[-1] and len(pages) == 2
    gone = "fmt:|@title|make_text|secret|helper_module|pip()|glance()|export()|Name: empty"
    for words in gone.split("|"):
        assert words not in " ".join(pages), words
    links = [
        a for a in reader.pages[0].get("/Annots", []) if "/Dest" in a or "/A" in a.get_object()
    ]
    assert len(links) >= 2
    assert utils.notebook_to_pdf({"cells": cells}, ROOT) == utils.notebook_to_pdf(
        {"cells": cells}, ROOT
    )


@pytest.mark.parametrize(
    "source", ['NAME = ""\nSTUDENT_NUMBER = 1\nDISCUSSED_WITH = "x"', "NAME = Ada", "NAME = 'Ada"]
)
def test_reminder(source):
    pdf, notices = utils.notebook_to_pdf(
        {"cells": [md("a"), code(source, tags=("submission",))]}, ROOT
    )
    text = pypdf.PdfReader(io.BytesIO(pdf)).pages[0].extract_text()
    assert "Name: empty" in text and source not in text
    assert notices[0].startswith("cell 2: the name cell lacks NAME")


def test_definitions_and_headings_are_not_torn():
    lines = [f"    line_{n} = {n}" for n in range(21)]
    cells = []
    for n in range(12):
        cells += [
            md(f"## Heading {n}\n\nwords {n}\n\n" * 1),
            code("\n".join([f"def f{n}():", *lines, f"    end_{n} = 1\n\n\ndef g{n}():", *lines])),
        ]
    pages, _, _ = export(*cells)
    for n in range(12):
        (page,) = [page for page in pages if f"def f{n}():" in page]
        assert f"end_{n} =" in page
        assert not page.partition("1 / ")[0].rstrip().endswith(f"Heading {n}")


# ---- Which notebook, and where to ----


def save(path: Path, words: str, **fields) -> Path:
    nb = {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {},
        "cells": [md(words, id="a"), md("x", id="a")],
    }
    path.write_text(json.dumps(nb | fields), encoding="utf-8")
    return path


def text_of(pdf: Path) -> str:
    return pypdf.PdfReader(pdf).pages[0].extract_text()


def test_the_running_notebook_is_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    with pytest.raises(FileNotFoundError, match="none of \\[\\]"):
        utils.export_pdf()
    one = save(tmp_path / "assignment3.ipynb", "words of one")
    assert "name cell lacks" in utils.export_pdf()[0]
    assert str(one.with_suffix(".pdf")) in capsys.readouterr().out
    copy = save(tmp_path / "my copy.ipynb", "words of the copy")
    with pytest.raises(FileNotFoundError, match="Jupyter.*'assignment3.ipynb', 'my copy.ipynb'"):
        utils.export_pdf()
    monkeypatch.setenv("JPY_SESSION_NAME", str(copy))
    utils.export_pdf()
    assert "words of the copy" in text_of(copy.with_suffix(".pdf"))
    monkeypatch.setattr(sys.modules["__main__"], "__vsc_ipynb_file__", str(one), raising=False)
    utils.export_pdf(pdf=tmp_path / "new" / "out.pdf")
    assert "words of one" in text_of(tmp_path / "new" / "out.pdf")
    utils.export_pdf(copy)
    with pytest.raises(FileNotFoundError, match="gone.ipynb"):
        utils.export_pdf(tmp_path / "gone.ipynb")


def test_old_formats_and_byte_order_mark(tmp_path):
    path = save(tmp_path / "n.ipynb", "after a mark")
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    utils.export_pdf(path)
    assert "after a mark" in text_of(path.with_suffix(".pdf"))
    out = {"output_type": "stream", "stream": "stdout", "text": "old words"}
    cell = {"cell_type": "code", "language": "python", "input": "old_code()", "outputs": [out]}
    save(path, "", nbformat=3, nbformat_minor=0, worksheets=[{"cells": [cell]}])
    utils.export_pdf(path)
    assert re.search(r"(?s)old_code\(\).*old words", text_of(path.with_suffix(".pdf")))


def colab(monkeypatch, answer) -> list:
    """Pretend to be in Colab, whose front end gives (or raises) `answer`; the files offered."""

    def request(*args, **kwargs):
        if isinstance(answer, Exception):
            raise answer
        return answer

    offered, space = [], types.SimpleNamespace
    modules = {
        "google": types.ModuleType("google"),
        "google.colab": types.ModuleType("google.colab"),
        "google.colab._message": space(blocking_request=request),
        "google.colab.files": space(download=offered.append),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return offered


def test_colab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nb = {"cells": [md("words in Colab")], "metadata": {"colab": {"name": "mine.ipynb"}}}
    offered = colab(monkeypatch, {"ipynb": nb})
    utils.export_pdf()
    assert offered == ["mine.pdf"] and "words in Colab" in text_of(tmp_path / "mine.pdf")


@pytest.mark.parametrize("answer", [None, RuntimeError("MessageError: refused"), {}])
def test_colab_silent_or_refusing(tmp_path, monkeypatch, answer):
    monkeypatch.chdir(tmp_path)
    colab(monkeypatch, answer)
    with pytest.raises(RuntimeError, match="run this cell again.*File > Download"):
        utils.export_pdf()


@pytest.mark.parametrize("module", ["pypandoc", "typst", "nbconvert.filters"])
def test_a_missing_package_is_named(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=module):
        utils.notebook_to_pdf({"cells": []}, ROOT)


# ---- The committed notebook ----


@pytest.fixture(scope="module")
def committed() -> dict:
    nb = json.loads((ROOT / "assignment3.ipynb").read_text(encoding="utf-8"))
    if not any(cell.get("outputs") for cell in nb["cells"]):
        pytest.skip("assignment3.ipynb is not executed yet")
    return nb


def letters(text: str) -> str:
    """Letters and digits only: line breaks and markup do not count."""
    return re.sub(r"[\W_]+", "", text)


@pytest.mark.slow
def test_committed_notebook_is_all_there(committed):
    pages, notices, reader = export(*committed["cells"])
    text, figures = letters("".join(pages)), 0
    assert notices == []
    hidden = {"hide-pdf", "submission", "helper-module", "install", "export"}
    for cell in committed["cells"]:
        if hidden & set(cell["metadata"].get("tags", [])):
            continue
        if cell["cell_type"] == "markdown":
            for heading in re.findall(r"(?m)^#+ +(.+)", "".join(cell["source"])):
                assert all(letters(part) in text for part in re.split(r"\$.*?\$|<.*?>", heading)), (
                    heading
                )
        for out in cell.get("outputs", []):
            data, about = out.get("data", {}), out.get("metadata", {})
            figures += "image/png" in data
            if "caption" in about:
                assert letters(about["caption"])[:60] in text, about["caption"]
            if "text/markdown" in data and not about.get("is_caption"):
                words = re.sub(r"\$.*?\$|\]\(.*?\)", " ", "".join(data["text/markdown"]))
                for number in re.findall(r"\d+\.\d+", words):
                    assert letters(number) in text, number
    assert images(reader) >= figures > 0 and len(pages) > 5


@pytest.mark.slow
def test_committed_notebook_has_few_pages(committed):
    if not any("front-page" in cell["metadata"].get("tags", []) for cell in committed["cells"]):
        pytest.skip("the notebook has no cell tagged front-page yet")
    pages, _, reader = export(*committed["cells"])
    body = next((n for n, page in enumerate(pages) if "Appendix: code" in page), len(pages))
    assert body <= 18 and len(pages) - body <= 6
    assert "Answers at a glance" in pages[0] and reader.pages[0].get("/Annots")
