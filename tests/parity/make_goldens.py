"""Write tests/goldens/*.npz: what PyTorch computes for the cases of reference.py, for machines without PyTorch.

Usage: python tests/parity/make_goldens.py
Weights and inputs are not stored: reference.py draws them again. PyTorch computes in float64.
"""

from pathlib import Path
from typing import Any

import numpy as np
import oracle
from oracle import canonical, canonical_path, to_numpy
from reference import CASES, PADDINGS, SMALL, case_inputs

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


def goldens(name: str) -> dict[str, np.ndarray]:
    """The arrays of one configuration, with keys "case/padding/what".

    The left-padded causal model has also hidden states, attentions, gradients, and the size of the summands of each
    gradient (`oracle.summands`).
    """
    arrays = {}
    for case, (cls, changes, _) in CASES.items():
        hf = oracle.make_hf(name, cls, np.float64, **changes)
        for padding in PADDINGS:
            inputs = case_inputs(name, case, padding)
            with oracle.summands(hf) as sizes, oracle.relu_inputs(hf) as values:
                out = oracle.run(hf, inputs, output_hidden_states=True, output_attentions=True)
            results = {k: to_numpy(out[k]) for k in ("loss", "logits", "start_logits", "end_logits") if k in out}
            if (case, padding) == ("causal", "left"):
                results |= {f"hidden_states.{i}": to_numpy(x) for i, x in enumerate(out.hidden_states)}
                results |= {f"attentions.{i}": to_numpy(x) for i, x in enumerate(out.attentions)}
                out.loss.backward()
                oracle.assert_no_relu_near_zero(values, inputs["attention_mask"] == 1)
                gradients = canonical({path: p.grad for path, p in hf.named_parameters()})
                results |= {f"gradients.{path}": g for path, g in gradients.items()}
                results |= {f"summands.{canonical_path(path)[0]}": np.array(size) for path, size in sizes.items()}
            arrays |= {f"{case}/{padding}/{k}": v.astype(np.float32) for k, v in results.items()}
    return arrays


if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    for name in SMALL:
        arrays: dict[str, Any] = goldens(name)
        np.savez_compressed(GOLDENS / f"{name}.npz", **arrays)
    print(f"{sum(f.stat().st_size for f in GOLDENS.iterdir())} bytes in {GOLDENS}")
