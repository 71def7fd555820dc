"""Writes tests/goldens/*.npz: what PyTorch computes for the cases of reference.py, for machines without PyTorch.

Usage: python tests/parity/make_goldens.py
Weights and inputs are not stored: reference.py draws them again.
"""

from pathlib import Path
from typing import Any

import numpy as np
from oracle import canonical, make_hf, to_numpy, torch_inputs
from reference import CASES, PADDINGS, SMALL, case_inputs

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


def goldens(name: str) -> dict[str, np.ndarray]:
    """Key: "case/padding/what"; hidden states, attentions and gradients of the left-padded causal model only."""
    arrays = {}
    for case, (cls, changes, _) in CASES.items():
        hf = make_hf(name, cls, **changes)
        for padding in PADDINGS:
            inputs = torch_inputs(case_inputs(name, case, padding))
            out = hf(**inputs, output_hidden_states=True, output_attentions=True)
            results = {k: to_numpy(out[k]) for k in ("loss", "logits", "start_logits", "end_logits") if k in out}
            if (case, padding) == ("causal", "left"):
                results |= {f"hidden_states.{i}": to_numpy(x) for i, x in enumerate(out.hidden_states)}
                results |= {f"attentions.{i}": to_numpy(x) for i, x in enumerate(out.attentions)}
                out.loss.backward()
                gradients = canonical({path: p.grad for path, p in hf.named_parameters()})
                results |= {f"gradients.{path}": g for path, g in gradients.items()}
            arrays |= {f"{case}/{padding}/{k}": v for k, v in results.items()}
    return arrays


if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    for name in SMALL:
        arrays: dict[str, Any] = goldens(name)
        np.savez_compressed(GOLDENS / f"{name}.npz", **arrays)
    print(f"{sum(f.stat().st_size for f in GOLDENS.iterdir())} bytes in {GOLDENS}")
