"""Trains g, the street-number classifier of Question 1 (e): `python weights/street_classifier.py`.

The model and its training are the notebook's own (`train_street_classifier`). This
file runs them on the training split of the rendered street numbers, the one that the notebook uses
offline, and writes beside itself

street_classifier.pt     the weights, float16
street_classifier.json   the renderer's version, accuracies in percent, the recipe, the sha256

A stopped run goes on from its last epoch (checkpoints in A3_RUNS). A new STREET_VERSION needs a new
run; until then the notebook trains g itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.update(A3_PROFILE="full", A3_DATA="embedded")  # whatever the caller has set
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import utils  # noqa: E402

PICTURES = 144_000  # seen in training, that is 6 epochs of 24,000


def notebook_training(notebook: Path) -> Callable:
    """`train_street_classifier` out of the notebook's cells tagged 'definitions'."""
    names: dict = {"device": utils.default_device(), "PROFILE": "full", "FULL": True}
    for cell in json.loads(notebook.read_text())["cells"]:
        if "definitions" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
        if "train_street_classifier" in names:
            return names["train_street_classifier"]
    raise RuntimeError(f"{notebook} has no definitions cell with train_street_classifier.")


def main(pictures: int, target: Path) -> None:
    """Train on `pictures` pictures; write `target` and the .json beside it."""
    train = notebook_training(HERE.parent / "assignment3.ipynb")
    street = utils.load_street()
    model, history = train(street.train, pictures=pictures, device=utils.default_device())
    # What the notebook will load is the rounded model, so that is the one we measure.
    utils.save_half(model, target)
    utils.load_weights(model, target)
    splits = {
        "train": street.train.first(5_000),
        "test": street.test,
        "unseen_fonts": street.unseen,
    }
    scores = {name: utils.accuracy(utils.predict(model, s), s.labels) for name, s in splits.items()}
    facts = {
        "street_version": utils.STREET_VERSION,
        "accuracy": {name: round(score, 2) for name, score in scores.items()},
        "recipe": "weights/street_classifier.py and train_street_classifier in the notebook",
        "epochs": len(history.rows),
        "pictures_an_epoch": len(street.train),
        "minutes": round(history.seconds / 60, 1),
        "machine": utils.machine(),
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
    }
    text = json.dumps(facts, indent=1) + "\n"
    utils.write_atomically(target.with_suffix(".json"), lambda path: path.write_text(text))
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--target", type=Path, default=HERE / "street_classifier.pt")
    arguments = parser.parse_args()
    main(arguments.pictures, arguments.target)
