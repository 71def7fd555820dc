"""Linear probes: what a linear function reads from activations. Alain & Bengio 2016, https://arxiv.org/abs/1610.01644.

A probe is a softmax regression with an L2 penalty. How well it does says little by itself, because a probe can learn
by heart which label each kind of token has. Hewitt & Liang 2019, https://arxiv.org/abs/1909.03368, compare it with a
control task: each type (say, each token id) gets a random label. The difference of both accuracies is the selectivity.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.tree
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from opt_jax.research.figures import new_axes

STEPS, TOLERANCE = 1000, 1e-5  # of L-BFGS; the norm of the gradient at which it ends


@dataclasses.dataclass(frozen=True)
class Probe:
    """A trained probe.

    Attributes:
      weights: float32 [D, C]. For two classes, `weights[:, 1] - weights[:, 0]` is the direction that tells them apart.
      bias: float32 [C].
      classes: the C labels, sorted.
      accuracy: the share of right answers on the held-out part.
      majority: that share if the answer is always the class most frequent in the training part.
      control_accuracy: of a probe of the control task on the same parts; None without `types`.
      train_accuracy: on the training part.
      held_out: bool [N], the held-out part.
      gradient_norm: of the loss where the optimiser ended.
    """

    weights: Float[np.ndarray, "D C"]
    bias: Float[np.ndarray, " C"]
    classes: np.ndarray
    accuracy: float
    majority: float
    control_accuracy: float | None
    train_accuracy: float
    held_out: Bool[np.ndarray, " N"]
    gradient_norm: float

    @property
    def selectivity(self) -> float | None:
        """accuracy - control_accuracy; None without a control task."""
        return None if self.control_accuracy is None else self.accuracy - self.control_accuracy

    def predict(self, x: Float[np.ndarray, "*N D"]) -> np.ndarray:
        """The most likely label of each activation, [*N]."""
        return self.classes[(np.asarray(x, np.float32) @ self.weights + self.bias).argmax(axis=-1)]


def train_probe(
    x: Any,
    labels: Any,
    *,
    types: Any = None,
    groups: Any = None,
    l2: float = 1e-3,
    held_out: float = 0.2,
    seed: int = 0,
) -> Probe:
    """A probe, trained on one part of the examples and measured on the other.

    It minimises mean(cross-entropy) + l2 / 2 * |weights|^2 by L-BFGS over all examples at once, in one compiled
    program. The penalty is on weights for activations with mean 0 and variance 1 in the training part, so that `l2`
    means the same in each layer; `weights` and `bias` are those for the activations as they are. The same arguments
    give the same probe.

    Args:
      x: [N, D], such as an array of `collect`; they must fit into the memory of the device.
      labels: [N], classes: of any kind that can be sorted, but no fractions.
      types: [N], such as `input_ids` of `collect`: what gets a random label in the control task, drawn with the
        frequencies of the labels. None: no control task.
      groups: [N], such as `rows` of `collect`: examples of a group are held out together. None: each by itself.
      l2: the strength of the penalty.
      held_out: the share of groups that is held out.
      seed: of the parts and of the control task.

    Raises:
      ValueError: shapes that do not fit, fewer than two classes, labels that are fractions, an empty part, or values
        that are not finite.
    """
    x, (classes, y) = np.asarray(x), np.unique(np.asarray(labels), return_inverse=True)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x must be [N, D] and labels [N], not {x.shape} and {np.shape(labels)}")
    for name, value in (("types", types), ("groups", groups)):
        if value is not None and np.shape(value) != y.shape:
            raise ValueError(f"{name} must be [N], as the labels, not {np.shape(value)}")
    if classes.dtype.kind == "f" and (classes != np.round(classes)).any():
        raise ValueError("labels are fractions, and a probe tells classes apart: divide their range into classes")
    if len(classes) < 2:
        raise ValueError(f"{len(classes)} classes: a probe needs at least two")
    test = _split(np.arange(len(y)) if groups is None else np.asarray(groups), held_out, seed)
    parameters, gradient_norm = _train(x, y, ~test, len(classes), l2)
    weights, bias = parameters
    share = lambda answer, truth, part: float((answer == truth)[part].mean())  # noqa: E731
    answers = (np.asarray(x, np.float32) @ weights + bias).argmax(axis=1)
    control = None
    if types is not None:
        truth = control_labels(types, y, seed)
        (w, b), _ = _train(x, truth, ~test, len(classes), l2)
        control = share((np.asarray(x, np.float32) @ w + b).argmax(axis=1), truth, test)
    most = np.bincount(y[~test]).argmax()
    return Probe(
        weights,
        bias,
        classes,
        share(answers, y, test),
        share(most, y, test),
        control,
        share(answers, y, ~test),
        test,
        gradient_norm,
    )


def control_labels(types: Any, labels: Any, seed: int = 0) -> np.ndarray:
    """The labels of the control task, [N]: one for each type, drawn from `labels`, so with their frequencies."""
    kinds, which = np.unique(np.asarray(types), return_inverse=True)
    return np.random.default_rng([seed, 1]).choice(np.asarray(labels), len(kinds))[which]


def plot(probes: Mapping[str, Probe], axes: Any = None) -> Any:
    """The accuracies of several probes by name, such as those of each layer, drawn with matplotlib; returns the axes.

    Raises:
      ValueError: matplotlib is missing.
    """
    axes, names = new_axes(axes), list(probes)
    axes.plot(names, [probes[name].accuracy for name in names], marker="o", label="held-out accuracy")
    axes.plot(names, [probes[name].majority for name in names], ":", label="most frequent class")
    if all(probes[name].control_accuracy is not None for name in names):
        axes.plot(names, [probes[name].control_accuracy for name in names], "--", marker="x", label="control task")
    axes.set(ylim=(0, 1.02), ylabel="accuracy")
    axes.tick_params(axis="x", rotation=90)
    axes.grid(alpha=0.3)
    axes.legend()
    return axes


def _split(groups: np.ndarray, share: float, seed: int) -> Bool[np.ndarray, " N"]:
    """Which examples are held out."""
    names = np.unique(groups)
    count = round(len(names) * share)
    if not 0 < count < len(names):
        raise ValueError(f"held_out={share} of {len(names)} groups leaves a part empty")
    return np.isin(groups, np.random.default_rng([seed, 0]).permutation(names)[:count])


def _train(x: np.ndarray, y: np.ndarray, part: np.ndarray, classes: int, l2: float) -> tuple[Any, float]:
    """((weights [D, C], bias [C]) for x as it is, the norm of the gradient)."""
    used = jnp.asarray(x[part], jnp.float32)
    parameters, norm = jax.device_get(_fit(used, jnp.asarray(y[part], jnp.int32), jnp.float32(l2), classes))
    if not np.isfinite(norm):
        raise ValueError("the loss is not finite: x holds NaN or infinity, or very large values")
    return parameters, float(norm)


def _fit(
    x: Float[Array, "N D"], y: Int[Array, " N"], l2: Float[Array, ""], classes: int
) -> tuple[tuple[Float[Array, "D C"], Float[Array, " C"]], Float[Array, ""]]:
    """The parameters with the least loss, and the norm of the gradient there."""
    mean, spread = x.mean(axis=0), x.std(axis=0)
    factor = jnp.where(spread > 0, 1 / jnp.where(spread > 0, spread, 1), 0)
    z = (x - mean[None]) * factor[None]

    def loss(parameters: Any) -> Array:
        weights, bias = parameters
        logits = jnp.dot(z, weights, precision=lax.Precision.HIGHEST) + bias[None]
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return errors.mean() + l2 / 2 * jnp.square(weights).sum()

    start = jnp.zeros((x.shape[1], classes), jnp.float32), jnp.zeros((classes,), jnp.float32)
    solver, gradient = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(carry: Any) -> Any:
        parameters, state, count, _ = carry
        value, grad = gradient(parameters, state=state)
        updates, state = solver.update(grad, state, parameters, value=value, grad=grad, value_fn=loss)
        parameters = optax.apply_updates(parameters, updates)
        return parameters, state, count + 1, optax.tree.norm(optax.tree.get(state, "grad"))

    more = lambda carry: (carry[2] < STEPS) & (carry[3] > TOLERANCE)  # noqa: E731
    first = start, solver.init(start), jnp.int32(0), jnp.float32(jnp.inf)
    (weights, bias), _, _, norm = lax.while_loop(more, step, first)
    weights = weights * factor[:, None]
    return (weights, bias - jnp.dot(mean, weights, precision=lax.Precision.HIGHEST)), norm


_fit = jax.jit(_fit, static_argnames="classes")
