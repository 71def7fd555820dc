"""Every argument of the functions of `opt_jax.research` has an effect, or a reason here why none is shown."""

from typing import Any

import numpy as np
import pytest
from reference import our_model
from test_options_have_effect import Because, check_all, names

from opt_jax.research import collect
from opt_jax.research.neurons import neuron_statistics
from opt_jax.research.probes import train_probe
from opt_jax.research.sae import train_sae
from opt_jax.research.steering import steer, steering_vectors

POINT = "blocks.1.hook_resid_post"
IT = Because("what the function is about: the tests beside this one")
DRAW = np.random.RandomState(0)
BATCHES, OTHERS = [DRAW.randint(4, 99, (3, 6))], [DRAW.randint(4, 99, (3, 6))]
X = DRAW.standard_normal((60, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return our_model("opt-125m")


def test_collect(model, tmp_path):
    called = Because("called: test_collect.py")
    entries = dict(model=IT, batches=IT, directory=IT, progress=called, names="hook_embed")
    run = lambda names: sorted(collect(model, BATCHES, tmp_path / names, names=names))  # noqa: E731
    check_all(names(collect), entries, run, dict(names=POINT))


def test_probes_and_autoencoders():
    entries = dict(x=IT, labels=IT, l2=1.0, held_out=0.5, seed=1, types=np.arange(60) % 3, groups=np.arange(60) // 4)

    def probe(**arguments):
        trained = train_probe(X, X[:, 0] > 0, **arguments)
        return trained.weights.tolist(), trained.control_accuracy, trained.held_out.tolist()

    check_all(names(train_probe), entries, probe)
    other = dict(l1=1.0, steps=7, batch_size=3, learning_rate=1e-2, seed=1, hook_name=POINT)
    entries = dict(other, x=IT, features=IT, progress=Because("called: test_sae_parity.py"))

    def sae(**arguments: Any):
        arguments = dict(steps=6, batch_size=2) | arguments
        trained, measures = train_sae(X, 8, **arguments)
        return trained.hook_name, np.asarray(trained.W_dec).tolist(), len(measures["loss"])

    check_all(names(train_sae), entries, sae)


def test_steering(model):
    entries = dict(model=IT, positive=IT, negative=IT, names="hook_embed", last=2)
    vectors = lambda **a: {k: v.tolist() for k, v in steering_vectors(model, BATCHES, OTHERS, **a).items()}  # noqa: E731
    check_all(names(steering_vectors), entries, vectors, dict(names=POINT))
    entries = dict(vectors=IT, scale=2.0, positions=[1], relative_to=5.0)

    def steered(**arguments):
        hooks = steer({POINT: np.ones(24)}, **arguments)
        return np.asarray(model.run_with_hooks(BATCHES[0], hooks=hooks).logits).tolist()

    check_all(names(steer), entries, steered)


def test_neurons(model):
    called = Because("called: test_neurons.py")
    entries = dict(model=IT, batches=IT, layers=[0], top=2, positions=2, threshold=1.0, progress=called)

    def counted(**arguments):
        stats = neuron_statistics(model, BATCHES, **arguments)
        return stats.layers, stats.top.shape, stats.fired.tolist(), stats.fired_at.shape

    check_all(names(neuron_statistics), entries, counted)
    with pytest.raises(ValueError, match="layers="):
        neuron_statistics(model, BATCHES, layers=[])
