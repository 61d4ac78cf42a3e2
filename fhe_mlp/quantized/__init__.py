"""Integer networks: what is encrypted, how it is trained, and which candidates are chosen."""

from fhe_mlp.quantized.files import add_networks, load_onnx, read_networks, to_onnx
from fhe_mlp.quantized.network import BITS, COSTS, NOISE_DRAWS, SAME_COST, TOLERATED_LOSS, QuantizedNetwork, signed_bits
from fhe_mlp.quantized.selection import (
    RANKING,
    Form,
    Lesson,
    Quantized,
    fit_linear,
    lowest_cost,
    quantize_linear,
    quantize_tables,
)
