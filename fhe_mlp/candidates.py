"""Quantized candidates of a float network, and which of them are taken (step 3).

Networks are told by their rate, the percentage of neurons that were removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from fhe_mlp.arrays import Arrays, Rows, patients, unseen_patients
from fhe_mlp.networks import Layers, balanced_accuracy, build, stream
from fhe_mlp.qat import Ensemble, ReluEnsemble
from fhe_mlp.quantized import SAME_COST, QuantizedNetwork
from fhe_mlp.tables import LinearEnsemble, TableEnsemble

PENALTIES = (0.001, 0.01, 0.1, 1.0)  # C of logistic regression, tried on validation rows from strong to weak
PENALTY_UNSEEN = 3e-4  # best on folds over the patients of DS1; five validation records cannot tell
ITERATIONS = 400  # of logistic regression at most
REMOVAL_ROWS = 3000  # training rows that show which neurons the others can replace
RANKING = "ranking_balanced_accuracy_encrypted"  # by which networks are chosen and ranked
Quantized = dict[int, pd.DataFrame]  # by rate, the rows of `candidates`


def ranking_rows(data: Arrays, beats: dict[str, pd.DataFrame]) -> Rows:
    """Rows by which quantized networks are chosen and ranked: the validation part.

    Where no patient of it is in the training part, it has few patients, and the records of the training part, without
    their copies, count too: networks this small do not learn their training rows by heart.
    """
    if not unseen_patients(beats):
        return data["val"]
    own = (patients(beats["train"]) == beats["train"]["record"]).to_numpy()
    X, y = (np.concatenate([data["train"][k][own], data["val"][k]]) for k in (0, 1))
    return X, y


def fit_linear(
    data: Arrays, probability: np.ndarray, noise: float, seed: int, penalties: Sequence[float] = PENALTIES
) -> Layers:
    """The float network without hidden layers: logistic regression, whose penalty is chosen on validation rows.

    Its loss is convex, and gradient steps with few thousand columns end up to 0.3 points away. probability: (n,) of the
    training rows in a draw; noise: standard deviation that is added to the features; penalties: rising.
    """
    from sklearn.linear_model import LogisticRegression

    X, y = data["train"]
    X = X + np.float32(noise) * np.random.default_rng(seed).standard_normal(X.shape, dtype=np.float32)
    model, found = LogisticRegression(warm_start=True, max_iter=ITERATIONS), []  # each starts from the one before
    for penalty in penalties:
        model.set_params(C=penalty).fit(X, y, sample_weight=probability * len(y))
        layers = [(model.coef_.T.astype(np.float32), model.intercept_.astype(np.float32))]
        found.append((balanced_accuracy(build(layers), *data["val"]), layers))
    return max(found, key=lambda one: one[0])[1]


def candidates(networks: Sequence[QuantizedNetwork], data: Arrays) -> pd.DataFrame:
    """A row a network with its cost and accuracy; column "network" holds it.

    The *_encrypted accuracies are those with the noise of p_error; ranking_* those on data["ranking"], without it on
    the validation rows. By them the best of each number of bits is "chosen".
    """
    (X, _), rows = data["train"], []
    for number, network in enumerate(networks):
        trial = sum(other.bits == network.bits for other in networks[:number])
        row = {"bits": network.bits, "trial": trial, "rounding_bits": network.rounding_bits}
        row |= {"p_error": network.p_error, "pbs": network.pbs()}
        row["predicted_complexity"] = network.predicted_complexity(X)
        for part in ("val", "test", "ranking"):
            chosen = data.get(part, data["val"])
            row[f"{part}_balanced_accuracy"] = network.balanced_accuracy(*chosen)
            row[f"{part}_balanced_accuracy_encrypted"] = network.noisy_balanced_accuracy(*chosen)
        rows.append({**row, "network": network})
    table = pd.DataFrame(rows).sort_values(["bits", "trial"], ignore_index=True)
    table["chosen"] = False
    table.loc[table.groupby("bits")[RANKING].idxmax(), "chosen"] = True
    return table


@dataclass(frozen=True)
class Lesson:
    """What quantization-aware training learns from; as Ensemble.train takes it."""

    data: Arrays
    targets: np.ndarray
    probability: np.ndarray
    noise: float
    epochs: int
    seed: int

    def train(self, ensemble: Ensemble, rate: int, title: str) -> pd.DataFrame:
        """Train the ensemble, with the random numbers of its rate, and return its members as `candidates`."""
        seed = stream(self.seed, rate)
        with tqdm(total=self.epochs, desc=title, unit="epoch") as bar:
            ensemble.train(self.data, self.targets, self.probability, self.noise, self.epochs, seed, bar)
        return candidates(ensemble.networks(self.data["train"][0]), self.data)


def quantize_linear(layers: Layers, form: dict[str, Any], lesson: Lesson, rate: int, title: str) -> pd.DataFrame:
    """`candidates` from the float network `layers` without hidden layers, of each number of bits two.

    Trial 0 is the network rounded, which can be enough; trial 1 is trained after that.
    """
    ensemble = LinearEnsemble(layers, **{**form, "bits": sorted(set(form["bits"]))})
    rounded = ensemble.networks(lesson.data["train"][0])
    trained = lesson.train(ensemble, rate, title)["network"]
    return candidates([*rounded, *trained], lesson.data)


def quantize_relu(
    networks: dict[int, Layers], form: dict[str, Any], lesson: Lesson, least: float, enough: int
) -> Quantized:
    """Quantize the networks by rate, the smallest first, until `enough` have `least` accuracy."""
    found: Quantized = {}
    for rate in sorted(networks, reverse=True):
        title = f"{rate} % removed, quantized"
        if len(networks[rate]) > 1:
            found[rate] = lesson.train(ReluEnsemble(networks[rate], **form), rate, title)
        else:
            found[rate] = quantize_linear(networks[rate], form, lesson, rate, title)
        if sum(one[RANKING].max() >= least for one in found.values()) == enough:
            break
    return found


def quantize_tables(networks: dict[int, Layers], start: Layers, form: dict[str, Any], lesson: Lesson) -> Quantized:
    """Networks of as many tables as those by rate have neurons, at most those of `start`, which has one hidden layer.

    Each starts from the one before, from which the neurons are removed that the others replace best; what has no
    neurons, from the float network.
    """
    ensemble, found = TableEnsemble(start, **form), {}
    widths = {rate: sum(len(bias) for _, bias in layers[:-1]) for rate, layers in sorted(networks.items())}
    if any(0 < width <= ensemble.neurons for width in widths.values()):
        lesson.train(ensemble, 0, f"{ensemble.neurons} tables")
    rows = np.random.default_rng(lesson.seed).choice(len(lesson.targets), REMOVAL_ROWS, p=lesson.probability)
    for rate, width in widths.items():
        if not width:
            found[rate] = quantize_linear(networks[rate], form, lesson, rate, f"{rate} % removed, linear")
        elif width <= ensemble.neurons:
            ensemble.remove(width, lesson.data["train"][0][rows])
            found[rate] = lesson.train(ensemble, rate, f"{rate} % removed, {width} tables")
    return found


def lowest_cost(quantized: pd.DataFrame, least: float) -> pd.Series:
    """The row of the lowest cost of at least `least` RANKING accuracy or, where none has it, the most accurate.

    Of those that cost the same but for SAME_COST, that of the most bits: its functions include those of the others, and
    validation rows of few patients cannot tell them apart.
    """
    accuracy = quantized[RANKING]
    cost = quantized["predicted_complexity"]
    if (accuracy < least).all():
        return quantized.loc[accuracy.idxmax()]
    same = quantized[(accuracy >= least) & (cost <= cost[accuracy >= least].min() * (1 + SAME_COST))]
    return quantized.loc[same["bits"].idxmax()]
