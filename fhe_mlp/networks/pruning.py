"""Removal of neurons and layers from float networks, and of neurons from a sum of tables (step 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fhe_mlp.networks.mlp import Layers

RIDGE = 1e-3  # squared logits and squared sd; keeps a column that is nearly the sum of others from a huge share


def saliency(layers: Layers, index: int) -> np.ndarray:
    """Return the norm of the incoming times that of the outgoing weights (neurons,), which no rescaling changes."""
    incoming, outgoing = layers[index][0], layers[index + 1][0]
    return np.linalg.norm(incoming, axis=0) * np.linalg.norm(outgoing, axis=1)


def remove_neurons(layers: Layers, index: int, keep: np.ndarray, activation: np.ndarray) -> Layers:
    """Return the network without the neurons of hidden layer `index` that are not in `keep`.

    Their mean activation over the rows (rows, neurons) is folded into the next layer's bias: a neuron with no incoming
    weight gives the same for every row, so removing it changes nothing.
    """
    (kernel, bias), (next_kernel, next_bias) = layers[index], layers[index + 1]
    gone = np.setdiff1d(np.arange(kernel.shape[1]), keep)
    constant = activation[:, gone].mean(axis=0, dtype=np.float64) @ next_kernel[gone]
    following = (next_kernel[keep], (next_bias + constant).astype(next_bias.dtype))
    return [*layers[:index], (kernel[:, keep], bias[keep]), following, *layers[index + 2 :]]


def drop_layer(layers: Layers, index: int, X: np.ndarray) -> Layers:
    """Return the network without hidden layer `index`; X: inputs of that layer (n, inputs).

    The layer after it gets the kernel and bias that give its sums best (least squares) from what came before.
    """
    (kernel, bias), (next_kernel, next_bias) = layers[index], layers[index + 1]
    sums = np.maximum(X @ kernel + bias, 0) @ next_kernel + next_bias
    solution = np.linalg.lstsq(np.column_stack([X, np.ones(len(X))]), sums, rcond=None)[0].astype(kernel.dtype)
    return [*layers[:index], (solution[:-1], solution[-1]), *layers[index + 2 :]]


def shrink(layers: Layers, widths: Sequence[int], X: np.ndarray) -> Layers:
    """Return the network whose hidden layers have `widths` neurons, none where it is 0; X: training rows (n, features).

    Neurons with most zero weights, incoming and outgoing, are removed first, and among equals those of least saliency.
    """
    index = 0
    for width in widths:
        if not width:
            layers = drop_layer(layers, index, X)
            continue
        kernel, bias = layers[index]
        activation = np.maximum(X @ kernel + bias, 0)
        zeros = (kernel == 0).sum(axis=0) + (layers[index + 1][0] == 0).sum(axis=1)
        keep = np.sort(np.lexsort((-saliency(layers, index), zeros))[:width])
        layers = remove_neurons(layers, index, keep, activation)
        X = activation[:, keep]
        index += 1
    return layers


def share_neurons(neurons: int, full: Sequence[int], min_width: int) -> list[int]:
    """Return the widths of hidden layers that share `neurons` as the widths `full` do, 0 for a layer that is removed.

    The narrowest layer (the last of equals) is removed as long as it would get less than `min_width` and is not the
    only one.
    """
    left = list(range(len(full)))
    while True:
        total = sum(full[i] for i in left)
        widths = [min(full[i], round(neurons * full[i] / total)) if i in left else 0 for i in range(len(full))]
        narrowest = min(reversed(left), key=lambda i: widths[i])
        if widths[narrowest] >= min_width or len(left) == 1:
            return widths
        left.remove(narrowest)


def revive(layers: Layers, rng: np.random.Generator) -> Layers:
    """Give every hidden neuron that has no incoming weight left a fresh start without changing what the network does.

    Its constant output is folded into the next bias, its incoming weights are drawn as Glorot & Bengio (AISTATS 2010)
    do, its outgoing weights are 0 until fine-tuning finds a use for it.
    """
    for index in range(len(layers) - 1):
        (kernel, bias), (next_kernel, next_bias) = ((k.copy(), b.copy()) for k, b in layers[index : index + 2])
        empty = ~kernel.any(axis=0)
        next_bias += np.maximum(bias[empty], 0) @ next_kernel[empty]
        limit = np.sqrt(6 / sum(kernel.shape))
        kernel[:, empty] = rng.uniform(-limit, limit, (len(kernel), empty.sum()))
        bias[empty] = 0
        next_kernel[empty] = 0
        layers = [*layers[:index], (kernel, bias), (next_kernel, next_bias), *layers[index + 2 :]]
    return layers


def replace_neurons(
    X: np.ndarray, outputs: np.ndarray, weights: np.ndarray, keep: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Choose which `keep` neurons of a sum of outputs (n, neurons), in logits, stay, and what replaces the others.

    Optimal Brain Surgeon (Hassibi & Stork, NeurIPS 1992), one neuron at a time: of least squares in which each row
    counts by its weight (n,), that neuron is removed whose place the features X (n, features) and the neurons that are
    left take with the least error. Returns the kept neurons, rising, the factor (neurons,) of each output, 0 for one
    that is removed, and the weights (features,) and the constant that are added to the sum.
    """
    weights = weights / weights.sum()
    x, y = X - weights @ X, outputs - weights @ outputs
    by_features = np.linalg.solve((x.T * weights) @ x + RIDGE * np.eye(x.shape[1]), (x.T * weights) @ y)
    rest = y - x @ by_features
    hessian = (rest.T * weights) @ rest + RIDGE * np.eye(y.shape[1])
    factor, kept = np.ones(y.shape[1]), np.arange(y.shape[1])
    while len(kept) > keep:
        inverse = np.linalg.inv(hessian[np.ix_(kept, kept)])
        gone = np.argmin(factor[kept] ** 2 / np.diag(inverse))
        factor[kept] -= inverse[:, gone] * (factor[kept[gone]] / inverse[gone, gone])
        factor[kept[gone]] = 0
        kept = np.delete(kept, gone)
    linear = by_features @ (1 - factor)
    return kept, factor, linear, float(weights @ (outputs @ (1 - factor) - X @ linear))
