"""Figures, tables and claims: captions, numbers, saved files."""

import base64
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


@pytest.mark.parametrize("photo", [False, True])
def test_a_figure_is_shown_saved_named_and_closed(photo, shown):
    kind, ending = ("image/png", "png") if photo else ("image/svg+xml", "svg")
    utils.set_figure_style()
    for _ in range(2):  # a cell that runs again keeps the figure's number
        figure, axes = plt.subplots(figsize=(3, 2))
        axes.plot([1, 2, 3])
        utils.show_figure(figure, 3, "line", "A line & its <end>.", photo=photo)
    (data, metadata), caption = shown[:2]
    text = "Figure 3. A line & its <end>."
    assert shown[2:] == shown[:2]  # the same bytes from the same figure
    assert metadata["caption"] == metadata[kind]["alt"] == text
    assert caption[0]["text/markdown"] == f"*{text}*" and caption[1] == {"is_caption": True}
    content = (utils.runs_folder() / "figures" / f"line.{ending}").read_bytes()
    assert data[kind] == (base64.b64encode(content) if photo else content).decode()
    assert plt.get_fignums() == []


def texts_of(page, tag="td"):
    return [cell.text for cell in BeautifulSoup(page, "html.parser")(tag)]


def test_a_table_has_its_caption_two_decimals_and_true_minus_signs(shown):
    frame = pd.DataFrame(
        {
            "recipe": ["semi-hard <b>", "biggan-deep-256"],
            "accuracy, %": [98.765, -0.5],
            "change": ["-0.12 ± 0.08", "x" * 80],
            "time": [np.float32(1.005), np.nan],
        }
    )
    utils.show_table(frame, 2, "Accuracy & time.")
    ((data, metadata),) = shown
    assert metadata == {"caption": "Table 2. Accuracy & time."}
    assert texts_of(data["text/html"], "caption") == ["Table 2. Accuracy & time."]
    first_row = ["semi-hard <b>", "98.77", "−0.12 ± 0.08", "1.00"]
    second_row = ["biggan-deep-256", "−0.50", "x" * 80, ""]
    assert texts_of(data["text/html"]) == first_row + second_row
    assert utils.table_entry_text(-0.001) == "0.00"


def test_claims_are_shown_with_what_became_of_them(shown):
    utils.show_claims({"The recipe wins": np.bool_(True), "Sharing costs little": False})
    ((data, metadata),) = shown
    assert json.loads(json.dumps(metadata)) == {
        "claims": {"The recipe wins": True, "Sharing costs little": False}
    }
    rows = ["The recipe wins", "holds", "Sharing costs little", "does not hold"]
    assert texts_of(data["text/html"]) == rows
