"""Keep assignment3.ipynb in order: `sync` the helper cell, `run` the notebook, print `results`.

python tools/notebook.py sync               copy utils.py into the notebook's helper cell, tidy it
python tools/notebook.py run OUT.ipynb      execute it into OUT, progress on the terminal
python tools/notebook.py publish RUN.ipynb  make an executed notebook the committed one
python tools/notebook.py results [FILE]     print the results table
python tools/notebook.py readme             write the results table into README.md
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "assignment3.ipynb"
QUOTES = "'" * 3
MARKS = ("<!-- results: made by `make readme` -->", "<!-- end of results -->")


def helper_cell(source: str) -> str:
    """Source of the notebook cell that carries `source` and writes it where none is found."""
    if QUOTES in source:
        raise ValueError(f"utils.py must not hold {QUOTES}: the notebook quotes it with them.")
    return (
        "from pathlib import Path\n\n"
        f"UTILS = r{QUOTES}{source}{QUOTES}\n\n"
        'if not Path("utils.py").exists():\n'
        '    Path("utils.py").write_text(UTILS, encoding="utf-8")\n'
        'elif Path("utils.py").read_text(encoding="utf-8") != UTILS:\n'
        '    print("The utils.py in this folder differs from this copy; the file is the one used.")'
    )


def tagged(notebook: nbformat.NotebookNode, tag: str) -> nbformat.NotebookNode:
    """The only cell with this tag. Raises ValueError when there is none or more than one."""
    found = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    if len(found) != 1:
        raise ValueError(f"the notebook must hold one cell tagged {tag!r}; it holds {len(found)}.")
    return found[0]


def save(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write `notebook` with ids that follow its order and only the metadata a reader needs."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:03d}"
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.NotebookNode(tags=tags) if tags else nbformat.NotebookNode()
    notebook.metadata = nbformat.NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
        colab={"provenance": [], "toc_visible": True},
    )
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


def sync(path: Path = NOTEBOOK) -> None:
    """Refresh the notebook's copy of utils.py."""
    notebook = nbformat.read(path, as_version=4)
    tagged(notebook, "helper-module").source = helper_cell((ROOT / "utils.py").read_text())
    save(notebook, path)


def follow(log: Path, stop: threading.Event) -> None:
    """Print what is added to `log` until `stop` is set."""
    with log.open() as lines:
        while not stop.is_set():
            if line := lines.readline():
                print(line, end="", flush=True)
            else:
                stop.wait(0.5)


def run(output: Path) -> None:
    """Execute the notebook in the project's folder with papermill; stop at the first error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    started, stop = time.perf_counter(), threading.Event()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "progress.log"
        log.touch()
        follower = threading.Thread(target=follow, args=(log, stop), daemon=True)
        follower.start()
        command = [sys.executable, "-m", "papermill", "--cwd", str(ROOT), "--kernel", "python3"]
        command += ["--progress-bar", "--log-level", "WARNING", str(NOTEBOOK), str(output)]
        done = subprocess.run(command, env=os.environ | {"A3_PROGRESS": str(log)})
        stop.set()
        follower.join()
    if done.returncode:
        raise SystemExit(f"The notebook stopped with an error; see {output}.")
    print(f"{output} executed in {(time.perf_counter() - started) / 60:.1f} minutes.")


def publish(executed: Path) -> None:
    """Make an executed notebook the committed one, without what only the run needed."""
    notebook = nbformat.read(executed, as_version=4)
    number = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        number += 1
        cell.execution_count = number
        cell.outputs = [o for o in cell.outputs if o.get("data") != {"text/plain": ""}]
        for output in cell.outputs:
            output.pop("transient", None)
            if output.output_type == "execute_result":
                output.execution_count = number
            if output.get("name") == "stderr" or output.output_type == "error":
                raise SystemExit(f"Cell {number} left an error or text on stderr; not published.")
    save(notebook, NOTEBOOK)


def helpers() -> ModuleType:
    """utils.py, imported only where needed: it brings torch, which most commands do without."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module("utils")


def results_table(path: Path) -> str:
    """The results file as a Markdown table."""
    rows = helpers().results_rows(json.loads(path.read_text()))
    return "\n".join(["| result | value |", "| --- | ---: |", *(f"| {n} | {v} |" for n, v in rows)])


def readme_table(path: Path) -> str:
    """The README's results: one row a question, each number under the name of its data."""
    r = json.loads(path.read_text())
    header, rows = helpers().summary(r)
    lines = ["| " + " | ".join(row) + " |" for row in [header, ("---", "---:", "---:"), *rows]]
    names, sizes = header[1:], [r["data"][role] for role in ("handwritten", "street")]
    street = r["single_task"]["street"]
    notes = [
        f"{name}: {size['train']:,} training and {size['test']:,} test pictures."
        for name, size in zip(names, sizes, strict=True)
    ]
    if "unseen_fonts_acc" in street:
        notes.append(
            f"In fonts that training never saw, (b) reaches {street['unseen_fonts_acc']:.2f} %."
        )
    if r["biggan"]["digit_model_class_acc"] is not None:
        share = f"{r['biggan']['digit_model_class_acc']:.1f} %"
        notes.append(f"Question 3's digit BigGAN: {share} of its pictures show their class.")
    total = sum(r["seconds"].values()) / 60
    notes.append(f"Machine of this run: {r['machine']}; {total:.0f} minutes of training.")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def readme(path: Path = ROOT / "README.md") -> None:
    """Write the results table between the README's two marks."""
    text = path.read_text()
    before, rest = text.split(MARKS[0])
    table = readme_table(ROOT / "figures" / "results.json")
    path.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main(arguments: list[str]) -> None:
    """Run the command named first, with the paths that follow it."""
    commands = {"sync": sync, "run": run, "publish": publish, "readme": readme}
    name, paths = (arguments or ["help"])[0], [Path(text) for text in arguments[1:]]
    if name in commands:
        commands[name](*paths)
    elif name == "results":
        print(results_table(*(paths or [ROOT / "figures/results.json"])))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
