"""Trainings side by side: the same numbers, named errors, one bar, one line, and the memory."""

import math
import os
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import utils

ROOT, TESTS = str(Path(utils.__file__).parent), str(Path(__file__).parent)
SETUP = f"""
import os, signal, sys, time
from functools import partial

sys.path[:0] = [{ROOT!r}, {TESTS!r}]
import torch
import utils
from small_training import train_and_name_process
"""


def run_script(folder, body, **settings):
    """Standard output of a script, whose functions are in __main__ as a notebook's are."""
    body = textwrap.indent(textwrap.dedent(body), "    ")
    text = f"{SETUP}\n{FUNCTIONS}\nif __name__ == '__main__':\n{body}"
    script = folder / "script.py"
    script.write_text(text, encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)} | settings
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    return done.stdout


FUNCTIONS = """
def fail():
    raise ValueError("no such digit")


def kill():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(seconds):
    time.sleep(seconds)
    return seconds


def message_of(tasks, jobs):
    os.environ["A3_JOBS"] = str(jobs)
    try:
        utils.run_parallel(tasks, title="stage", epochs=1)
    except RuntimeError as error:
        return str(error)
"""


@pytest.mark.slow
def test_a_script_gets_the_same_numbers_from_any_number_of_jobs_and_sees_stored_ones(tmp_path):
    said = run_script(
        tmp_path,
        """
        tasks = {("noise", seed): partial(train_and_name_process, seed) for seed in range(3)}
        made = {}
        for jobs in (1, 2):
            os.environ |= {"A3_RUNS": f"runs{jobs}", "A3_JOBS": str(jobs)}
            utils.start_run("tiny", "noise")
            made[jobs] = utils.run_parallel(tasks, title="stage", epochs=3)
            assert utils.stored_trainings() == []
        assert list(made[1]) == list(made[2]) == list(tasks)
        for (one, rows, process, threads), (two, others, worker, fewer) in zip(
            made[1].values(), made[2].values(), strict=True
        ):
            assert all(torch.equal(one[name], two[name]) for name in one)
            assert rows == others and len(rows) == 3
            assert process == os.getpid() != worker and threads == fewer == 1
        for jobs in (2, 1):  # a key is the same here and in a worker
            os.environ |= {"A3_RUNS": f"runs{3 - jobs}", "A3_JOBS": str(jobs)}
            utils.start_run("tiny", "noise")
            utils.run_parallel(tasks, title="again", epochs=3)
            assert len(utils.stored_trainings()) == 3
        """,
    )
    stored = "3 of them stored: delete the .pt files in runs1 to train again"
    assert said.count("stage: 3 trainings in ") == 2 and stored in said
    assert "Profile tiny, on noise: " in said
    assert not list(tmp_path.glob("a3-*"))


@pytest.mark.slow
def test_errors_name_the_task_and_leave_the_next_stage_working(tmp_path):
    said = run_script(
        tmp_path,
        """
        others = {("good", n): partial(sleep, 20) for n in range(4)}
        for jobs in (1, 2):
            print(message_of({("SVHN", "seed 1"): fail} | others, jobs=jobs))
        print(message_of({("SVHN", "seed 2"): kill} | others, jobs=2))
        tasks = {n: partial(sleep, n / 10) for n in range(3)}
        print(utils.run_parallel(tasks, title="x", epochs=1))
        """,
    )
    assert said.count("SVHN, seed 1: ValueError: no such digit") == 2
    assert "during: SVHN, seed 2; good, 0. Set A3_JOBS=1" in said
    assert "{0: 0.0, 1: 0.1, 2: 0.2}" in said
    assert not list(tmp_path.glob("a3-*"))


def test_in_this_process_order_errors_and_threads(monkeypatch):
    monkeypatch.setenv("A3_JOBS", "1")
    torch.set_num_threads(2)
    try:
        tasks = {"b": torch.get_num_threads, "a": lambda: 7}
        made = utils.run_parallel(tasks, title="stage", epochs=1)
        assert list(made.items()) == [("b", 1), ("a", 7)]
        with pytest.raises(RuntimeError, match="second: ZeroDivisionError"):
            tasks = {"first": int, "second": lambda: 1 / 0}
            utils.run_parallel(tasks, title="stage", epochs=1)
        assert torch.get_num_threads() == 2
        assert utils.run_parallel({}, title="stage", epochs=1) == {}
    finally:
        torch.set_num_threads(1)


# ---- what is shown ----


@pytest.mark.slow
def test_in_a_notebook_one_line_stays_of_a_stage():
    setup = f"{SETUP}\nutils.STAGE_MINUTES['tiny'] = {{'stage': 1, 'other': 9}}"
    cells = [
        setup,
        "utils.start_run('tiny', 'noise')",
        "tasks = {n: partial(train_and_name_process, n) for n in range(2)}\n"
        "os.environ['A3_JOBS'] = '2'\n"
        "made = utils.run_parallel(tasks, title='stage', epochs=3)",
        "os.environ['A3_JOBS'] = '1'\nmade = utils.run_parallel(tasks, title='stage', epochs=3)",
    ]
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    lines = []
    for cell in notebook.cells[1:]:
        (output,) = cell.outputs
        lines.append(output.data["text/plain"])
    assert "The whole run takes about " in lines[0]
    assert lines[1].startswith("stage: 2 trainings in ") and "stored" not in lines[1]
    assert "2 of them stored: delete the .pt files in" in lines[2]


def test_the_time_of_the_run_is_told_once_from_the_ratio_of_its_stages(monkeypatch, capsys):
    monkeypatch.setitem(utils.STAGE_MINUTES, "tiny", {"a": 2.0, "b": 6.0, "c": 2.0})
    utils.start_run("tiny", "noise")
    utils.tell_time("unknown", 60)
    utils.tell_time("b", 300)
    utils.tell_time("a", 60)
    assert capsys.readouterr().out.count("whole run") == 1
    utils.start_run("tiny", "noise")
    utils.tell_time("b", 300)
    assert "The whole run takes about 8 minutes on this machine." in capsys.readouterr().out
    utils.start_run("short", "noise")
    utils.tell_time("b", 300)
    assert "whole run" not in capsys.readouterr().out


def test_the_time_of_a_stage_comes_from_its_first_epochs(monkeypatch, tmp_path):
    """Five seconds to start the workers, then two seconds an epoch of a hundred."""
    told = []
    clock = [0.0]
    monkeypatch.setattr(utils.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(utils, "tell_time", lambda title, seconds: told.append(seconds))
    stage = utils.StageDisplay("stage", 100, tmp_path)
    for epochs in range(14):
        clock[0] = 5 + 2 * epochs
        stage.estimate(epochs)
    assert told and told[0] == pytest.approx(205, abs=3)


def test_the_line_of_a_stage_names_the_seconds_of_results(monkeypatch, capsys):
    monkeypatch.setenv("A3_JOBS", "1")
    utils.start_run("tiny", "noise")
    utils.run_parallel({"a": partial(time.sleep, 0.2)}, title="1 (b)", epochs=1)
    assert "1 (b): 1 training in 0 s\n" in capsys.readouterr().out
    assert utils.stage_seconds()["1 (b)"] >= 0.2


# ---- how many at once ----


def write_group(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


GB = 10**9
VERSION_2 = {
    "memory.max": f"{4 * GB}\n",
    "memory.current": f"{2 * GB}\n",
    "memory.stat": f"anon 5\ninactive_file {GB}\n",
}
VERSION_1 = {
    "memory.limit_in_bytes": f"{4 * GB}\n",
    "memory.usage_in_bytes": f"{2 * GB}\n",
    "memory.stat": f"cache 5\ntotal_inactive_file {GB}\n",
}


def test_the_memory_of_a_container_is_its_limit_less_what_is_used(tmp_path):
    write_group(tmp_path / "2", VERSION_2)
    write_group(tmp_path / "1", VERSION_1)
    write_group(tmp_path / "free", VERSION_2 | {"memory.max": "max\n"})
    assert utils.group_memory(tmp_path / "2") == utils.group_memory(tmp_path / "1") == 3 * GB
    assert utils.group_memory(tmp_path / "free") == math.inf
    assert utils.group_memory(tmp_path / "none") == math.inf


def test_jobs_follow_the_smallest_of_machine_and_groups(monkeypatch, tmp_path):
    own = Path("/proc/self/cgroup")
    real = Path.read_text
    lines = "4:memory:/outer/inner\n1:cpu:/\n0::/outer/inner\n"

    def read_text(path, *arguments, **options):
        return lines if path == own else real(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(utils, "CGROUPS", tmp_path)
    monkeypatch.setattr(utils, "available_cores", lambda: 8)
    machine = type("Memory", (), {"available": 100 * GB})
    monkeypatch.setattr(utils.psutil, "virtual_memory", lambda: machine)
    assert utils.free_memory() == 100 * GB and utils.n_jobs() == 8
    write_group(tmp_path / "outer", VERSION_2)  # the limit of a group around ours counts too
    assert utils.free_memory() == 3 * GB and utils.n_jobs() == 2
    tight = {"memory.limit_in_bytes": f"{2 * GB + GB // 5}"}
    write_group(tmp_path / "memory" / "outer" / "inner", VERSION_1 | tight)
    assert utils.n_jobs() == 1


def test_a_gpu_gets_one_job_unless_a3_jobs_says_otherwise(monkeypatch):
    monkeypatch.setattr(utils, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(utils, "free_memory", lambda: pytest.fail("measured the memory"))
    assert utils.n_jobs() == 1
    monkeypatch.setenv("A3_JOBS", "3")
    assert utils.n_jobs() == 3
    monkeypatch.setenv("A3_JOBS", "abc")
    with pytest.raises(ValueError, match="A3_JOBS='abc'"):
        utils.n_jobs()


def test_a_vanished_temporary_folder_costs_no_run(tmp_path):
    assert utils.epoch_marks(tmp_path / "gone") == []


def test_progress_goes_into_a_file_of_the_task(tmp_path):
    progress = utils.Progress()
    progress.advance(1)  # no task: nothing to do
    progress.start(tmp_path / "0", 5)
    progress.advance(2, utils.STORED)
    progress.advance(1)
    assert (tmp_path / "0").read_bytes() == b"sst"
    progress.finish()  # a task without epochs of its own counts as all of them
    progress.advance(1)
    assert (tmp_path / "0").read_bytes() == b"ssttt"
