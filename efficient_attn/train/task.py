"""What a model is trained for: the objective and the metrics of one example.

The loop knows tasks only through these two functions, so a new task is a class beside this one.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Classification:
    """One label per example, by softmax cross-entropy in nats.

    label_smoothing: probability a of the target that is spread evenly over the C classes: the
        target becomes (1 - a) onehot + a / C (1512.00567, section 7). The metrics do without it.
    """

    label_smoothing: float = 0.0

    def objective(self, logits: Float[Array, "B C"], label: Int[Array, "B"]) -> Float[Array, "B"]:
        """What the gradient is taken of, for each example."""
        target = jax.nn.one_hot(label, logits.shape[-1])
        target = optax.smooth_labels(target, self.label_smoothing)
        return optax.softmax_cross_entropy(logits, target)

    def metrics(
        self, logits: Float[Array, "B C"], label: Int[Array, "B"]
    ) -> dict[str, Float[Array, "B"]]:
        """loss (cross-entropy) and accuracy (0 or 1) of each example."""
        return {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, label),
            "accuracy": (logits.argmax(-1) == label).astype(jnp.float32),
        }
