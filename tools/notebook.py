"""Keep assignment3.ipynb in order: `sync` the helper cell, `run` the notebook, `publish` a run.

python tools/notebook.py sync               copy utils.py into the notebook's helper cell, tidy it
python tools/notebook.py run OUT.ipynb      execute it into OUT, progress on the terminal
python tools/notebook.py publish RUN.ipynb  make a run the committed one: notebook, figures, README
python tools/notebook.py results [RUN]      print the results table of an executed notebook
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "assignment3.ipynb"
QUOTES = "'" * 3
MARKS = ("<!-- results: made by `make publish` -->", "<!-- end of results -->")
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}}  # in Colab; in JupyterLab


HELPER_CELL = """\
# @title Helper: a copy of utils.py
import importlib.util
import sys
from pathlib import Path

UTILS = SOURCE

ours = Path("utils.py").resolve()
if not ours.exists():
    ours.write_text(UTILS, encoding="utf-8")
elif ours.read_text(encoding="utf-8") != UTILS:
    print(
        "The utils.py in this folder differs from this copy, and is the one used; "
        "delete it and run all cells again to use this copy."
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


def helper_cell(source: str) -> str:
    """Source of the notebook cell that carries `source` and writes it where none is found.

    The cell stops with the name of the file when `import utils` would find another one.
    """
    if QUOTES in source:
        raise ValueError(f"utils.py must not hold {QUOTES}: the notebook quotes it with them.")
    return HELPER_CELL.strip().replace("SOURCE", f"r{QUOTES}{source}{QUOTES}", 1)


def tagged(notebook: nbformat.NotebookNode, tag: str) -> nbformat.NotebookNode:
    """The only cell with this tag. Raises ValueError when there is none or more than one."""
    found = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    if len(found) != 1:
        raise ValueError(f"the notebook must hold one cell tagged {tag!r}; it holds {len(found)}.")
    return found[0]


def save(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write `notebook` with ids that follow its order and only the metadata a reader needs.

    Cells that begin with `# @title` are folded; Colab is asked for a GPU.
    """
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:03d}"
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code" and cell.source.startswith("# @title"):
            cell.metadata.update(nbformat.from_dict(FOLDED))
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "accelerator": "GPU",
            "colab": {"provenance": [], "toc_visible": True, "gpuType": "T4"},
        }
    )
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")


def read(path: Path) -> nbformat.NotebookNode:
    """A notebook, whatever the locale."""
    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)


def sync(path: Path = NOTEBOOK) -> None:
    """Refresh the notebook's copy of utils.py."""
    notebook = read(path)
    source = (ROOT / "utils.py").read_text(encoding="utf-8")
    tagged(notebook, "helper-module").source = helper_cell(source)
    save(notebook, path)


def follow(log: Path, stop: threading.Event) -> None:
    """Print what is added to `log` until `stop` is set."""
    with log.open(encoding="utf-8") as lines:
        while not stop.is_set():
            if line := lines.readline():
                print(line, end="", flush=True)
            else:
                stop.wait(0.5)


def run(output: Path) -> None:
    """Execute the notebook in the project's folder with papermill; stop at the first error.

    What the run writes goes beside `output`: checkpoints and figures into runs/ (or A3_RUNS).
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    started, stop = time.perf_counter(), threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "progress.log"
        log.touch()
        follower = threading.Thread(target=follow, args=(log, stop), daemon=True)
        follower.start()
        runs = os.environ.get("A3_RUNS") or str(output.parent / "runs")
        command = [sys.executable, "-m", "papermill", "--cwd", str(ROOT), "--kernel", "python3"]
        command += ["--progress-bar", "--log-level", "WARNING", str(NOTEBOOK), str(output)]
        done = subprocess.run(
            command, env=os.environ | {"A3_PROGRESS": str(log), "A3_RUNS": runs}, check=False
        )
        stop.set()
        follower.join()
    if done.returncode:
        raise SystemExit(f"The notebook stopped with an error; see {output}.")
    print(f"{output.name} executed in {(time.perf_counter() - started) / 60:.1f} minutes.")


def publish(executed: Path) -> None:
    """Make an executed notebook the committed one, with its figures, results and README table."""
    notebook = read(executed)
    number = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        number += 1
        cell.execution_count = number
        # What showed the progress of a training is empty when the training is done.
        cell.outputs = [o for o in cell.outputs if o.get("data") != {"text/plain": ""}]
        for output in cell.outputs:
            output.pop("transient", None)
            if output.output_type == "execute_result":
                output.execution_count = number
            if output.get("name") == "stderr" or output.output_type == "error":
                raise SystemExit(f"Cell {number} left an error or text on stderr; not published.")
    figures = Path(os.environ.get("A3_RUNS") or executed.parent / "runs") / "figures"
    results = json.loads((figures / "results.json").read_text(encoding="utf-8"))
    text = readme_with(table(notebook), results)
    save(notebook, NOTEBOOK)
    shutil.rmtree(ROOT / "figures", ignore_errors=True)
    shutil.copytree(figures, ROOT / "figures")
    (ROOT / "README.md").write_text(text, encoding="utf-8", newline="\n")


def table(notebook: nbformat.NotebookNode) -> str:
    """The summary table of an executed notebook, as Markdown."""
    texts = [
        o.get("data", {}).get("text/markdown", "") for o in tagged(notebook, "front-page").outputs
    ]
    tables = [text for text in texts if text.startswith("|")]
    if not tables:
        raise SystemExit("The notebook holds no table of results; run it first.")
    return tables[0]


def readme_with(summary: str, results: dict) -> str:
    """README.md with `summary` and the facts of its run between the two marks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    notes = [
        f"{data['name']}: {data['train']:,} training and {data['test']:,} test images."
        for data in results["data"].values()
    ]
    run = results["run"]
    notes.append(
        f"One run of {run['wall_seconds'] / 60:.0f} minutes, {run['jobs']} trainings at once"
        f"{', partly resumed' if run['resumed'] else ', in one piece'}: {results['machine']}."
    )
    notes = "\n".join(f"- {note}" for note in notes)
    return f"{before}{MARKS[0]}\n\n{summary}\n\n{notes}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main(arguments: list[str]) -> None:
    """Run the command named first, with the paths that follow it."""
    commands = {"sync": sync, "run": run, "publish": publish}
    name, paths = (arguments or ["help"])[0], [Path(text) for text in arguments[1:]]
    if name in commands:
        commands[name](*paths)
    elif name == "results":
        print(table(read(*(paths or [NOTEBOOK]))))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
