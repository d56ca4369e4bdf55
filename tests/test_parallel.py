"""Trainings side by side: the same numbers, named errors, one line."""

import math
import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from small_training import train, train_and_name_process

import utils


def run(tasks, monkeypatch, jobs, title="stage"):
    monkeypatch.setenv("A3_JOBS", str(jobs))
    return utils.run_parallel(tasks, title=title, epochs=3)


@pytest.mark.slow
def test_any_number_of_jobs_gives_the_same_numbers_from_one_thread_each(monkeypatch, tmp_path):
    tasks = {("noise", seed): partial(train_and_name_process, seed) for seed in range(3)}
    made = {}
    for folder, jobs in (("a", 2), ("b", 2), ("c", 1)):
        monkeypatch.setenv("A3_RUNS", str(tmp_path / folder))  # no stored trainings
        made[jobs] = run(tasks, monkeypatch, jobs)
        assert len(list((tmp_path / folder).glob("*.pt"))) == 3  # workers get the settings of now
    assert list(made[1]) == list(made[2]) == list(tasks)
    for key in tasks:
        *numbers, process, threads = made[1][key]
        *others, worker, worker_threads = made[2][key]
        assert numbers == others
        assert process == os.getpid() != worker
        assert threads == worker_threads == 1


def kill():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_errors_name_the_task_and_leave_the_next_stage_working(monkeypatch):
    others = {("good", number): partial(time.sleep, 20) for number in range(4)}
    failing = {("SVHN", "seed 1"): partial(int, "no digit")}
    for jobs in (1, 2):
        with pytest.raises(RuntimeError, match=r"SVHN, seed 1: ValueError: .*no digit"):
            run(failing | others, monkeypatch, jobs)
    with pytest.raises(RuntimeError, match=r"during: SVHN, seed 2; good, 0\. Run again"):
        run({("SVHN", "seed 2"): kill} | others, monkeypatch, jobs=2)
    # The first of these ends last.
    sleeps = {seconds: partial(time.sleep, seconds) for seconds in (0.4, 0.0)}
    assert list(run(sleeps, monkeypatch, jobs=2)) == list(sleeps)


def test_in_this_process_order_threads_and_the_line_that_stays(monkeypatch, capsys):
    utils.start_run("tiny", "noise")
    torch.set_num_threads(2)
    try:
        tasks = {"b": torch.get_num_threads, "a": partial(time.sleep, 0.2)}
        assert list(run(tasks, monkeypatch, jobs=1).items()) == [("b", 1), ("a", None)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    printed = capsys.readouterr().out
    assert "stage: 2 trainings in 0 s\n" in printed
    assert "%" not in printed  # a log file has no bar
    assert utils.stage_seconds()["stage"] >= 0.2
    assert run({}, monkeypatch, jobs=1) == {}


CELLS = [
    f"""
import os, sys
from functools import partial
sys.path[:0] = [{str(Path(utils.__file__).parent)!r}, {str(Path(__file__).parent)!r}]
import small_training, utils
utils.FIRST_STAGE = 'stage'
utils.RUN_TO_FIRST_STAGE_RATIO['tiny'] = 9
def loss(model, batch):
    return small_training.loss_fn(model, batch)
def task(seed):
    small_training.train(loss=loss, seed=seed)
def stage(jobs):
    os.environ['A3_JOBS'] = str(jobs)
    utils.run_parallel({{n: partial(task, n) for n in range(2)}}, title='stage', epochs=5)""",
    "utils.start_run('tiny', 'noise')",
    "stage(jobs=1)",
    "stage(jobs=2)",
    "def loss(model, batch):\n    return model(batch[0]).square().mean(), {}\nstage(jobs=2)",
]


@pytest.mark.slow
def test_one_line_of_a_stage_stays_and_workers_resume_until_a_cell_changes():
    """The functions are defined in __main__, whose cells are no files."""
    cells = [nbformat.v4.new_code_cell(cell) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    lines = []
    for cell in notebook.cells[1:]:
        (output,) = cell.outputs
        lines.append(output.data["text/plain"])
    first, trained, resumed, changed = lines
    assert "The whole run takes about " in first
    assert "2 of them resumed: delete the checkpoints (.pt) in" in resumed
    for line in (trained, changed):
        assert line.startswith("stage: 2 trainings in ")
        assert "resumed" not in line


def test_each_finished_epoch_is_a_byte_of_the_stages_file(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "_epochs_file", tmp_path / "epochs")
    utils.report_epochs(1)
    utils.report_epochs(3)
    assert (tmp_path / "epochs").stat().st_size == 4


def test_the_first_stage_tells_the_time_of_the_run_unless_it_resumed_trainings(monkeypatch, capsys):
    monkeypatch.setitem(utils.RUN_TO_FIRST_STAGE_RATIO, "tiny", 300)
    monkeypatch.setattr(utils, "FIRST_STAGE", "first")
    told = []
    for _ in range(2):  # the second run finds the checkpoints of the first
        utils.start_run("tiny", "noise")
        for title in ("another", "first", "second"):
            tasks = {title: partial(train, name=title, epochs=1)}
            run(tasks, monkeypatch, jobs=1, title=title)
            told.append(capsys.readouterr().out.count("The whole run takes about"))
    assert told == [0, 1, 0, 0, 0, 0]
    utils.announce_time(2.0)
    assert "The whole run takes about 10 minutes on this machine." in capsys.readouterr().out


def test_a_gpu_gets_one_job_and_a_cpu_what_its_memory_holds_unless_a3_jobs_is_set(monkeypatch):
    monkeypatch.setattr(utils.joblib, "cpu_count", lambda: 8)
    for fits, jobs in ((0, 1), (3, 3)):
        monkeypatch.setattr(utils, "jobs_that_fit_in_memory", lambda fits=fits: fits)
        assert utils.n_jobs() == jobs
    monkeypatch.setattr(utils, "default_device", lambda: torch.device("cuda"))
    assert utils.n_jobs() == 1
    monkeypatch.setenv("A3_JOBS", "3")
    assert utils.n_jobs() == 3


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/docker/1f2a", "memory.max"),  # as in the container
        ("0::/docker/1f2a", "docker/1f2a/memory.max"),  # as on its host
        ("0::/docker/1f2a", "docker/memory.max"),  # a group around it
        ("4:cpu:/\n3:memory:/a3", "memory/a3/memory.limit_in_bytes"),  # version 1
    ],
)
def test_the_memory_limit_of_a_container_is_found(groups, file, monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(utils, "CONTROL_GROUPS_OF_PROCESS", tmp_path / "groups")
    assert utils.memory_limit() == math.inf
    (tmp_path / "groups").write_text(groups, encoding="utf-8")
    assert utils.memory_limit() == math.inf
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    for content, limit in (("max\n", math.inf), ("6000000000\n", 6e9)):
        path.write_text(content, encoding="utf-8")
        assert utils.memory_limit() == limit


@pytest.mark.parametrize(("limit", "jobs"), [(math.inf, 8), (6e9, 2)])
def test_trainings_fit_into_what_machine_and_container_leave(limit, jobs, monkeypatch):
    machine = SimpleNamespace(available=8 * utils.MEMORY_OF_A_TRAINING)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=2e9))
    monkeypatch.setattr(utils, "memory_limit", lambda: limit)
    monkeypatch.setattr(utils.psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(utils.psutil, "Process", lambda: process)
    assert utils.jobs_that_fit_in_memory.__wrapped__() == jobs
