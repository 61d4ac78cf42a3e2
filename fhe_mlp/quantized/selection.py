"""Candidates that are quantized from the float networks of step 3, and which of them are chosen.

Networks are told apart by their rate, the percentage of neurons that were removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from tqdm import tqdm

from fhe_mlp.dataset import Dataset
from fhe_mlp.networks import MLP, stream
from fhe_mlp.quantized.network import SAME_COST, QuantizedNetwork
from fhe_mlp.quantized.training import Ensemble, Form, Lesson

PENALTIES = (0.001, 0.01, 0.1, 1.0)  # C of logistic regression, tried on validation rows from strong to weak
PENALTY_UNSEEN = 3e-4  # best on folds over the patients of DS1; five validation records cannot tell
ITERATIONS = 400  # of logistic regression at most
REMOVAL_ROWS = 3000  # training rows that show which neurons the others can replace
RANKING = "ranking_balanced_accuracy_simulated"  # by which networks are chosen and ranked
Quantized = dict[int, pd.DataFrame]  # by rate, the rows of `candidates`


def fit_linear(data: Dataset, noise: float, seed: int) -> MLP:
    """Return the float network without hidden layers: logistic regression, its penalty chosen on validation rows.

    Its loss is convex, and gradient steps with few thousand columns end up to 0.3 points away. noise: standard
    deviation that is added to the features.
    """
    from sklearn.linear_model import LogisticRegression

    X = data.train.X + np.float32(noise) * np.random.default_rng(seed).standard_normal(data.train.X.shape, np.float32)
    model, found = LogisticRegression(warm_start=True, max_iter=ITERATIONS), []  # each starts from the one before
    for penalty in (PENALTY_UNSEEN,) if data.unseen else PENALTIES:
        model.set_params(C=penalty).fit(X, data.train.y, sample_weight=data.draw * len(X))
        layers = [(model.coef_.T.astype(np.float32), model.intercept_.astype(np.float32))]
        found.append(MLP(layers, noise, map=data.map))
    return max(found, key=lambda mlp: mlp.balanced_accuracy(data.val))


def candidates(networks: Sequence[QuantizedNetwork], data: Dataset) -> pd.DataFrame:
    """Return a row a network with its cost and accuracy; column "network" holds it.

    The *_simulated accuracies are those with the noise of p_error; ranking_* those on data.ranking. By them the best of
    each number of bits is "chosen".
    """
    rows = []
    for number, network in enumerate(networks):
        trial = sum(other.bits == network.bits for other in networks[:number])
        row = {"bits": network.bits, "trial": trial, "rounding_bits": network.rounding_bits}
        row |= {"p_error": network.p_error, "pbs": network.neurons}
        row["predicted_complexity"] = network.predicted_complexity
        for name, part in (("val", data.val), ("test", data.test), ("ranking", data.ranking)):
            row[f"{name}_balanced_accuracy"] = network.balanced_accuracy(part)
            row[f"{name}_balanced_accuracy_simulated"] = network.noisy_balanced_accuracy(part)
        rows.append({**row, "network": network})
    table = pd.DataFrame(rows).sort_values(["bits", "trial"], ignore_index=True)
    table["chosen"] = False
    table.loc[table.groupby("bits")[RANKING].idxmax(), "chosen"] = True
    return table


def train_members(ensemble: Ensemble, lesson: Lesson, seed: int, title: str) -> list[QuantizedNetwork]:
    """Train an ensemble behind a progress bar and return its members as integers."""
    with tqdm(total=lesson.epochs, desc=title, unit="epoch") as bar:
        ensemble.train(lesson, seed, bar)
    return ensemble.networks(lesson.data.train.X)


def quantize_linear(mlp: MLP, form: Form, lesson: Lesson, seed: int) -> pd.DataFrame:
    """Return `candidates` from the float network `mlp` without hidden layers, of each number of bits two.

    Trial 0 is the network rounded, which can be enough; trial 1 is trained after that.
    """
    ensemble = Ensemble(mlp.layers, replace(form, bits=sorted(set(form.bits))), lesson.data.train.X)
    rounded = ensemble.networks(lesson.data.train.X)
    return candidates([*rounded, *train_members(ensemble, lesson, seed, "linear")], lesson.data)


def quantize_tables(neurons: dict[int, int], start: MLP, form: Form, lesson: Lesson, seed: int) -> Quantized:
    """Return networks of as many lookup tables as `neurons` has by rate, where that is 1 to those of `start`.

    start: of one hidden layer. Each starts from the one before, from which the neurons are removed that the others
    replace best.
    """
    ensemble, found = Ensemble(start.layers, form, lesson.data.train.X), {}
    wanted = {rate: count for rate, count in sorted(neurons.items()) if 0 < count <= ensemble.neurons}
    if wanted:
        train_members(ensemble, lesson, stream(seed, 0), f"{ensemble.neurons} tables")
    rows = np.random.default_rng(seed).choice(len(lesson.targets), REMOVAL_ROWS, p=lesson.data.draw)
    for rate, count in wanted.items():
        ensemble.remove(count, lesson.data.train.X[rows])
        title = f"{rate} % removed, {count} tables"
        found[rate] = candidates(train_members(ensemble, lesson, stream(seed, rate), title), lesson.data)
    return found


def lowest_cost(quantized: pd.DataFrame, least: float) -> pd.Series:
    """Return the row of the lowest cost of at least `least` RANKING accuracy or, where none has it, the most accurate.

    Of those that cost the same but for SAME_COST, that of the most bits: its functions include those of the others, and
    validation rows of few patients cannot tell them apart.
    """
    accuracy, cost = quantized[RANKING], quantized["predicted_complexity"]
    if (accuracy < least).all():
        return quantized.loc[accuracy.idxmax()]
    same = quantized[(accuracy >= least) & (cost <= cost[accuracy >= least].min() * (1 + SAME_COST))]
    return quantized.loc[same["bits"].idxmax()]
