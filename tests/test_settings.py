"""Settings of the environment: valid values, defaults, and what the machine decides."""

import pytest
import torch
from conftest import CPU, noise_split

import utils


@pytest.mark.parametrize("name", ["A3_PROFILE", "A3_DATA", "A3_PRECISION"])
def test_a_setting_has_a_default_and_an_unknown_value_lists_the_valid_ones(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    assert utils.setting(name) == "auto"
    monkeypatch.setenv(name, f" {utils.CHOICES[name][-1].upper()} ")
    assert utils.setting(name) == utils.CHOICES[name][-1]
    monkeypatch.setenv(name, "quick")
    with pytest.raises(ValueError, match=f"{name}='quick'.*{', '.join(utils.CHOICES[name])}"):
        utils.setting(name)


def test_jobs_are_a_whole_number_from_one_or_not_set(monkeypatch):
    assert utils.jobs_setting() is None
    monkeypatch.setenv("A3_JOBS", "3")
    assert utils.jobs_setting() == 3
    for wrong in ("0", "1.5"):
        monkeypatch.setenv("A3_JOBS", wrong)
        with pytest.raises(ValueError, match="A3_JOBS"):
            utils.jobs_setting()


def test_the_profile_is_full_only_when_every_set_is_real(monkeypatch):
    split = noise_split()
    real = utils.DigitData("MNIST", split, split, real=True)
    stand_in = utils.DigitData("scikit-learn digits", split, split, real=False)
    assert utils.profile_for(real, real) == "full"
    assert utils.profile_for(real, stand_in) == "short"
    monkeypatch.setenv("A3_PROFILE", "tiny")
    assert utils.profile_for(real, real) == "tiny"


def test_precision_is_what_was_asked_for(monkeypatch):
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        monkeypatch.setenv("A3_PRECISION", name)
        with utils.autocast(CPU):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == dtype
    monkeypatch.setenv("A3_PRECISION", "fp16")
    assert utils.forward_dtype(torch.device("cuda")) == torch.float16
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        utils.forward_dtype(CPU)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, capsys):
    path = tmp_path / "folder" / "file"

    def fail(part):
        part.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")

    utils.write_atomically(path, lambda part: part.write_text("old", encoding="utf-8"))
    with pytest.raises(OSError, match="No space left"):
        utils.write_atomically(path, fail)
    utils.write_or_warn(path, fail)
    assert "NOTE  file cannot be written" in capsys.readouterr().out
    assert [file.name for file in path.parent.iterdir()] == ["file"]
    assert path.read_text(encoding="utf-8") == "old"
