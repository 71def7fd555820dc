"""Damaged files, answers and options: each is read as if undamaged, or is one line of error, within limits.

The limits are on memory and time. Hypothesis draws a seeded sample, with --exhaustive thousands of cases, and with
--hypothesis-seed=N others. The shrunk case of a failure becomes an example in REGRESSIONS.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import fuzz_cases, fuzz_worker
from support.fuzz_cases import Many, npy_file
from support.fuzz_worker import Worker
from support.processes import environment

# target -> (strategy of its cases, number of cases without --exhaustive).
DRAWN: dict[str, tuple[Callable[[Any], st.SearchStrategy], int]] = {
    "Config": (fuzz_cases.damage, 100),
    "Tokenizers": (fuzz_cases.damage, 100),
    "Model": (fuzz_cases.damage, 100),
    "Adapter": (fuzz_cases.damage, 100),
    "Flax": (fuzz_cases.damage, 150),
    "Quantized": (fuzz_cases.damage, 50),
    "Training": (fuzz_cases.damage, 20),
    "Arrays": (lambda files: st.one_of(fuzz_cases.arrays(), fuzz_cases.damage(files)), 150),
    "Generation": (lambda names: fuzz_cases.requests(sorted(names)), 300),
    "Hub": (fuzz_cases.answers, 25),
}
# Cases that have failed.
REGRESSIONS: dict[str, list[Any]] = {
    "Config": [
        ("run.json", [("set", ("options",), [None])]),
        ("config.json", [("set", ("num_labels",), Many("x ", 500_000))]),
        ("config.json", [("set", ("model_type",), Many("x", 3000))]),
        ("config.json", [("set", ("hidden_size",), Many("x", 3000))]),
        ("config.json", [("set", ("id2label",), None)]),
        ("config.json", [("set", ("init_std",), 10**400)]),
        ("generation_config.json", [("set", ("top_k",), Many("x", 3000))]),
    ],
    "Tokenizers": [
        ("slow/special_tokens_map.json", [("rename", ("pad_token", "content"), "x")]),
        ("fast/tokenizer_config.json", [("rename", ("added_tokens_decoder", "1", "content"), Many("x", 3000))]),
        ("slow/added_tokens.json", [("set", ("<new>",), [])]),
        ("fast/tokenizer.json", [("set", ("truncation",), ["\x1b[2J\n\r"])]),
        ("fast/tokenizer.json", [("set", ("model", "unk_token"), "ByteLevel")]),
    ],
    "Adapter": [("adapter_model.safetensors", [("flip", 415, 6)])],  # an infinity in A
    "Training": [
        ("3/_CHECKPOINT_METADATA", [("set", ("commit_timestamp_nsecs",), "x")]),
        ("3/_CHECKPOINT_METADATA", [("set", (), [])]),
        ("3/_CHECKPOINT_METADATA", [("flip", 0, 0)]),
    ],
    "Arrays": [
        ("a.npy", [("double", 64, 20)]),
        ("a.npy.json", [("set", ("tokenizer",), Many("[", 100_000, raw=True))]),
        (
            "a.npy.json",
            [("set", ("tokenizer", "name"), Many("x ", 500_000)), ("set", ("tokenizer", "fingerprint"), "")],
        ),
        npy_file("{[]: 1}\n"),
        npy_file("{".ljust(10_101)),
        npy_file("{'descr': '<u2', 'fortran_order': False, 'shape': (50,)}".ljust(9900) + "\0"),  # took 39 s
    ],
    "Generation": [
        {"input_ids": [[5, 6]], "options": {"prompt_lookup_num_tokens": np.ones((2, 3), object)}},
        {"input_ids": [[5, 6]], "options": {"top_k": "x" * 3000}},
        {"input_ids": [[1] * 100_000, *[[1]] * 1000], "options": {}},
        {"input_ids": [[5, 6]], "options": {"bad_words_ids": [1.5]}},
        {"input_ids": [[5, 6]], "options": {"num_beams": np.array([(1, 2)], "i4,i4")}},
        {"input_ids": [[5, 6]], "options": {"penalty_alpha": np.array([(1, 2)], "i4,i4")}},
        {"input_ids": [[5, 6]], "options": {"length_penalty": 10**400, "num_beams": 2}},
        {"input_ids": [[5, 6]], "options": {"forced_eos_token_id": {1: 2}}},
        {"input_ids": [[5, 6]], "options": {"suppress_tokens": [{}], "forced_eos_token_id": 3}},
        {"input_ids": [[5, 6]], "options": {"stop_strings": 3}},
        {"input_ids": [[5, 6]], "options": {"stop_strings": np.array(None)}},
        {"input_ids": [[5, 6]], "options": {"stop_strings": ["\ud800"]}},
    ],
    "Hub": [
        ("info", [("flip", 0, 7)]),
        ("statuses", ((0, 307), {})),
        ("headers", {"Set_Cookie": "http://\xff/"}),
    ],
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz")
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(directory / "hypothesis")  # not in the working directory
    with Worker(directory / "worker", environment()) as worker:
        yield worker


@pytest.mark.slow
@pytest.mark.parametrize("target", DRAWN)
def test_damage_is_read_as_it_was_or_is_one_error(worker, pytestconfig, target):
    draw, count = DRAWN[target]
    files = worker.bases[target]
    exhaustive = pytestconfig.getoption("--exhaustive")

    def check(case: Any) -> None:
        if target not in ("Generation", "Hub"):
            name, what = case
            case = name, what if isinstance(what, bytes) else fuzz_cases.edited(files[name], what)
        wrong = worker(target, case)
        assert wrong is None, wrong

    run = given(draw(files))(check)
    for case in REGRESSIONS.get(target, ()):
        run = example(case)(run)
    settings(
        max_examples=2000 if exhaustive else count,
        derandomize=pytestconfig.getoption("--hypothesis-seed", None) is None,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )(run)()
    outcomes = worker.outcomes[target]
    assert min(outcomes.get(kind, 0) for kind in ("read", "refused")) > sum(outcomes.values()) // 20, outcomes


class Calls:
    """A case that calls `function` in the process when it is unpickled."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def test_a_process_that_hangs_or_crashes_is_a_failure(worker, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_worker, "SECONDS", 0.1)
        assert "the process is gone (TimeoutError" in (worker("Config", Calls(time.sleep, 100)) or "")
    assert "the process is gone (EOFError: Ran out of input; exit code -6)" in (worker("Config", Calls(os.abort)) or "")
