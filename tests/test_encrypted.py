"""Schemes of encryption: what client and server compute is what the network computes."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import most_off, random_rows, small_network

from fhe_mlp import encrypted
from fhe_mlp.encrypted import ANSWERS, BEATS, KEYS
from fhe_mlp.encrypted.post_training import PostTraining, Setting
from fhe_mlp.networks import load_onnx_mlp
from fhe_mlp.quantized import QuantizedNetwork, signed_bits

TRAINED = 0.3 * random_rows(500)  # rows that show the widths of all integers
ROWS = random_rows(16, seed=2)  # of which some have integers outside of these widths
NOISE = 0.017  # of a sum of the packed scheme, in logits: its standard deviation, as measured


def random_network(neurons):
    rng = np.random.default_rng(3)
    shapes = ((7, (32, neurons)), (20, neurons), (7, 32))
    weights, bias, linear = (rng.integers(-most, most + 1, shape).astype(np.int32) for most, shape in shapes)
    tables = 6 * np.cumsum(rng.integers(0, 2, (neurons, 16)), axis=1, dtype=np.int32) - 30  # a step off changes little
    inputs = {"bits": 4, "rounding_bits": 4, "p_error": 2.0**-40, "input_bits": 5, "input_step": 0.2, "offset": 0.3}
    widths = {"accumulator_bits": 20 * bool(neurons), "tables_bits": 20, "linear_bits": 20}
    arrays = {"weights": weights, "bias": bias, "tables": tables, "linear": linear}
    network = QuantizedNetwork(**inputs, **widths, **arrays, table_step=1 / 16, linear_scale=0.05)
    bits = signed_bits(network.accumulators(TRAINED)) if neurons else 0
    return replace(network, accumulator_bits=bits).fitted(TRAINED)


def sides_of(scheme):
    """Client and server of what an export holds."""
    module = encrypted.scheme_module(scheme.name)
    client = module.Client(json.loads(json.dumps(scheme.numbers)), scheme.client_part())
    return client, module.Server(scheme.server_part())


@pytest.fixture(scope="module", params=["tfhe", "packed"])
def run(request):
    """A scheme with client, server and the payloads of ROWS."""
    network = random_network(3 if request.param == "tfhe" else 0)
    scheme = encrypted.choose(network)(network, TRAINED)
    assert scheme.name == request.param
    client, server = sides_of(scheme)
    client.make_keys()
    payloads = {KEYS: client.evaluation_keys(), BEATS: client.encrypt(ROWS)}
    server.load_keys(payloads[KEYS])
    payloads[ANSWERS] = server.run(payloads[BEATS])
    return SimpleNamespace(network=network, scheme=scheme, client=client, server=server, payloads=payloads)


def assert_equal(network, logits):
    """The logits are those of the first rows of ROWS, but for approximate rounding and noise."""
    X = ROWS[: len(logits)]
    most = most_off(network, X) + 1e-9 if network.neurons else np.full(len(X), 8 * NOISE)
    assert (np.abs(logits - network.logits(X)) <= most).all() and np.median(most) < 1.2 < np.std(network.logits(ROWS))


@pytest.mark.parametrize("beats", [1, 5, 16])
def test_client_and_server_made_from_the_parts_compute_the_network(run, beats):
    payload = run.client.encrypt(ROWS[:beats])
    run.server.check(BEATS, payload)
    answer = run.server.run(payload)
    run.client.check(ANSWERS, answer)
    with pytest.raises(ValueError, match="another number of beats"):
        run.client.decrypt(answer, 16 if beats == 1 else 1)
    logits = run.client.decrypt(answer, beats)
    assert logits.shape == (beats,) and logits.dtype == np.float64
    assert_equal(run.network, logits)
    # So does a row whose integers leave their ranges; a linear path alone has room for any row.
    assert (run.network.overflowing(ROWS) > 2) == (run.network.neurons > 0)


def test_secret_keys_are_enough_to_make_evaluation_keys_again(run):
    client, server = sides_of(run.scheme)
    client.load_secret_keys(run.client.secret_keys())
    server.check(KEYS, client.evaluation_keys())
    server.load_keys(client.evaluation_keys())
    assert_equal(run.network, run.client.decrypt(server.run(client.encrypt(ROWS[:1])), 1))
    assert_equal(run.network, client.decrypt(run.payloads[ANSWERS], 16))


@pytest.mark.parametrize("kind", [KEYS, BEATS, ANSWERS])
def test_a_damaged_payload_never_gets_to_the_library(run, kind):
    """Which would wait for the bytes that it claims, take the memory, or end the process."""
    payload, side = run.payloads[kind], run.client if kind == ANSWERS else run.server
    use = {KEYS: run.server.load_keys, BEATS: run.server.run, ANSWERS: lambda answer: run.client.decrypt(answer, 16)}
    places = [1, 4]  # of sizes, which then claim more
    if run.scheme.name == "packed":  # whose values begin behind a length
        places += [8 + 8 * word for word in run.scheme.layouts[kind][1]]
        assert len(places) > 10
    claims = [payload[:at] + bytes(byte ^ 0xFF for byte in payload[at : at + 4]) + payload[at + 4 :] for at in places]
    for damaged in (b"", payload[:-1], payload[:1000], payload + b"\0", *claims):
        for refuse in (lambda content: side.check(kind, content), use[kind]):
            with pytest.raises(ValueError, match="not whole"):
                refuse(damaged)
    for other in {KEYS, BEATS, ANSWERS} - {kind}:
        with pytest.raises(ValueError, match="not whole"):
            side.check(kind, run.payloads[other])


def test_costs_are_those_of_the_keys_and_the_network(run):
    cost, neurons, size = run.scheme.cost(), run.network.neurons, len(run.payloads[KEYS]) / 1e6
    assert (cost["pbs"], cost["security_bits"], cost["complexity"] > 0) == (neurons, 128, neurons > 0)
    # The keys of TFHE travel compressed: each ciphertext without its random part.
    assert size * (1 - 1e-5) < cost["evaluation_keys_MB"] and (neurons or cost["evaluation_keys_MB"] < size)
    assert run.server.versions() and all(run.server.versions().values())


def test_a_scheme_is_chosen_by_what_it_accepts_or_by_name():
    assert encrypted.scheme_names() == ["packed", "tfhe"]
    for neurons, name, other in ((0, "packed", "tfhe"), (3, "tfhe", "packed")):
        network = random_network(neurons)
        assert encrypted.choose(network).name == encrypted.choose(network, name).name == name
        with pytest.raises(ValueError, match=f"{other} cannot compute a network"):
            encrypted.choose(network, other)
    for name in ("post_training", "../packed", "tfhe.Scheme", ""):
        with pytest.raises(ValueError, match="there is no scheme"):
            encrypted.scheme_module(name)


def test_a_network_quantized_after_training_computes_the_same_compiled_and_encrypted(tmp_path):
    graph = load_onnx_mlp(small_network(tmp_path / "x.onnx", (3, 3, 1)), 3)
    one = PostTraining(graph, Setting(2, 4, 2.0**-13), TRAINED[:100, :3])
    before = one.logits(ROWS[:, :3])
    assert one.cost()["pbs"] > 0 and len(np.unique(before)) > 3
    np.testing.assert_array_equal(one.logits(ROWS[:, :3]), before)
    np.testing.assert_allclose(one.simulate(ROWS[:, :3]), before, atol=0.5)
    client, server = one.client(), one.server()
    client.make_keys()
    server.load_keys(client.evaluation_keys())
    (logit,) = client.decrypt(server.run(client.encrypt(ROWS[:1, :3])), 1)
    assert logit == pytest.approx(before[0], abs=0.5)
