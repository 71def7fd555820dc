"""Conversions in their own processes: kills, full disks, bounded memory, several processes on one checkpoint."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.hf_files import TINY, hf_shapes, hf_weights, write_hf
from support.peft_files import pairs
from support.peft_files import write as write_adapter
from support.processes import environment, free_address, outcomes, start

from convert.__main__ import main
from opt_jax import OPTForCausalLM
from opt_jax.checkpoints import hub

ROOT = Path(__file__).parents[2]
ENVIRONMENT = environment()


def python(code: str, *args: object, check: bool = True, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-c", code, *map(str, args)]
    # Through a shell, because on Linux (vfork) a process inherits the peak memory of the one that starts it.
    command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=300, **options)
    assert not check or done.returncode == 0, done.stderr
    return done


# Kills ----------------------------------------------------------------------------------------------------------------

# Imports once, and forks a conversion for each moment, because starting Python takes longer than converting.
KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import convert.source, convert.to_hf, convert.to_orbax
from convert.__main__ import main
from opt_jax.checkpoints import directories, hub
command, dst, old, moments = sys.argv[1].split(), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
quiet = os.open(os.devnull, os.O_WRONLY)
OLD, NEW = 1, 8  # layers

def fork(action):
    if (child := os.fork()) == 0:  # JAX starts its threads in the children only
        os.dup2(quiet, 1)
        os._exit(action())
    return child

def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def write():
    os.dup2(quiet, 2)
    return main([*command, str(dst), '--overwrite'])

def layers():
    opened = convert.source.open_directory(dst)
    for array in opened.arrays.values():
        array.load()
    return opened.config.num_hidden_layers

def reset():
    shutil.rmtree(dst, ignore_errors=True)
    if old:
        shutil.copytree(old, dst)

def staging():
    return any(path.name.startswith('.') for path in dst.parent.iterdir())

def wait_for(condition, child):
    while not condition() and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)

reset()
child = fork(write)
wait_for(staging, child)
begin = time.monotonic()
assert status(child) == 0
writing = time.monotonic() - begin
seen = dict(none=0, old=0, new=0, left=0)
for i in range(moments):
    reset()
    child = fork(write)
    if i % 5:  # while it writes; every fifth one earlier, or while it reads
        wait_for(staging, child)
    time.sleep(writing * 1.1 * random.Random(i).random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen['left'] += staging()
    if not dst.exists():
        seen['none'] += 1
        continue
    published = status(fork(layers))
    assert published in (OLD, NEW), published
    seen['old' if published == OLD else 'new'] += 1
assert status(fork(write)) == 0 and status(fork(layers)) == NEW
assert [path.name for path in dst.parent.iterdir()] == [dst.name]
print(seen)
"""


@pytest.mark.combinations
@pytest.mark.slow
@pytest.mark.parametrize("command", ["", "to-hf --max-shard-size 3MB"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_any_moment(tmp_path, sample, command, overwrite):
    """DST has no checkpoint, the old one or the new one, never a part of one. The next run cleans up and succeeds."""
    config = TINY | dict(hidden_size=256, word_embed_proj_dim=256, ffn_dim=2048, num_hidden_layers=8)
    source = write_hf(tmp_path / "hf", config, hf_weights(config))
    old = ""
    if overwrite:
        small = TINY | dict(num_hidden_layers=1)
        old = tmp_path / "old"
        other = write_hf(tmp_path / "small", small, hf_weights(small))
        assert main([*command.split(), str(other), str(old)]) == 0
    (tmp_path / "place").mkdir()
    moments = len(sample(range(20), 6))
    done = python(KILLER, f"{command} {source}", tmp_path / "place" / "dst", old, moments)
    seen = eval(done.stdout)
    assert seen["left"] >= moments // 4, seen  # enough kills came while it was writing
    assert seen["old" if overwrite else "none"] >= moments // 4, seen
    assert seen["none"] + seen["old"] + seen["new"] == moments, seen
    assert OPTForCausalLM.from_pretrained(tmp_path / "place" / "dst").config.num_hidden_layers == 8


# Full disks -----------------------------------------------------------------------------------------------------------


# Imports once, and forks a conversion for each case.
FILL = """
import json, os, subprocess, sys
import convert.source, convert.to_hf, convert.to_orbax
from convert.__main__ import main
from opt_jax.checkpoints import directories

def fill(when, command, old, dst):
    if old:
        assert main([*command.split(), old, dst, '--quiet']) == 0
    if when == 'late':  # something else fills the disk after we have looked
        directories.check_space = lambda path, nbytes: None
    code = main([*command.split(), 'tiny', dst, '--overwrite'])
    if old:
        assert code == 0 or main(['verify', dst, '--against', old]) == 0
    return code

results = []
for place, kilobytes, *case in json.loads(sys.argv[1]):
    os.mkdir(place)
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={kilobytes}k', 'none', place]
    if subprocess.run(mount).returncode:
        sys.exit(77)
    if (child := os.fork()) == 0:
        os.dup2(os.open(place + '.said', os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(fill(*case, place + '/dst'))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    results.append([code, open(place + '.said').read(), os.listdir(place)])
print(json.dumps(results))
"""


LATE = (6000, 7200, 7600)  # kilobytes: the disk is full within the arrays, at their end, or after them


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line(tmp_path, sample):
    if shutil.which("unshare") is None:
        pytest.skip("needs `unshare -rm` and tmpfs, to make a small file system without being root")
    old, cases = str(write_hf(tmp_path / "old", TINY, hf_weights(TINY))), []
    for i, (before, command) in enumerate(itertools.product(("", old), ("", "to-hf"))):
        late = sample(LATE, 1, seed=5 * i)
        for when, kilobytes in (("early", 6000), *(("late", size) for size in late)):  # tiny has 7.1 MB
            cases.append((str(tmp_path / str(len(cases))), kilobytes, when, command, before))
    command = ["unshare", "-rm", sys.executable, "-c", FILL, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=300)
    if done.returncode == 77:
        pytest.skip(f"no tmpfs here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    for (_, kilobytes, when, _, before), (code, said, left) in zip(cases, json.loads(done.stdout), strict=True):
        if code == 0 and kilobytes > 7000:  # it just fits
            continue
        assert code == 1 and said.startswith("error: ") and said.count("\n") == 1, said
        late_words = r"No space left on device \(.*\d are free\)"
        words = "MB are needed, but .* MB are free" if when == "early" else late_words
        assert re.search(f"{words}: make room there", said), said
        assert left == (["dst"] if before else [])  # the old one is complete, or there is none


@pytest.mark.slow
@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_cleans_up(tmp_path, sent, code):
    config = TINY | dict(hidden_size=512, word_embed_proj_dim=512, ffn_dim=8192, num_hidden_layers=8)
    source = write_hf(tmp_path / "hf", config, hf_weights(config))
    command = [sys.executable, "-m", "convert", str(source), str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.new/new/*")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(sent)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == code and "Traceback" not in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


LOST = """
import gc, os, runpy, signal, sys, time
from opt_jax.checkpoints import directories
sent = int(sys.argv.pop())
def signalled(*_):
    gc.callbacks.clear()
    os.kill(os.getpid(), sent)
def check_space(*_):  # amid the conversion
    gc.callbacks.append(signalled)
    gc.collect()
    for _ in range(400):
        time.sleep(0.1)
directories.check_space = check_space
runpy.run_module('convert', run_name='__main__', alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_amid_a_garbage_collection_is_not_lost(tmp_path, sent, code):
    command = [sys.executable, "-c", LOST, "tiny", str(tmp_path / "out"), str(int(sent))]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, timeout=50)
    assert done.returncode == code and done.stderr == "interrupted; nothing half-written is left\n", done.stderr
    assert not list(tmp_path.iterdir())


# Memory ---------------------------------------------------------------------------------------------------------------

MEASURED = """
import resource, sys
import convert.metaseq, convert.source, convert.to_hf, convert.to_orbax
from convert.__main__ import main
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
code = main(sys.argv[1:])
print((peak() - before) * (1 if sys.platform == 'darwin' else 1024))
sys.exit(code)
"""


# 0.9 GB in tensors of 16 MB: memory shows if all are held, or copies of each for too long.
LARGE = TINY | dict(
    vocab_size=64, hidden_size=2048, word_embed_proj_dim=2048, ffn_dim=4096, num_hidden_layers=14, dtype="float16"
)


def assert_bounded(largest: int, *command: object) -> None:
    peak = int(python(MEASURED, *command).stdout.splitlines()[-1])
    assert peak < 2 * largest + 512 * 2**20, (peak, command)


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size(tmp_path):
    source, largest, offset, header = tmp_path / "hf", 0, 0, {}
    for name, shape in hf_shapes(LARGE).items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset, largest = offset + nbytes, max(largest, nbytes)
    source.mkdir()
    (source / "config.json").write_text(json.dumps(LARGE))
    raw = json.dumps(header).encode()
    with open(source / "model.safetensors", "wb") as file:  # sparse: zeros take up no disk
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    assert offset > 1.5 * (2 * largest + 512 * 2**20)  # so a model in memory would exceed the bound
    assert_bounded(largest, source, tmp_path / "orbax")
    assert_bounded(largest, "to-hf", tmp_path / "orbax", tmp_path / "back")
    assert_bounded(largest, "verify", tmp_path / "orbax", "--against", tmp_path / "back")
    for directory in ("orbax", "back"):
        shutil.rmtree(tmp_path / directory)
    targets = [f"model.decoder.layers.{i}.{name}" for i in range(14) for name in ("fc1", "fc2")]
    adapter = write_adapter(tmp_path / "adapter", pairs(targets, config=LARGE), target_modules=["fc1", "fc2"])
    assert_bounded(largest, source, tmp_path / "merged", "--adapter", adapter, "--dtype", "float32")


@pytest.mark.slow
def test_memory_is_bounded_for_metaseq(tmp_path):
    """2 parts x 2 shards: 0.9 GB in flat parameters of 17 MB for each shard."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LARGE))
    code = (
        "import sys, json; from pathlib import Path; sys.path.insert(0, 'tests')\n"
        "import numpy as np; from support.hf_files import hf_shapes\n"
        "from support.metaseq_files import contents, write\n"
        "config = json.loads(Path(sys.argv[1]).read_text())\n"
        "weights = {name: np.ones(shape, np.float16) for name, shape in hf_shapes(config).items()}\n"
        "write(Path(sys.argv[2]), contents(weights, 2, 2, flat=True, metadata=False))"
    )
    python(code, config, tmp_path / "metaseq")
    flat = 2 * (4 * 2048 * 2048 + 2 * 2048 * 4096) // 4
    assert_bounded(flat, "metaseq", tmp_path / "metaseq", tmp_path / "orbax", "--config", config)


# Several processes ----------------------------------------------------------------------------------------------------


def together(code: str, *args: object, count: int = 2) -> list[subprocess.CompletedProcess]:
    """Run the code in `count` processes, with arguments i, address, count, *args."""
    address = free_address()
    commands = [[sys.executable, "-c", code, str(i), address, str(count), *map(str, args)] for i in range(count)]
    done = outcomes([start(command) for command in commands])
    return [subprocess.CompletedProcess(c, *outcome) for c, outcome in zip(commands, done, strict=True)]


CONVERT = """
import sys
from convert.__main__ import main
i, address, count = sys.argv[1:4]
job = ['--coordinator-address', address, '--num-processes', count, '--process-id', i]
sys.exit(main([*sys.argv[4:], *job]))
"""

LOAD = """
import sys
import jax, numpy as np, tensorstore as ts
jax.distributed.initialize(sys.argv[2], int(sys.argv[3]), int(sys.argv[1]))
import os
from opt_jax import OPTForCausalLM, named_parameters
from opt_jax.parallel.mesh import make_mesh

read = 0
preadv = os.preadv
def counted(*args):
    global read
    count = preadv(*args)
    read += count
    return count
os.preadv = counted

def file_bytes():
    metrics = ts.experimental_collect_matching_metrics('/tensorstore/kvstore/file/bytes_read')
    return sum(value['value'] for metric in metrics for value in metric['values'])

mesh = make_mesh('fsdp=2')
hf, orbax = sys.argv[4:6]
one = OPTForCausalLM.from_pretrained(hf, mesh=mesh)
print(read)
before = file_bytes()
two = OPTForCausalLM.from_pretrained(orbax, mesh=mesh)
print(file_bytes() - before)
mine = 0
for path, param in named_parameters(one).items():
    ours, theirs = param.get_value(), named_parameters(two)[path].get_value()
    assert ours.sharding == theirs.sharding and not ours.is_fully_addressable
    for a, b in zip(ours.addressable_shards, theirs.addressable_shards, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
        mine += a.data.nbytes
print(mine)
"""


@pytest.mark.slow
def test_several_processes_convert_and_load_their_parts(tmp_path, monkeypatch):
    config = TINY | dict(vocab_size=1024, hidden_size=256, word_embed_proj_dim=256, ffn_dim=1024)
    source = write_hf(tmp_path / "hf", config, hf_weights(config), "bin")
    for command in ([source, tmp_path / "orbax"], ["to-hf", "--max-shard-size", "2MB", source, tmp_path / "back"]):
        for done in together(CONVERT, *command):
            assert done.returncode == 0, done.stderr
        assert main(["verify", str(command[-1]), "--against", str(source)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "orbax"]

    # Each process reads the bytes of its shards: exactly these from HF files, the chunks with them from Orbax.
    monkeypatch.setattr("opt_jax.checkpoints.chunks.CHUNK_BYTES", 64 << 10)
    assert main([str(tmp_path / "back"), str(tmp_path / "chunks")]) == 0
    for done in together(LOAD, source, tmp_path / "chunks"):
        assert done.returncode == 0, done.stderr
        numbers = [int(line) for line in done.stdout.splitlines() if line.isdigit()]  # Gloo has lines of its own
        from_hf, from_orbax, mine = numbers
        total = sum(4 * int(np.prod(shape)) for shape in hf_shapes(config).values())
        assert mine < 0.52 * total and from_hf == mine
        assert from_orbax < 1.1 * mine


@pytest.mark.slow
def test_processes_with_different_options_refuse(tmp_path):
    """Else each would cast the part that it writes in its own way."""
    code = CONVERT.replace("*job", "'--dtype', ['float16', 'bfloat16'][int(i)], *job")
    results = together(code, "tiny", tmp_path / "out")
    assert [done.returncode for done in results] == [1, 1], results
    for i, done in enumerate(results):
        error = f'convert: error: process {i}: the processes differ: --dtype is "float16" on process 0, but ' + (
            '"bfloat16" on process 1'
        )
        assert error in done.stderr.splitlines(), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_error_in_one_process_ends_all(tmp_path):
    # First while writing, then while opening a source that only one of them has.
    weights = hf_weights(TINY)
    weights["model.decoder.layers.1.fc1.weight"][:] = 1e30
    source = write_hf(tmp_path / "hf", TINY, weights)
    results = together(CONVERT, source, tmp_path / "out", "--dtype", "float16")
    assert [done.returncode for done in results] == [1, 1]
    errors = [line for done in results for line in done.stderr.splitlines() if line.startswith("convert: error: ")]
    assert len(errors) == 2
    assert sum("fc1.weight has values that float16 cannot hold" in error for error in errors) == 1
    assert sum("failed: see its message" in error for error in errors) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] and hub.is_model(source)

    in_directory = f"import os\nos.chdir('{tmp_path}' if i == '0' else '/')\njob ="
    results = together(CONVERT.replace("job =", in_directory), "hf", tmp_path / "out")
    assert [done.returncode for done in results] == [1, 1]
    assert "convert: error: process 0: process 1 failed: see its message" in results[0].stderr
    assert "convert: error: process 1: no directory" in results[1].stderr and list(tmp_path.iterdir()) == [source]


STOPPED = """
import os, time
from opt_jax.checkpoints import directories
def check_space(*_):  # amid the conversion
    if sys.argv[1] == '1':
        os.kill(os.getpid(), int(sys.argv[6]))
        time.sleep(60)
directories.check_space = check_space
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent, codes", [(signal.SIGKILL, [75, -9]), (signal.SIGTERM, [1, 143])])
def test_a_process_that_is_stopped_ends_all(tmp_path, sent, codes):
    source = write_hf(tmp_path / "hf", TINY, hf_weights(TINY))
    code = CONVERT.replace("i, address", f"{STOPPED}\ni, address").replace("*sys.argv[4:]", "*sys.argv[4:6]")
    results = together(code, source, tmp_path / "out", int(sent))
    assert [done.returncode for done in results] == codes, results
    line = "lost process 1" if sent == signal.SIGKILL else "process 1 failed: see its message"
    assert line in results[0].stderr and "Traceback" not in results[0].stderr + results[1].stderr
    assert not (tmp_path / "out").exists()
    assert main([str(source), str(tmp_path / "out")]) == 0  # it clears what they have left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
