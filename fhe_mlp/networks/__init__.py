"""Float networks: the MLP and its files, its training with Keras, the removal of its neurons."""

from fhe_mlp.networks.fitting import (
    balanced_weights,
    epoch_progress,
    epoch_rows,
    h5_bytes,
    probabilities_in_keras,
    quiet_tensorflow,
    save_mlp,
    start_tensorflow,
    stream,
    to_keras,
    to_train,
    trained,
    training_draws,
)
from fhe_mlp.networks.mlp import (
    MLP,
    STEP_3,
    STEP_4,
    Layers,
    by_rank,
    check_features,
    load_mlp,
    load_onnx_mlp,
    load_with_data,
    refusing,
)
from fhe_mlp.networks.pruning import replace_neurons, revive, share_neurons, shrink
