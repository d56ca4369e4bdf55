"""Figures, tables and claims: captions, numbers, saved files, and what a script prints."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

import utils


@pytest.fixture
def shown(monkeypatch):
    """What a notebook shows: a list of (data, metadata)."""
    outputs = []

    def display(data, raw, metadata):
        outputs.append((data, metadata))

    monkeypatch.setattr(utils, "display", display)
    monkeypatch.setattr(utils, "in_kernel", lambda: True)
    return outputs


def make_figure():
    utils.set_figure_style()
    figure, axes = plt.subplots(figsize=(3, 2))
    axes.plot([1, 2, 3])
    return figure


@pytest.mark.parametrize("photo", [False, True])
def test_a_figure_is_shown_saved_named_and_closed(photo, shown):
    kind, ending = ("image/png", "png") if photo else ("image/svg+xml", "svg")
    for _ in range(2):  # a cell that runs again keeps the figure's number
        utils.show_figure(make_figure(), 3, "line", "A line & its <end>.", photo=photo)
    (data, metadata), caption = shown[:2]
    text = "Figure 3. A line & its <end>."
    assert shown[2:] == shown[:2]  # the same bytes from the same figure
    assert metadata["caption"] == metadata[kind]["alt"] == text
    assert caption[0]["text/markdown"] == f"*{text}*"
    content = (utils.runs_folder() / "figures" / f"line.{ending}").read_bytes()
    assert content.startswith(b"\x89PNG" if photo else b"<?xml")
    if not photo:
        assert data[kind] == content.decode()
        assert "<title>Figure 3. A line &amp; its &lt;end&gt;.</title>" in data[kind]
    assert plt.get_fignums() == []
    json.dumps(shown)


def cells_of(page, tag="td"):
    return [(cell.text, cell.get("style", "")) for cell in BeautifulSoup(page, "html.parser")(tag)]


def test_a_table_has_its_caption_two_decimals_and_true_minus_signs(shown):
    frame = pd.DataFrame(
        {
            "recipe": ["semi-hard <b>", "biggan-deep-256"],
            "accuracy, %": [98.765, -0.5],
            "change": ["-0.12 ± 0.08", "x" * 80],
            "images": [1000, -2],
            "time": [np.float32(1.005), np.nan],
        }
    )
    utils.show_table(frame, 2, "Accuracy & time.")
    ((data, metadata),) = shown
    assert metadata == {"caption": "Table 2. Accuracy & time."}
    cells = cells_of(data["text/html"])
    assert [text for text, _ in cells] == [
        *["semi-hard <b>", "98.77", "−0.12 ± 0.08", "1000", "1.00"],
        *["biggan-deep-256", "−0.50", "x" * 80, "−2", ""],
    ]
    left = [number for number, (_, style) in enumerate(cells) if "left" in style]
    assert left == [0, 5] and all("right" in cells[n][1] for n in (1, 2, 3, 4, 6))
    assert cells_of(data["text/html"], "caption")[0][0] == "Table 2. Accuracy & time."
    assert data["text/plain"].startswith("Table 2. Accuracy & time.\n")
    assert "−0.12 ± 0.08" in data["text/plain"]


def test_a_table_can_take_the_place_of_an_earlier_display(shown):
    class Handle:
        def update(self, data, raw, metadata):
            self.data, self.metadata = data, metadata

    place = Handle()
    utils.show_table(pd.DataFrame({"part": ["1 (b)"]}), 1, "Answers.", at=place)
    assert shown == [] and "1 (b)" in place.data["text/html"]
    assert place.metadata == {"caption": "Table 1. Answers."}


def test_claims_are_shown_with_what_became_of_them(shown):
    utils.show_claims({"The selected recipe wins": np.bool_(True), "Sharing costs little": False})
    ((data, metadata),) = shown
    expected = {"The selected recipe wins": True, "Sharing costs little": False}
    assert metadata == {"claims": expected} and json.dumps(metadata)
    texts = [text for text, _ in cells_of(data["text/html"])]
    assert texts == [
        *["The selected recipe wins", "holds"],
        *["Sharing costs little", "does not hold"],
    ]


def test_a_script_prints_the_plain_texts(capsys):
    utils.show_figure(make_figure(), 4, "line", "A line.")
    utils.show_table(pd.DataFrame({"part": ["1 (b)"]}), 1, "Answers.")
    assert capsys.readouterr().out.splitlines() == [
        *["Figure 4. A line.", "Table 1. Answers.", " part", "1 (b)"]
    ]
