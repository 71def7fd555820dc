"""`opt-jax generate --plan`: what is counted in a compiled decode loop, and a plan for TPUs that are not there."""

import json
import os
import sys
from pathlib import Path

import pytest

from opt_jax import OPTConfig
from opt_jax.cli import main
from opt_jax.generation.plan import step_numbers
from opt_jax.parallel.hlo import Program

LIBTPU = Path(sys.prefix) / "libtpu"

# A loop as libtpu writes it: a product with a weight of 2 MB whose second dimension is padded from 500 to 512, a
# prefetched slice of another one, a lookup of 8 rows, and an update of a cache of 1 MB in place.
LOOP = """HloModule jit_advance

%looked_up (p: bf16[2050,2048], i: s32[8]) -> bf16[8,2048] {
  %p = bf16[2050,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[8]{0:T(128)S(1)} parameter(1)
  ROOT %g = bf16[8,2048]{1,0:T(8,128)(2,1)S(1)} gather(%p, %i), offset_dims={1}
}

%updated (c: bf16[8,512,128], n: bf16[8,1,128], i: s32[]) -> bf16[8,512,128] {
  %c = bf16[8,512,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %n = bf16[8,1,128]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  ROOT %u = bf16[8,512,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%c, %n, %i, %i, %i)
}

%sliced (w: bf16[2048,512]) -> bf16[2048,128] {
  %w = bf16[2048,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %s = bf16[2048,128]{1,0:T(8,128)(2,1)S(1)} slice(%w), slice={[0:2048], [0:128]}
}

%view (m: bf16[2048,500]) -> bf16[2048,500] {
  %m = bf16[2048,500]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %b = bf16[2048,500]{1,0:T(8,128)(2,1)} bitcast(%m)
}

%product (h: bf16[8,2048], m: bf16[2048,500]) -> bf16[8,500] {
  %h = bf16[8,2048]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %m = bf16[2048,500]{1,0:T(8,128)(2,1)} parameter(1)
  %b = bf16[2048,500]{1,0:T(8,128)(2,1)} fusion(%m), kind=kLoop, calls=%view
  ROOT %q = bf16[8,500]{1,0:T(8,128)(2,1)S(1)} convolution(%h, %b), dim_labels=bf_io->bf
}

%body (s: (bf16[2048,500], bf16[2048,512], bf16[2050,2048], bf16[8,512,128])) -> () {
  %s = (bf16[2048,500]{1,0}, bf16[2048,512]{1,0}, bf16[2050,2048]{1,0}, bf16[8,512,128]{2,1,0}) parameter(0)
  %w = bf16[2048,500]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=0
  %v = bf16[2048,512]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %t = bf16[2050,2048]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=2
  %c = bf16[8,512,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%s), index=3
  %i = s32[8]{0:T(128)S(1)} constant({...})
  %x = bf16[8,2048]{1,0:T(8,128)(2,1)S(1)} fusion(%t, %i), kind=kLoop, calls=%looked_up
  %y = bf16[8,500]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %w), kind=kOutput, calls=%product
  %r = bf16[8,500]{1,0:T(8,128)(2,1)S(1)} all-reduce(%y), replica_groups={{0,1,2,3}}, to_apply=%add
  %start = ((bf16[2048,512]{1,0}), bf16[2048,128]{1,0:T(8,128)(2,1)S(1)}, s32[]) async-start(%v), calls=%sliced
  %done = bf16[2048,128]{1,0:T(8,128)(2,1)S(1)} async-done(%start)
  %n = bf16[8,1,128]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%r, %done), custom_call_target="f"
  %z = s32[]{:T(128)S(6)} constant(0)
  %d = bf16[8,512,128]{2,1,0:T(8,128)(2,1)} fusion(%c, %n, %z), kind=kLoop, calls=%updated
  ROOT %o = (bf16[2048,500], bf16[2048,512], bf16[2050,2048], bf16[8,512,128]) tuple(%w, %v, %t, %d)
}

%condition (s: (bf16[2048,500], bf16[2048,512], bf16[2050,2048], bf16[8,512,128])) -> pred[] {
  %s = (bf16[2048,500], bf16[2048,512], bf16[2050,2048], bf16[8,512,128]) parameter(0)
  ROOT %p = pred[] constant(true)
}

ENTRY %main (a: bf16[8,512,128]) -> () {
  %a = (bf16[2048,500], bf16[2048,512], bf16[2050,2048], bf16[8,512,128]) parameter(0)
  ROOT %l = () while(%a), condition=%condition, body=%body
}
"""
CACHE = 8 * 512 * 128 * 2


def test_a_step_reads_what_is_in_hbm_and_padding():
    numbers = step_numbers(Program(LOOP), CACHE)
    assert numbers["read_bytes"] == 2 * (2048 * 512 + 2048 * 128 + 8 * 2048)
    assert numbers["collectives"] == {"all-reduce": 1}
    assert numbers["collective_bytes"]["all-reduce"] == 8 * 500 * 2 * 2 * 3 / 4
    assert not numbers["copies"] and not numbers["call_copies"]


def test_elements_of_a_tuple_may_be_named_directly():
    """As newer versions of libtpu write them."""
    named = LOOP.replace("fusion(%t, %i)", "fusion(%s#2, %i)").replace("fusion(%x, %w)", "fusion(%x, %s#0)")
    named = named.replace("fusion(%c, %n, %z)", "fusion(%s#3, %n, %z)")
    for array, layout in (("2048,500", "1,0"), ("2050,2048", "1,0"), ("8,512,128", "2,1,0")):  # in the tuple
        named = named.replace(f"bf16[{array}]{{{layout}}}", f"bf16[{array}]{{{layout}:T(8,128)(2,1)}}")
    assert named.count("#") == 3 and step_numbers(Program(named), CACHE) == step_numbers(Program(LOOP), CACHE)


def test_a_cache_in_another_layout_around_the_loop_is_seen():
    entry = "  %b = bf16[8,512,128]{2,0,1:T(8,128)(2,1)} copy(%a)\n  ROOT %l ="
    numbers = step_numbers(Program(LOOP.replace("  ROOT %l =", entry)), CACHE)
    assert numbers["call_copies"] == {"bf16[8,512,128]": 1} and numbers["call_copied_bytes"] == CACHE
    assert not numbers["copies"]


def test_a_copied_cache_is_seen_and_read():
    copied = LOOP.replace(
        "  %d = bf16", "  %e = bf16[8,512,128]{2,0,1:T(8,128)(2,1)} copy(%c)\n  %d = bf16"
    )  # in another layout
    numbers = step_numbers(Program(copied), CACHE)
    assert numbers["copies"] == {"bf16[8,512,128]": 1} and numbers["copied_bytes"] == CACHE
    assert numbers["read_bytes"] == step_numbers(Program(LOOP), CACHE)["read_bytes"] + CACHE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--plan", "--plan needs --topology"),
        ("--topology v5e:2x4 a", "--topology is for --plan: leave it out, or add --plan"),
        ("--batch-size 4 a", "--batch-size is for --plan"),
        (
            "--plan --topology v5e:2x4 --seed 3 --top-k 5 --no-verify a",
            "runs nothing: leave out the prompts, --top-k, --seed, --no-verify",
        ),
        ("--plan --topology v5e:2x4 --plan-output no/x.json", "--plan-output no/x.json: there is no such directory"),
        ("--plan --topology v5e:2x4 --batch-size 0", "--batch-size 0: must be at least 1"),
        ("--plan --topology v5e", "--topology v5e: expected a generation"),
    ],
)
def test_contradictions_are_errors(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--model", "125m", *words.split()]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture
def libtpu():
    """Restores the environment, which a plan changes."""
    if not (LIBTPU / "libtpu").is_dir():
        pytest.skip(f"no libtpu in {LIBTPU}: `make test` installs it (Linux)")
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "cache_dtype", "data"), [(128, "bfloat16", 2), (64, "bfloat16", 1), (128, "int8", 1)]
)
def test_a_plan_for_a_slice(tmp_path, libtpu, capsys, head_dim, cache_dtype, data):
    # Wide enough that its weights, 0.4 GB a chip, do not stay in the chip's 128 MB of faster memory.
    width, columns, tensor = 8192, 1024, 4 // data
    config = OPTConfig(
        vocab_size=512,
        hidden_size=width,
        num_hidden_layers=1,
        ffn_dim=4 * width,
        num_attention_heads=width // head_dim,
        max_position_embeddings=columns,
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    output = tmp_path / "plan.json"
    words = f"--plan --topology v5e:2x2 --batch-size 8 --max-new-tokens {columns - 16} --plan-output {output}"
    words = f"{words} --cache-dtype {cache_dtype} --mesh data={data},tensor={tensor} --model {tmp_path}"
    assert main(["generate", *words.split()]) == 0
    printed, said = capsys.readouterr()
    assert "compiling for 4 chips" in said
    plan = json.loads(output.read_text())
    assert plan["fits"] and plan["mesh"] == {"data": data, "fsdp": 1, "tensor": tensor}
    assert plan["cache_columns"] == plan["max_length"] == columns and plan["prompt_length"] == 16
    weights, cache = 2 * (12 * width**2 + 512 * width) // tensor, plan["cache_bytes_per_chip"]
    vector = head_dim + 4 if cache_dtype == "int8" else 2 * head_dim  # bytes; an int8 one has a scale
    assert cache == 2 * 8 * columns * width // head_dim * vector // 4
    assert weights < plan["floor_bytes"] - cache < 1.001 * weights < plan["parameter_bytes_per_chip"]
    assert weights + cache < plan["decode_peak_bytes"] <= plan["hbm_bytes_per_chip"]
    assert 0.7 < plan["read_ratio"] <= 1.1
    assert not plan["copies"]
    assert plan["call_copies"].keys() <= {f"bf16[{width},{width // tensor}]"}  # no cache
    # Two sums for a layer, and one for the embedding. The best token and logit of each chip, and the mask of the cache.
    # With the rows in two groups, something small for each row.
    assert plan["collectives"] == {"all-gather": 3 if data == 1 else 4, "all-reduce": 3}
    assert plan["collective_bytes"]["all-gather"] < 10**5
    assert plan["milliseconds"] == pytest.approx(plan["read_bytes"] / 819e6, abs=1e-3)
    for words in ("a step must read", "all-reduce", "a step writes anew", "v5e:2x2"):
        assert words in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "plan.json"]
