"""`opt-jax` on a small model with random weights and a tokenizer trained here."""

import io
import re
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
from flax import nnx
from support.processes import environment
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders

from opt_jax import OPTConfig, OPTForCausalLM, OPTTokenizer
from opt_jax.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([__doc__ or ""] * 3, trainer)
    tokenizer = OPTTokenizer(backend)
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        ffn_dim=40,
        max_position_embeddings=64,
        init_std=0.3,
    )
    path = tmp_path_factory.mktemp("cli") / "model"
    OPTForCausalLM(config, rngs=nnx.Rngs(0)).save_pretrained(path, tokenizer=tokenizer)
    return str(path)


def expected(folder, prompt, **options):
    tokenizer, model = OPTTokenizer.from_pretrained(folder), OPTForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="np")
    out = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return prompt + tokenizer.decode(out, skip_special_tokens=True) + "\n"


def stdin(monkeypatch, content: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.slow
def test_text_is_that_of_generate_and_comes_in_pieces(folder, monkeypatch):
    pieces = []

    class Terminal(io.StringIO):
        def flush(self):  # what was written appears now
            pieces.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    options = ["--temperature", "1.5", "--top-k", "30", "--top-p", "0.9", "--seed", "7", "--max-new-tokens", "30"]
    assert main(["generate", "--model", folder, *options, "a model"]) == 0
    settings = dict(do_sample=True, temperature=1.5, top_k=30, top_p=0.9, seed=7, max_new_tokens=30)
    assert pieces[-1] == expected(folder, "a model", **settings)
    assert pieces[0] == "a model" and len(set(pieces)) > 10


@pytest.mark.slow
def test_several_prompts_and_defaults(folder, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["generate", "weights", "with random", "--model", folder]) == 0
    settings = dict(do_sample=True, temperature=0.7, top_k=50)
    texts = [  # as many tokens as fit into the context
        expected(folder, prompt, max_new_tokens=64 - n, seed=seed, **settings)
        for seed, (prompt, n) in enumerate(
            (p, len(OPTTokenizer.from_pretrained(folder).encode(p))) for p in ("weights", "with random")
        )
    ]
    assert capsys.readouterr() == ("\n".join(texts), "")


def test_penalties_and_stops(folder, capsys):
    args = ["--repetition-penalty", "1.5", "--no-repeat-ngram-size", "2", "--min-p", "0.01", "--stop", "e", "t"]
    assert main(["generate", "a", "--model", folder, "--max-new-tokens", "30", "--seed", "3", *args]) == 0
    settings = dict(do_sample=True, temperature=0.7, top_k=50, min_p=0.01, repetition_penalty=1.5, seed=3)
    text = expected(folder, "a", max_new_tokens=30, no_repeat_ngram_size=2, **settings)
    printed = capsys.readouterr().out.removesuffix("\n")
    assert text.startswith(printed) and len(printed) < len(text) - 1 and printed[-1] in "et"


def test_greedy_from_standard_input(folder, tmp_path, monkeypatch, capsys):
    """--temperature 0 wins over the checkpoint's options."""
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "generation_config.json").write_text('{"do_sample": true, "temperature": 9.0}')
    stdin(monkeypatch, b"two\nlines\n")
    assert main(["generate", "--model", str(model), "--temperature", "0", "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr() == (expected(folder, "two\nlines", max_new_tokens=9), "")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"opt-jax \d+\.\d+.*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model", "no/such/model", "a"], "no/such/model"),
        (["--model", "{folder}", "--temperature", "-1", "a"], "temperature=-1.0"),
        (["--model", "{folder}", "--temperature", "0", "--min-p", "0.1", "a"], "--min-p without effect: --temp"),
        (["--model", "{folder}", "--temperature", "0", "--top-k", "5", "a"], "--top-k without effect"),
        (["--model", "{folder}", "--temperature", "0", "--top-p", "0.5", "a"], "--top-p without effect"),
        (["--model", "{folder}", "--temperature", "0", "--seed", "5", "a"], "--seed without effect"),
        (["--model", "{folder}", "--top-p", "2", "a"], "top_p=2"),
        (["--model", "{folder}", "--max-new-tokens", "100", "a"], "max_position_embeddings=64"),
        (["--model", "{folder}", "a " * 100], "more than max_position_embeddings=64"),
        (["--model", "{folder}", "\udcff"], "surrogate"),
        (["--model", "{folder}"], "standard input is empty"),
    ],
)
def test_errors_are_one_line(folder, monkeypatch, capsys, args, words):
    stdin(monkeypatch, b"\n")
    assert main(["generate", *(arg.format(folder=folder) for arg in args)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("opt-jax: error: ") and words in err and err.count("\n") == 1


def test_no_prompt_on_a_terminal(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("never read"))
    assert main(["generate"]) == 1
    assert 'opt-jax generate "' in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["sing"], ["generate", "--temprature", "1", "a"], ["generate", "--seed", "x"]])
def test_usage_errors(args, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    assert exit_info.value.code == 2 and capsys.readouterr().out == ""


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["generate", "--help"])
    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    for option in ("--model", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--stop", "PROMPT"):
        assert option in text


def test_warnings_are_one_line(folder, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # as outside of pytest
        assert main(["generate", "--model", folder, "--max-new-tokens", "1", "</s>a"]) == 0
    assert capsys.readouterr().err == "opt-jax: warning: ids begin with '</s>' twice: leave it out of the text\n"


def start(folder, prompt):
    """Start the program, and return when it has printed the prompt, before the first token."""
    command = [sys.executable, "-m", "opt_jax.cli", "generate", "--model", folder, prompt]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stdout.read(len(prompt)) == prompt.encode()
    return process


def test_interrupted(folder):
    with start(folder, "hello") as process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130 and err == b"opt-jax: interrupted\n"


@pytest.mark.slow
def test_reader_of_the_pipe_leaves(folder):
    with start(folder, "hello") as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_help_needs_no_jax():
    code = "import sys, opt_jax.cli; assert not {'jax', 'flax', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(START="fresh"))
