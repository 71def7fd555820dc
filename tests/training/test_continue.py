"""`train.py --continue-from`: a finished run is continued in a new run, with a schedule that the options name."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from support.training_runs import metrics, run_here, run_options

from opt_jax import OPTForCausalLM
from opt_jax.training.optimizer import continued_schedule, make_schedule


def test_schedules():
    before = make_schedule(peak=1.0, warmup_steps=2, steps=10, final=0.1)
    restart = make_schedule(peak=1.0, warmup_steps=4, steps=20, final=0.1)
    constant, again = continued_schedule(before, 10, None), continued_schedule(before, 10, restart)
    steps = jnp.arange(30)
    np.testing.assert_array_equal(constant(steps)[:10], before(steps)[:10])
    np.testing.assert_allclose(constant(steps)[10:], 0.1, rtol=1e-6)
    np.testing.assert_array_equal(again(steps)[:10], before(steps)[:10])
    np.testing.assert_allclose(again(steps)[10:], jnp.maximum(restart(steps[:20]), 0.1), rtol=1e-6)
    assert float(again(13)) == 1.0 and float(again(29)) == pytest.approx(0.1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A directory with the run `first`, of 6 steps at a learning rate that stays at its peak, and its options."""
    place = tmp_path_factory.mktemp("continue")
    options = run_options(place, final_lr=1.0, steps=6, eval_every=3)
    run_here(options, place / "first")
    return place, options


@pytest.mark.slow
def test_at_a_constant_rate_it_is_the_longer_run(finished, capsys):
    place, options = finished
    more = options | dict(steps=10)
    run_here(more, place / "straight")
    before = {path: path.read_bytes() for path in (place / "first").rglob("*") if path.is_file()}
    onwards = more | dict(continue_from=str(place / "first"))
    run_here(onwards | dict(stop_after=2), place / "onwards")  # and it resumes, before and after its first checkpoint
    capsys.readouterr()
    run_here(onwards, place / "onwards")
    assert "steps 8 to 10" in capsys.readouterr().out
    ours, theirs = metrics(place / "onwards"), metrics(place / "straight")[6:]
    assert [line["step"] for line in ours] == [7, 8, 9, 10]
    for one, other in zip(ours, theirs, strict=True):
        assert {k: one.get(k) for k in ("loss", "grad_norm", "lr", "val_loss")} == {
            k: other.get(k) for k in ("loss", "grad_norm", "lr", "val_loss")
        }
    models = [OPTForCausalLM.from_pretrained(place / name) for name in ("onwards", "straight")]
    a, b = (model.model.decoder.embed_tokens.embedding.get_value() for model in models)
    np.testing.assert_array_equal(a, b)
    assert {path: path.read_bytes() for path in (place / "first").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "changes, error",
    [
        (dict(steps=6), "--steps 6: .*first has done 6 steps; --steps counts these, so give more"),
        (dict(steps=9, continue_schedule="warm-up"), "belong to the warm-up of 3; take more --steps"),
        (dict(seed=1), r"(?s)options: seed was 0, is now 1\n.*Give --continue-from the options of that run"),
        (dict(continue_from="TEXTS"), "no run of train.py"),
        (dict(continue_from=None, continue_schedule="warm-up"), "--continue-schedule is for --continue-from"),
        (dict(output="first"), "give the new run another --output"),
        (dict(lora_rank=2, model="tiny"), "start a new run from --model RUN/model with --lora-rank"),
    ],
)
def test_what_cannot_be_continued(finished, changes, error):
    place, options = finished
    changes = dict(changes)
    output = changes.pop("output", "other")
    changes |= {"continue_from": str(place)} if changes.get("continue_from") == "TEXTS" else {}
    with pytest.raises(ValueError) as raised:
        run_here(options | dict(steps=12, continue_from=str(place / "first")) | changes, place / output)
    assert re.search(error, str(raised.value)), raised.value
    assert not (place / "other").exists()


@pytest.mark.slow
def test_a_run_that_is_not_finished_is_not_continued(finished):
    place, options = finished
    run_here(options | dict(stop_after=2), place / "half")
    with pytest.raises(ValueError, match="half: the run is not finished; the command that began it goes on with it"):
        run_here(options | dict(steps=12, continue_from=str(place / "half")), place / "other")
