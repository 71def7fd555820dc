"""`push_to_hub`, with huggingface_hub's own client and a server on this machine."""

import json

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from reference import our_model
from support.hub_server import HubServer, Resolver

from opt_jax import OPTForCausalLM, OPTTokenizer, named_parameters

TOKEN = "hf_writer"
# huggingface_hub 2.4 itself calls its HTTP client, httpx2, in the way that this one calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def server(monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # which has a protocol of its own
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()


def test_a_model_is_published_and_loaded(server, tmp_path):
    model = our_model("opt-125m")
    tokenizer = OPTTokenizer.from_pretrained("tiny")
    url = model.push_to_hub("me/small", tokenizer=tokenizer, token=TOKEN, private=True, max_shard_size="20KB")
    repository = server.repositories["me/small"]
    assert url.startswith(f"{server.endpoint}/me/small/commit/") and repository.private
    assert {"config.json", "README.md", "tokenizer.json", "model.safetensors.index.json"} < {*repository.files}
    assert repository.commits == ["Upload a model of opt-jax"]

    card = repository.files["README.md"].decode()
    assert 'OPTForCausalLM.from_pretrained("me/small")' in card
    assert f"{model.num_parameters():,} parameters: 3 layers of width 24" in card
    assert "pipeline_tag: text-generation" in card and "base_model" not in card
    with Resolver(server.endpoint, tmp_path / "home") as resolve:
        answer = resolve("me/small")
    loaded = OPTForCausalLM.from_pretrained(answer["path"])
    for path, param in named_parameters(loaded).items():
        assert (np.asarray(param.get_value()) == np.asarray(named_parameters(model)[path].get_value())).all(), path
    assert OPTTokenizer.from_pretrained(answer["path"]).encode("x") == tokenizer.encode("x")


def test_a_card_that_is_there_stays(server):
    model = our_model("opt-125m", num_hidden_layers=1)
    model.push_to_hub("me/small", token=TOKEN)
    assert not server.repositories["me/small"].private
    server.repositories["me/small"].files["README.md"] = b"mine"
    model.push_to_hub("me/small", token=TOKEN, commit_message="Again")
    repository = server.repositories["me/small"]
    assert repository.files["README.md"] == b"mine" and repository.commits == ["Upload a model of opt-jax", "Again"]


def test_a_tokenizer_is_published(server):
    OPTTokenizer.from_pretrained("tiny").push_to_hub("words", token=TOKEN)
    files = server.repositories["me/words"].files
    assert {"tokenizer.json", "tokenizer_config.json"} <= {*files} and "README.md" not in files
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "GPT2Tokenizer"


def test_who_may_not_write_gets_the_answer_of_the_hub(server):
    with pytest.raises(HfHubHTTPError, match="401"):
        our_model("opt-125m", num_hidden_layers=1).push_to_hub("me/small", token="hf_reader")
    assert not server.repositories


def test_the_card_names_the_model_that_was_loaded(server):
    model = our_model("opt-125m", num_hidden_layers=1)
    model.name_or_path = "/cache/models--facebook--opt-125m/snapshots/abc"
    model.push_to_hub("me/small", token=TOKEN)
    card = server.repositories["me/small"].files["README.md"].decode()
    assert "\nbase_model: facebook/opt-125m\n---" in card and "loaded from `facebook/opt-125m`" in card
