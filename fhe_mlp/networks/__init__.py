"""Float networks: the MLP and its files, its training with Keras, the removal of its neurons."""

from fhe_mlp.networks.fitting import (
    balanced_weights,
    epoch_progress,
    epoch_rows,
    h5_bytes,
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
    Layers,
    by_rank,
    check_features,
    claimed_bytes,
    load_mlp,
    load_onnx_mlp,
    load_with_data,
    open_h5,
    read_graph,
)
from fhe_mlp.networks.pruning import replace_neurons, revive, share_neurons, shrink
