"""Our models against stored results of PyTorch (make_goldens.py): parity where PyTorch is not installed.

The limits are those of parity/test_model_parity.py.
"""

import jax
import limits
import numpy as np
import pytest
from conftest import REPOSITORY
from limits import TOLERANCE, gradient_limit, within
from reference import CASES, PADDINGS, SMALL, case_inputs, our_model

from opt_jax import named_parameters

pytestmark = pytest.mark.slow
GOLDENS = REPOSITORY / "tests" / "goldens"


@pytest.fixture(scope="module", params=SMALL)
def golden(request):
    """(name, {key: array}) of one configuration."""
    path = GOLDENS / f"{request.param}.npz"
    with np.load(path) as arrays:
        return request.param, dict(arrays)


def assert_close(got, expected, mask=...):
    expected = expected[mask]
    limits.assert_close(np.asarray(got)[mask], expected, TOLERANCE * np.abs(expected).max())


def test_causal_lm(golden):
    """Plain calls, every padding; with left padding also hidden states, attentions and all gradients."""
    name, arrays = golden
    model = our_model(name)
    for padding in PADDINGS:
        inputs = case_inputs(name, "causal", padding)
        mask = inputs["attention_mask"] == 1
        got = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert_close(got.logits, arrays[f"causal/{padding}/logits"], mask)
        assert_close(got.loss, arrays[f"causal/{padding}/loss"])
        if padding == "left":
            for i, x in enumerate(got.hidden_states):
                assert_close(x, arrays[f"causal/left/hidden_states.{i}"], mask)
            for i, x in enumerate(got.attentions):
                x, expected = (np.moveaxis(np.asarray(a), 1, 2) for a in (x, arrays[f"causal/left/attentions.{i}"]))
                assert_close(x, expected, mask)

            gradients = named_parameters(jax.grad(lambda model, inputs: model(**inputs).loss)(model, inputs))
            expected = {path: arrays[f"causal/left/gradients.{path}"] for path in gradients}
            assert len(expected) == sum("gradients" in key for key in arrays)
            for path, g in expected.items():
                error = np.linalg.norm(gradients[path].get_value() - g)
                within(error, gradient_limit(g, arrays[f"causal/left/summands.{path}"]), path)


@pytest.mark.parametrize("case", [case for case in CASES if case != "causal"])
def test_heads(golden, case):
    name, arrays = golden
    cls, changes, _ = CASES[case]
    model = our_model(name, cls, **changes)
    for padding in PADDINGS:
        inputs = case_inputs(name, case, padding)
        got = model.forward(**inputs)  # operation by operation: each is compiled once for all cases
        assert_close(got.loss, arrays[f"{case}/{padding}/loss"])
        if case == "answers":
            mask = inputs["attention_mask"] == 1
            assert_close(got.start_logits, arrays[f"{case}/{padding}/start_logits"], mask)
            assert_close(got.end_logits, arrays[f"{case}/{padding}/end_logits"], mask)
        else:
            assert_close(got.logits, arrays[f"{case}/{padding}/logits"])


def test_goldens_are_what_pytorch_computes(golden):
    """The files are those of the present weights, inputs and cases."""
    pytest.importorskip("torch", reason="making goldens needs PyTorch")
    pytest.importorskip("transformers", reason="making goldens needs transformers")
    from make_goldens import goldens

    name, arrays = golden
    current = goldens(name)
    assert current.keys() == arrays.keys()
    for key, value in current.items():
        case, is_gradient, path = key.partition("gradients.")
        summands = current[f"{case}summands.{path}"] if is_gradient else 0
        # Where a gradient is zero in theory, its value is float64's rounding of the summands.
        limits.assert_close(arrays[key], value, 1e-5 * np.abs(value).max() + 1e-12 * summands, what=key)


def test_goldens_are_small():
    assert sum(file.stat().st_size for file in GOLDENS.iterdir()) < 1e6
