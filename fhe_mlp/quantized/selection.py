"""Candidates that are quantized from the float networks of step 3, and which of them are chosen.

Networks are told apart by their rate, the percentage of neurons that were removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from fhe_mlp.dataset import Dataset
from fhe_mlp.networks import MLP, stream
from fhe_mlp.quantized.network import SAME_COST, QuantizedNetwork

PENALTIES = (0.001, 0.01, 0.1, 1.0)  # C of logistic regression, tried on validation rows from strong to weak
PENALTY_UNSEEN = 3e-4  # best on folds over the patients of DS1; five validation records cannot tell
ITERATIONS = 400  # of logistic regression at most
REMOVAL_ROWS = 3000  # training rows that show which neurons the others can replace
RANKING = "ranking_balanced_accuracy_simulated"  # by which networks are chosen and ranked
Quantized = dict[int, pd.DataFrame]  # by rate, the rows of `candidates`


@dataclass(frozen=True)
class Form:
    """Settings that the networks of an ensemble share, and the bits of each member's weights."""

    bits: Sequence[int]
    rounding_bits: int  # leading bits of each accumulator that its bootstrap sees
    p_error: float  # probability that this is off by a step, which training adds as noise


@dataclass(frozen=True, eq=False)
class Lesson:
    """Data, targets and settings of an ensemble's training.

    targets: probabilities (n,) for the training rows, a teacher's (Hinton, Vinyals & Dean, arXiv:1503.02531) or the
    labels; noise: standard deviation that is added to the features; shift: what the threshold has added to the logits
    of the teacher (MLP.shift).
    """

    data: Dataset
    targets: np.ndarray
    noise: float
    epochs: int
    shift: float = 0.0


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
    for network in networks:
        row = {name: getattr(network, name) for name in ("bits", "rounding_bits", "p_error")}
        row |= {"pbs": network.neurons, "predicted_complexity": network.predicted_complexity}
        for name, part in (("val", data.val), ("test", data.test), ("ranking", data.ranking)):
            row[f"{name}_balanced_accuracy"] = network.balanced_accuracy(part)
            row[f"{name}_balanced_accuracy_simulated"] = network.noisy_balanced_accuracy(part)
        rows.append({**row, "network": network})
    table = pd.DataFrame(rows).sort_values("bits", kind="stable", ignore_index=True)
    table.insert(1, "trial", table.groupby("bits").cumcount())
    return table.assign(chosen=table.index.isin(table.groupby("bits")[RANKING].idxmax()))


def quantize_linear(mlp: MLP, form: Form, lesson: Lesson, seed: int) -> pd.DataFrame:
    """Return `candidates` from the float network `mlp` without hidden layers, of each number of bits two.

    Trial 0 is the network rounded, which can be enough; trial 1 is trained after that.
    """
    from fhe_mlp.quantized.training import Ensemble

    X = lesson.data.train.X
    ensemble = Ensemble(mlp.layers, replace(form, bits=sorted(set(form.bits))), X)
    rounded = ensemble.networks(X)
    ensemble.train(lesson, seed, "linear")
    return candidates([*rounded, *ensemble.networks(X)], lesson.data)


def quantize_tables(neurons: dict[int, int], start: MLP, form: Form, lesson: Lesson, seed: int) -> Quantized:
    """Return networks of as many lookup tables as `neurons` has by rate, where that is 1 to those of `start`.

    start: of one hidden layer. Each starts from the one before, from which the neurons are removed that the others
    replace best.
    """
    from fhe_mlp.quantized.training import Ensemble

    X, found = lesson.data.train.X, {}
    ensemble = Ensemble(start.layers, form, X)
    wanted = {rate: count for rate, count in sorted(neurons.items()) if 0 < count <= ensemble.neurons}
    if wanted:
        ensemble.train(lesson, stream(seed, 0), f"{ensemble.neurons} tables")
    rows = np.random.default_rng(seed).choice(len(X), REMOVAL_ROWS, p=lesson.data.draw)
    for rate, count in wanted.items():
        ensemble.remove(count, X[rows])
        ensemble.train(lesson, stream(seed, rate), f"{rate} % removed, {count} tables")
        found[rate] = candidates(ensemble.networks(X), lesson.data)
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
