"""Keep assignment3.ipynb in order; load its definitions for tests and training scripts.

python tools/notebook.py sync               copy utils.py into the notebook's helper cell
python tools/notebook.py run OUT.ipynb      execute the notebook into OUT.ipynb
python tools/notebook.py publish RUN.ipynb  take over outputs, figures, README table of a run
python tools/notebook.py results [RUN]      print the table of answers of an executed notebook
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import linecache
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import time
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import nbclient
import nbformat
from bs4 import BeautifulSoup
from jupyter_client import AsyncKernelManager
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "assignment3.ipynb"
TRIPLE_QUOTE = "'''"  # around the copy of utils.py in the helper cell
# The first words of a cell that quotes code: its file, and the function or method.
CODE_REFERENCE = re.compile(r"`(?P<file>[\w/]+\.py)`: `(?P<name>[\w.]+)`")
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
PDF_SECTION = "# ---- PDF"  # where the last section of utils.py begins
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef)
README_START = "<!-- results: made by `make publish` -->"
README_END = "<!-- end of results -->"
LANGUAGE = {
    "name": "python",
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
HELPER_CELL = """\
# @title Helper: a copy of utils.py
import importlib.util
import sys
from pathlib import Path

UTILS = SOURCE

ours = Path("utils.py").resolve()
if not ours.exists():
    # Renamed when complete: a full disk or an interrupt must not leave half a module.
    unfinished = ours.with_name("utils.py.partial")
    unfinished.write_text(UTILS, encoding="utf-8", newline="\\n")
    unfinished.replace(ours)
elif ours.read_text(encoding="utf-8") != UTILS:
    print(
        "The utils.py in this folder differs from this copy, and is the one used; "
        "to use this copy, delete it, restart the kernel and run all cells."
    )
sys.path.insert(0, str(ours.parent))
importlib.invalidate_caches()
found = importlib.util.find_spec("utils")
if not found.origin or Path(found.origin) != ours:
    raise ImportError(
        f"Another module named utils is in the way: {found}. "
        "Rename it, restart the kernel and run all cells."
    )
"""


# ---- reading and writing ----


def read(path: Path) -> NotebookNode:
    """The notebook at `path`, whatever the locale. Raises FileNotFoundError where none is."""
    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)


def tidy_and_save(notebook: NotebookNode, path: Path) -> None:
    """Write `notebook`, changed in place: ids that follow its order, metadata that a reader needs.

    Cells that begin with `# @title` are folded; Colab is asked for a GPU. Raises
    nbformat.ValidationError for what is no notebook.
    """
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:03d}"
        cell.metadata = nbformat.from_dict(cell_metadata(cell))
    notebook.nbformat_minor = 5  # the first with ids; Colab's files are older
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": LANGUAGE,
            "accelerator": "GPU",
            "colab": {"provenance": [], "toc_visible": True, "gpuType": "T4"},
        }
    )
    nbformat.validate(notebook)
    temporary = path.with_name(f"{path.name}.part")  # a full disk must not cost the notebook
    temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")
    temporary.replace(path)


def cell_metadata(cell: NotebookNode) -> dict[str, Any]:
    """What is kept of a cell's metadata: its tags, and that it is folded."""
    metadata: dict[str, Any] = {}
    if tags(cell):
        metadata["tags"] = tags(cell)
    if cell.cell_type == "code" and cell.source.startswith("# @title"):
        metadata["cellView"] = "form"  # folded in Colab
        metadata["jupyter"] = {"source_hidden": True}  # folded in JupyterLab
    return metadata


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    """The cells that have this tag, in order."""
    return [cell for cell in notebook.cells if tag in tags(cell)]


def single_tagged_cell(notebook: NotebookNode, tag: str) -> NotebookNode:
    """The only cell with this tag. Raises ValueError when there is none or more than one."""
    found = tagged(notebook, tag)
    if len(found) != 1:
        raise ValueError(f"The notebook must have one cell tagged {tag!r}; it has {len(found)}.")
    return found[0]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def load_definitions(path: Path = NOTEBOOK) -> types.ModuleType:
    """What the notebook's cells tagged `definitions` define, executed in order as one module.

    The source of its functions can be inspected. The module cannot be imported by its name, so
    joblib sends its functions and classes to worker processes by value, as it does those of a
    notebook. Raises whatever the cells raise.
    """
    source = "\n\n\n".join(cell.source for cell in tagged(read(path), "definitions")) + "\n"
    module = types.ModuleType("assignment3")
    module.__file__ = f"<definitions of {path.name}>"
    lines = source.splitlines(keepends=True)
    linecache.cache[module.__file__] = (len(source), None, lines, module.__file__)
    # Without this file's own `from __future__ import annotations`, as in the notebook.
    code = compile(source, module.__file__, "exec", dont_inherit=True)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(code, vars(module))
    finally:
        del sys.modules[module.__name__]
    return module


# ---- sync ----


def helper_cell(source: str) -> str:
    """Text of the cell that carries `source` and writes it to utils.py where there is none.

    That cell raises ImportError where `import utils` would find another module. Raises ValueError
    for a source that cannot be quoted.
    """
    if TRIPLE_QUOTE in source:
        raise ValueError(
            f"utils.py must not hold {TRIPLE_QUOTE}: the notebook quotes it with them."
        )
    literal = f"r{TRIPLE_QUOTE}{source}{TRIPLE_QUOTE}"
    return HELPER_CELL.strip().replace("SOURCE", literal, 1)


def sync(path: Path = NOTEBOOK) -> None:
    """Refresh the notebook's copy of utils.py and the functions it quotes, and tidy its metadata.

    Raises ValueError when the notebook has not one cell for the copy, utils.py cannot be quoted, or
    a quoted function is not to be found.
    """
    notebook = read(path)
    source = (ROOT / "utils.py").read_text(encoding="utf-8")
    single_tagged_cell(notebook, "helper-module").source = helper_cell(source)
    for cell in tagged(notebook, "quotes-code"):
        reference = CODE_REFERENCE.search(cell.source)
        if not reference:
            raise ValueError(f"A cell tagged quotes-code names no file: {cell.source[:70]}")
        file = (ROOT / reference["file"]).read_text(encoding="utf-8")
        before, _, rest = cell.source.partition("```python\n")
        _, _, after = rest.partition("\n```")
        listing = f"```python\n{definition_source(file, reference['name'])}\n```"
        cell.source = before + listing + after
    tidy_and_save(notebook, path)


def definition_source(source: str, name: str) -> str:
    """The source of a function or class of a module, or of a method: "Trainer.train_step".

    With its decorators. Raises ValueError where there is no such function.
    """
    scope = ast.parse(source)
    for part in name.split("."):
        definitions = [node for node in scope.body if isinstance(node, DEFINITIONS)]
        named = [definition for definition in definitions if definition.name == part]
        if not named:
            raise ValueError(f"{name} is quoted, but not defined.")
        scope = named[0]
    decorators = [decorator.lineno for decorator in scope.decorator_list]
    lines = source.splitlines()[min([scope.lineno, *decorators]) - 1 : scope.end_lineno]
    return textwrap.dedent("\n".join(lines))


# ---- run ----


class Console:
    """Prints lines, and below them what is in progress: a progress bar, or a line without its end.

    A terminal shows each state of it, in one place; elsewhere (a log file) only its last state is
    printed.
    """

    def __init__(self, terminal: TextIO):
        self.terminal = terminal
        self.bar = ""  # the newest text of a display that changes
        self.unfinished = ""  # what the kernel printed after its last line end

    def write(self, text: str) -> None:
        """Take the next piece of what the kernel prints, of any length."""
        lines = (self.unfinished + text).split("\n")
        self.unfinished = lines.pop()
        for line in lines:
            self._write(visible(line) + "\n")
        self._draw_progress(self.bar or self.unfinished)

    def print_line(self, text: str) -> None:
        """Print a line above what is in progress."""
        self._write(text + "\n")
        self._draw_progress(self.bar or self.unfinished)

    def progress(self, text: str) -> None:
        """Show a new state of the bar."""
        self.bar = text
        self._draw_progress(text)

    def finish(self) -> None:
        """What is in progress is complete: keep its last state."""
        for text in (self.unfinished, self.bar):
            if visible(text):
                self._write(visible(text) + "\n")
        self.unfinished = ""
        self.bar = ""

    def _draw_progress(self, text: str) -> None:
        if text and self.terminal.isatty():
            self._write(visible(text)[: shutil.get_terminal_size().columns - 1])

    def _write(self, text: str) -> None:
        erase = "\r\x1b[K" if self.terminal.isatty() else ""
        self.terminal.write(erase + text)
        self.terminal.flush()


def visible(line: str) -> str:
    """What a terminal shows of a line with carriage returns: the text after the last one."""
    return line.rstrip("\r").rpartition("\r")[2].rstrip()


class QuietKernelManager(AsyncKernelManager):
    """Ends a kernel without an interrupt of its worker processes.

    jupyter_client interrupts the kernel and all that it started before it asks the kernel to end.
    Each of joblib's workers would answer with a traceback on the terminal. Asked alone, the kernel
    ends them by itself.
    """

    async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
        """Ask the kernel to end, and kill it when it does not; `now` makes no difference."""
        await self.request_shutdown(restart=restart)
        await self.finish_shutdown(restart=restart)
        await self.cleanup_resources(restart=restart)


class StreamingClient(nbclient.NotebookClient):
    """Shows what cells print while they run, and displays of plain text that change.

    Ctrl-C, or SIGTERM, stops the cell that runs, as a notebook's stop button does.
    """

    def __init__(self, notebook: NotebookNode, console: Console, **settings: Any):
        super().__init__(
            notebook,
            kernel_manager_class=QuietKernelManager,
            on_notebook_start=self.pass_on_interrupts,
            **settings,
        )
        self.console = console
        self.shown: dict[str, str] = {}  # what each display that can change shows now
        self.newest_display = ""  # id of the one that began last

    def pass_on_interrupts(self, notebook: NotebookNode) -> None:
        """From now on, interrupt the kernel when this process is interrupted or told to end.

        Takes the place of nbclient's handlers of these signals: they would end the kernel while a
        cell runs, and the run would stop with a traceback. Only the kernel gets the interrupt, not
        its workers: the cell that started them ends them.
        """

        def interrupt() -> None:
            os.kill(self.km.provisioner.pid, signal.SIGINT)

        loop = asyncio.get_running_loop()
        with contextlib.suppress(NotImplementedError):  # on Windows
            loop.add_signal_handler(signal.SIGINT, interrupt)
            loop.add_signal_handler(signal.SIGTERM, interrupt)

    def process_message(self, msg: dict, cell: NotebookNode, cell_index: int) -> Any:
        """Show a message of the kernel, then let nbclient put it into the notebook."""
        content = msg["content"]
        if msg["msg_type"] == "stream":
            self.console.write(content["text"])
        elif content.get("data", {}).keys() == {"text/plain"}:
            self.show_display(content["data"]["text/plain"], content.get("transient", {}))
        elif content.get("execution_state") == "idle":  # the cell has ended
            self.console.finish()
        return super().process_message(msg, cell, cell_index)

    def show_display(self, text: str, transient: dict[str, str]) -> None:
        """Show the text of a display that can change.

        The newest one is the bar. An older one, such as the run's first line when the run's time is
        known, stands further up: only what was added at its end is printed.
        """
        display = transient.get("display_id", "")
        if not display:
            return
        before = self.shown.get(display, "")
        if display not in self.shown:
            self.console.finish()  # the bar before this one keeps its last state
            self.newest_display = display
        self.shown[display] = text
        if display == self.newest_display:
            self.console.progress(text)
        elif text != before:
            self.console.print_line(text.removeprefix(before).strip())


def run_notebook(output: Path) -> None:
    """Execute the notebook in the project's folder; stop at the first error.

    The notebook is saved as far as it came. Its checkpoints and figures go into A3_RUNS, else into
    runs/ beside `output`; what the kernel's own process complains about goes into kernel.log beside
    `output`. Raises SystemExit that names the cell that failed, or says that `output` is the
    committed notebook, that A3_RUNS is the project itself, or that utils.py is not the notebook's
    copy or changed meanwhile; nbclient's DeadKernelError where the kernel itself ended.
    """
    utils_before = utils_content()
    notebook = clear_outputs(read(NOTEBOOK))
    require_same_copy(notebook, utils_before)
    output = output.resolve()
    if output == NOTEBOOK.resolve():
        raise SystemExit("The committed notebook is changed by `make publish` only: name another.")
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    client = StreamingClient(
        notebook,
        Console(sys.stdout),
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # no warning about TCP on the terminal
    )
    runs = runs_folder_of(output)
    figures = runs / "figures"
    results = figures / "results.json"
    # results.json shows that a finished run made this folder. Without it the figures may be
    # someone's own, where A3_RUNS names their folder.
    if results.exists():
        shutil.rmtree(figures)
    environment = os.environ | {"A3_RUNS": str(runs)}
    try:
        with output.with_name("kernel.log").open("w", encoding="utf-8") as log:
            client.execute(cwd=str(ROOT), env=environment, stderr=log)
    except nbclient.exceptions.CellExecutionError as error:
        raise SystemExit(
            f"{failure_message(notebook, error)}\nThe run so far is in {output}."
        ) from None
    finally:
        # Here and not by nbclient: it joins streams after each cell, and then no longer finds the
        # displays that later cells change.
        CoalesceStreamsPreprocessor().preprocess(notebook, {})
        drop_empty_outputs(notebook)
        if any(cell.execution_count for cell in code_cells(notebook)):  # else no kernel started
            tidy_and_save(notebook, output)
    # utils_before is empty where there was no utils.py: the helper cell has written it.
    if utils_before and utils_content() != utils_before:
        results.unlink(missing_ok=True)  # so that no one publishes it
        raise SystemExit("utils.py changed during the run, and later trainings used it: run again.")
    print(f"{output.name} executed in {(time.perf_counter() - started) / 60:.1f} minutes.")


def require_same_copy(notebook: NotebookNode, content: bytes) -> None:
    """Raise SystemExit where utils.py has another content than the notebook's copy of it.

    `content` is b"" where there is no utils.py: nothing is compared, as the notebook will write it.
    """
    text = content.decode().replace("\r\n", "\n")  # as a checkout on Windows may have it
    if text and single_tagged_cell(notebook, "helper-module").source != helper_cell(text):
        raise SystemExit(
            "The notebook's copy of utils.py differs from utils.py: run `make sync` first."
        )


def runs_folder_of(executed: Path) -> Path:
    """Where a run puts its checkpoints and figures: A3_RUNS, else runs/ beside the notebook.

    Raises SystemExit where A3_RUNS is the project itself, whose figures/ is the committed run's.
    """
    setting = os.environ.get("A3_RUNS")
    runs = executed.parent / "runs"
    if setting:
        runs = ROOT / Path(setting).expanduser()  # a relative one: from where the kernel runs
    if runs.resolve() == ROOT:
        raise SystemExit("A3_RUNS must be another folder than the project's own.")
    return runs


def utils_content() -> bytes:
    """The content of utils.py, which new worker processes import; b"" where there is none."""
    path = ROOT / "utils.py"
    return path.read_bytes() if path.exists() else b""


def clear_outputs(notebook: NotebookNode) -> NotebookNode:
    """Take outputs and execution counts out of `notebook` itself, and return it."""
    for cell in code_cells(notebook):
        cell.outputs = []
        cell.execution_count = None
    return notebook


def drop_empty_outputs(notebook: NotebookNode) -> None:
    """Take out what shows nothing: a finished progress bar, a display that was never filled."""
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output_shows_something(output)]


def output_shows_something(output: NotebookNode) -> bool:
    """Whether an output is an error, or has text or data that is not empty."""
    if output.output_type == "error":
        return True
    if output.output_type == "stream":
        return bool(output.text.strip())
    return any(output.data.values())


def failure_message(notebook: NotebookNode, error: nbclient.exceptions.CellExecutionError) -> str:
    """The number, as Jupyter shows it, title and error of the cell that failed."""
    reason = error.ename
    if error.evalue:
        reason += f": {error.evalue}"
    heading = ""
    for cell in notebook.cells:
        heading = heading_of(cell) or heading
        if cell_has_error(cell):
            title = form_title(cell) or heading
            return f"Cell [{cell.execution_count}] ({title}) failed: {reason}"
    return reason


def cell_has_error(cell: NotebookNode) -> bool:
    """Whether a cell shows an error."""
    return any(output.output_type == "error" for output in cell.get("outputs", []))


def heading_of(cell: NotebookNode) -> str:
    """The last heading of a Markdown cell, else nothing."""
    if cell.cell_type != "markdown":
        return ""
    text = re.sub(r"(?ms)^```.*?^```", "", cell.source)  # without blocks of code
    headings = re.findall(r"^#+ +(.+)", text, flags=re.MULTILINE)
    return headings[-1] if headings else ""


def form_title(cell: NotebookNode) -> str:
    """What stands behind `# @title` of a code cell, else nothing."""
    first_line = cell.source.partition("\n")[0]
    return first_line.removeprefix("# @title ") if first_line.startswith("# @title ") else ""


# ---- publish ----


def publish(executed: Path) -> None:
    """Copy a run's outputs, figures, results and README table into the project.

    Text and code stay the committed notebook's; the code must be that of the run. After a run one
    may still correct Markdown cells and comments; in utils.py, docstrings and the PDF section (not
    the imports at its top); and claims, which are then evaluated again from the run's results.
    Raises SystemExit with every reason why a run cannot be published.
    """
    executed = executed.resolve()
    figures = runs_folder_of(executed) / "figures"
    for path in (executed, figures / "results.json"):
        require_run_file(path)
    committed, run = read(NOTEBOOK), read(executed)
    results = json.loads((figures / "results.json").read_text(encoding="utf-8"))
    faults = notebook_faults(run)
    if not is_of_same_run(run, results):
        faults.append("results.json is of another run than the notebook: was A3_RUNS set?")
    shown = [caption for caption in captions(run) if caption.startswith("Figure ")]
    if len(image_files(figures)) != len(shown):
        faults.append(f"{figures} has other figures than the notebook: delete those of other runs")
    if code_of(committed) != code_of(run):
        faults.append(f"the code of {NOTEBOOK.name} is not that of the run")
    else:  # the cells are the same: outputs can be copied, and claims that differ judged anew
        copy_outputs(run, committed)
        if sources(tagged(committed, "claims")) != sources(tagged(run, "claims")):
            results["claims"] = judge_claims_again(committed, results)
    faults += results_faults(results)
    if faults:
        raise SystemExit("Not published:\n" + "\n".join(f"- {fault}" for fault in faults))

    readme = readme_with(answers_table(run), results)
    results_text = json.dumps(results, indent=1) + "\n"
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:  # a full disk costs nothing
        new_figures = shutil.copytree(figures, Path(folder) / "figures")
        (new_figures / "results.json").write_text(results_text, encoding="utf-8", newline="\n")
        new_readme = Path(folder) / "README.md"
        new_readme.write_text(readme, encoding="utf-8", newline="\n")
        tidy_and_save(committed, NOTEBOOK)
        shutil.rmtree(ROOT / "figures", ignore_errors=True)
        new_figures.rename(ROOT / "figures")
        new_readme.replace(ROOT / "README.md")


def image_files(folder: Path) -> list[Path]:
    """The figures in a folder."""
    return [path for path in folder.iterdir() if path.suffix in {".svg", ".png"}]


def captions(notebook: NotebookNode) -> list[str]:
    """The captions of all figures and tables, in order."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    found = [output.get("metadata", {}).get("caption", "") for output in outputs]
    return [caption for caption in found if caption]


def is_of_same_run(run: NotebookNode, results: dict[str, Any]) -> bool:
    """Whether the notebook of a run shows the minutes that its results tell."""
    words = f"One run of {results['run']['wall_seconds'] / 60:.1f} minutes"
    outputs = [output for cell in code_cells(run) for output in cell.outputs]
    return any(words in text for output in outputs for text in texts_of(output))


def require_run_file(path: Path) -> None:
    """Raise SystemExit where a file that a finished run leaves is not there."""
    if not path.is_file():
        raise SystemExit(f"{path} is not there: the notebook must run to its end first (`make`).")


def code_of(notebook: NotebookNode) -> list[str]:
    """What a run executes of the code cells, in order; of claims only their places count."""
    code = []
    for cell in code_cells(notebook):
        if "helper-module" in tags(cell):
            code.append(comparable_utils(cell.source))
        elif "claims" in tags(cell):
            code.append("claims")
        else:
            code.append(comparable_code(cell.source))
    return code


def comparable_code(source: str) -> str:
    """A cell's syntax tree, as text to be compared; the source itself if that is no Python."""
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError:  # a cell with a magic
        return source


def comparable_utils(helper: str) -> str:
    """The helper cell without what no run executes: comments, docstrings, and the PDF export."""
    before, _, rest = helper.partition(TRIPLE_QUOTE)
    module, _, after = rest.rpartition(TRIPLE_QUOTE)  # the copy of utils.py, and the code below it
    tree = ast.parse(module.partition(PDF_SECTION)[0])
    for node in ast.walk(tree):
        if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node):
            del node.body[0]
    return before + ast.dump(tree) + after


def sources(cells: Iterable[NotebookNode]) -> list[str]:
    """The texts of cells."""
    return [cell.source for cell in cells]


def copy_outputs(run: NotebookNode, committed: NotebookNode) -> None:
    """Give the code cells of `committed` the outputs of those of `run`."""
    for cell, executed_cell in zip(code_cells(committed), code_cells(run), strict=True):
        cell.outputs = executed_cell.outputs
        cell.execution_count = executed_cell.execution_count


def judge_claims_again(notebook: NotebookNode, results: dict[str, Any]) -> dict[str, bool]:
    """The claims of `notebook`, evaluated from the results of a run; their table is shown anew.

    The cells tagged `claims` may use json, math, np, scipy's stats, utils, `results`, `claims`, and
    what earlier ones of them define. The cell tagged `claims-table` gets a new output. Raises
    SystemExit with the error of a claim that needs more.
    """
    begin = (
        "import json, math\nimport numpy as np\nfrom scipy import stats\nimport utils\n"
        f"results = json.loads({json.dumps(results)!r})\nclaims = {{}}"
    )
    end = "print(json.dumps({sentence: bool(holds) for sentence, holds in claims.items()}))"
    table = single_tagged_cell(notebook, "claims-table")
    texts = [begin, *sources(tagged(notebook, "claims")), table.source, end]
    trial = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in texts])
    client = nbclient.NotebookClient(
        trial, kernel_name="python3", extra_arguments=["--log-level=ERROR"]
    )
    try:
        client.execute(cwd=str(ROOT))
    except nbclient.exceptions.CellExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
        raise SystemExit(f"The claims cannot be judged from results.json: {reason}") from None
    new_table, printed_claims = trial.cells[-2:]
    table.outputs = new_table.outputs
    return json.loads(printed_claims.outputs[0].text)


def results_faults(results: dict[str, Any]) -> list[str]:
    """Why the results of a run (results.json) cannot be the committed ones."""
    faults = []
    if results["profile"] != "full":
        faults.append(f"the profile is {results['profile']}, not full")
    stand_ins = [data["name"] for data in results["data"].values() if not data["real"]]
    faults += [f"{name} is a stand-in" for name in stand_ins]
    if results["run"]["resumed"]:
        faults.append("it resumed trainings: delete the runs folder and run again")
    untrue = [claim for claim, holds in results["claims"].items() if not holds]
    faults += [f"does not hold: {claim}" for claim in untrue]
    return faults


def notebook_faults(notebook: NotebookNode) -> list[str]:
    """What is wrong with the outputs of an executed notebook; cells by their number in Jupyter."""
    faults = []
    # No kernel executes an empty cell.
    counts = [cell.execution_count for cell in code_cells(notebook) if cell.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        faults.append("the cells were not executed once each, in order")
    for cell in code_cells(notebook):
        for output in cell.outputs:
            faults += [f"cell [{cell.execution_count}] {what}" for what in output_faults(output)]
    return faults


def output_faults(output: NotebookNode) -> Iterator[str]:
    """What is wrong with one output."""
    if output.output_type == "error":
        yield f"stopped with {output.ename}"
    if output.get("name") == "stderr":
        yield f"left text on stderr: {output.text.strip()}"
    for text in texts_of(output):
        for place in private_names():
            # Not within a longer name: example.org/home, /roots.
            if re.search(rf"(?<!\w){re.escape(place)}(?!\w)", text):
                yield f"shows the local name {place}"


def texts_of(output: NotebookNode) -> list[str]:
    """The texts of an output, without the bytes of images; SVG is text."""
    texts = [output.get("text", "")]
    for media_type, content in output.get("data", {}).items():
        is_image = media_type.startswith("image/") and media_type != "image/svg+xml"
        if isinstance(content, str) and not is_image:
            texts.append(content)
    return texts


def private_names() -> set[str]:
    """What no output may show: this machine's name, and where its users' files lie."""
    names = {str(ROOT), str(Path.home()), tempfile.gettempdir(), "/home", "/Users", "/root"}
    names.discard("/")  # the home of a user without one
    host = socket.gethostname()
    if len(host) > 5 and host != "localhost":  # a shorter one may be a word of the text: "torch"
        names.add(host)
    return names


def answers_table(notebook: NotebookNode) -> str:
    """The table of answers of an executed notebook, as Markdown.

    It is the HTML table that the cell tagged `answers` shows. Raises SystemExit where that cell
    shows none, ValueError where there is no such cell.
    """
    for output in single_tagged_cell(notebook, "answers").outputs:
        rows = table_rows(output)
        if rows:
            return markdown_table(rows)
    raise SystemExit("The notebook shows no table of answers; run it first.")


def table_rows(output: NotebookNode) -> list[list[str]]:
    """The texts of an output's HTML table, row by row; none where it shows no table."""
    page = BeautifulSoup(output.get("data", {}).get("text/html", ""), "html.parser")
    return [
        [entry.get_text(" ", strip=True) for entry in row.find_all(["th", "td"])]
        for row in page.find_all("tr")
    ]


def markdown_table(rows: list[list[str]]) -> str:
    """The rows as a table whose first row is its head; all columns but the first are set right."""
    escaped = [[entry.replace("|", r"\|") for entry in row] for row in rows]
    head, *body = ["| " + " | ".join(row) + " |" for row in escaped]
    other_columns = len(rows[0]) - 1
    alignment = "| :--- |" + " ---: |" * other_columns
    return "\n".join([head, alignment, *body])


def readme_with(table: str, results: dict[str, Any]) -> str:
    """README.md with `table` and the facts of its run between their two marks.

    Raises SystemExit where README.md lacks a mark.
    """
    run_facts = results["run"]
    facts = [
        f"{data['name']}: {data['train']:,} training and {data['test']:,} test images"
        for data in results["data"].values()
    ]
    facts.append(
        f"One run of {run_facts['wall_seconds'] / 60:.0f} minutes in one piece on "
        f"{results['machine']}; trainings at a time: {run_facts['jobs']}"
    )
    notes = "\n".join(f"- {fact}." for fact in facts)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return fill_readme(readme, README_START, f"{table}\n\n{notes}", README_END)


def fill_readme(readme: str, start: str, content: str, end: str) -> str:
    """The README's text with `content` between two of its lines, in place of what is there.

    Raises SystemExit where one of the lines is missing.
    """
    before, _, rest = readme.partition(start)
    if end not in rest:
        raise SystemExit(f"README.md must hold the lines {start} and {end}, in this order.")
    after = rest.partition(end)[2]
    return f"{before}{start}\n\n{content}\n\n{end}{after}"


def print_results(executed: Path) -> None:
    """Print the table of answers of an executed notebook.

    Raises as `answers_table`, and SystemExit where there is no such file.
    """
    require_run_file(executed)
    print(answers_table(read(executed)))


def main(arguments: list[str]) -> None:
    """Do what the command line asks for. Raises SystemExit with the usage for anything else."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without ± shows a question mark
    match arguments:
        case ["sync"]:
            sync()
        case ["run", output]:
            run_notebook(Path(output))
        case ["publish", executed]:
            publish(Path(executed))
        case ["results"]:
            print_results(NOTEBOOK)
        case ["results", executed]:
            print_results(Path(executed))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
