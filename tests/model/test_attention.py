"""Flash attention against plain attention, forward and gradients; which implementation is chosen where."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opt_jax import OPTConfig, OPTForCausalLM
from opt_jax.model import attention, flash
from opt_jax.model.attention import AttentionMask, DropoutKey, attend, flash_attend
from opt_jax.parallel.mesh import make_mesh, use_mesh


def arrays(head_dim, length, kind):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (2, 2, length, head_dim)) for key in keys)
    columns = np.arange(length)
    real = np.stack([columns < length - 17, columns < length])
    mask = AttentionMask(
        {"right": jnp.asarray(real), "left": jnp.asarray(real[:, ::-1])}.get(kind),
        jnp.asarray(np.stack([columns // 37, columns // 50])) if kind == "segments" else None,
        0,
    )
    if mask.key_mask is not None:  # the output at pads does not matter
        weight = jnp.where(mask.key_mask[:, None, :, None], weight, 0)
    return q * head_dim**-0.5, k, v, mask, weight


@pytest.mark.parametrize("kind", [None, "segments", "left", "right"])
def test_causal_attention_in_blocks_is_attention(kind, monkeypatch):
    q, k, v, mask, weight = arrays(8, 300, kind)

    def f(q, k, v):
        out, weights = attend(q, k, v, mask)
        return (out * weight).sum(), jnp.where((weight != 0).any(-1, keepdims=True), weights, 0)

    def run(blocks):
        monkeypatch.setattr(attention, "MOST_BLOCKS", blocks)
        gradients = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))
        alone = jax.jit(lambda q, k, v: attend(q, k, v, mask)[0]).lower(q, k, v).compile().as_text()
        return gradients(q, k, v), alone or ""

    (expected, one_block), (got, blocks) = run(1), run(8)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), got, expected)
    assert ["[2,2,300,300]" in text for text in (one_block, blocks)] == [True, False]  # all scores


def test_dropout_acts_on_weights_of_many_queries_too():
    """So many that, without dropout, attention would run in blocks."""
    q, k, v, mask, _ = arrays(8, 300, None)
    _, weights = attend(q, k, v, mask, dropout_rate=0.5, dropout_key=DropoutKey.of(jax.random.key(1), 2))
    seen = np.asarray(weights)[:, :, np.tri(300, dtype=bool)]
    assert abs((seen == 0).mean() - 0.5) < 4 * 0.5 / seen.size**0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "length", "kind"), [(64, 128, None), (80, 150, "segments"), (128, 128, "left"), (64, 100, "right")]
)
def test_splash_is_attention(head_dim, length, kind):
    q, k, v, mask, weight = arrays(head_dim, length, kind)

    def plain(q, k, v):
        return (attend(q, k, v, mask)[0] * weight).sum()

    def kernel(q, k, v):
        return (flash.splash(q, k, v, mask.segments(), interpret=True) * weight).sum()

    expected, got = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, k, v) for f in (plain, kernel))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for name, a, b in zip("qkv", got[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max(), err_msg=name)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("kind", [None, "segments"])
def test_splash_on_a_mesh_is_attention(kind, monkeypatch):
    monkeypatch.setitem(flash.KERNELS, "splash", partial(flash.splash, interpret=True))
    q, k, v, mask, weight = arrays(64, 128, kind)

    def loss(attention, q, k, v):
        return (attention(q, k, v, mask) * weight).sum()

    expected = jax.jit(jax.value_and_grad(partial(loss, lambda *qkv_mask: attend(*qkv_mask)[0]), (0, 1, 2)))(q, k, v)
    split = partial(loss, partial(flash_attend, "splash"))
    # The compiler shards the model, as in evaluation or with `from_pretrained`: each device has a row and a head.
    with use_mesh(make_mesh("data=2,tensor=2", jax.devices()[:4])):
        step = jax.jit(jax.value_and_grad(split, (0, 1, 2)))
        text, got = str(jax.make_jaxpr(split)(q, k, v)), step(q, k, v)
    assert "shard_map" in text and "f32[1,1,128,64]" in text
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for name, a, b in zip("qkv", got[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max(), err_msg=name)


def cudnn_gradients(q, k, v, segment_ids=None, weight=1.0):
    return jax.grad(lambda q, k, v: (flash.cudnn(q, k, v, segment_ids) * weight).astype(jnp.float32).sum(), (0, 1, 2))(
        q, k, v
    )


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("segments", [False, True])
def test_cudnn_takes_the_head_dims_of_all_sizes(head_dim, segments, monkeypatch):
    """Lowered for CUDA, without a GPU. JAX checks sizes and options against cuDNN's.

    Only cuDNN's version is made up: 9.1, the oldest for which JAX has this kernel.
    """
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 90100)
    x = jax.ShapeDtypeStruct((2, 4, 256, head_dim), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32) if segments else None
    lowered = jax.jit(cudnn_gradients).trace(x, x, x, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmha" in lowered and "Backward" in lowered
    assert "256x256xf32" not in lowered and "256x256xbf16" not in lowered or segments  # [T, T]: at most the mask
    if jax.default_backend() != "gpu":  # a Hopper GPU accepts it
        odd = jax.ShapeDtypeStruct((2, 4, 256, 136), jnp.bfloat16)
        with pytest.raises(NotImplementedError, match="head dim"):  # so JAX does check
            jax.jit(cudnn_gradients).trace(odd, odd, odd).lower(lowering_platforms=("cuda",))


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "runs"), [("none", 1), ("dots", 1), ("names", 1), ("full", 2)])
def test_cudnn_runs_again_in_the_backward_pass_only_if_nothing_is_kept(remat, runs, monkeypatch):
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 90100)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=128,
        num_attention_heads=2,
        ffn_dim=96,
        word_embed_proj_dim=128,
        num_hidden_layers=3,
        max_position_embeddings=128,
    )
    options: dict[str, Any] = dict(dtype="bfloat16", attn_implementation="cudnn", remat=remat, scan_layers=True)
    model = nnx.eval_shape(lambda: OPTForCausalLM(config, rngs=nnx.Rngs(0), **options))
    ids = jnp.zeros((2, 128), jnp.int32)
    gradients = jax.jit(jax.grad(lambda model: model.forward(ids, labels=ids).loss))
    lowered = gradients.trace(model).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@__cudnn$fmhaSoftmaxBackward(") == 1 and lowered.count("@__cudnn$fmhaSoftmax(") == runs


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("kind", [None, "segments"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_cudnn_is_attention(head_dim, kind):
    q, k, v, mask, weight = arrays(head_dim, 256, kind)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    plain = jax.grad(lambda q, k, v: (attend(q, k, v, mask)[0] * weight).sum(), (0, 1, 2))(*half)
    q, k, v = half
    got = jax.jit(cudnn_gradients)(q, k, v, mask.segments(), weight)
    for name, a, b in zip("qkv", got, plain, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=0.03 * np.abs(b).max(), err_msg=name)


def test_what_a_flash_model_cannot_do_is_refused():
    config = OPTConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        ffn_dim=16,
        num_attention_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.1,
    )
    build = lambda **kwargs: OPTForCausalLM(config, rngs=nnx.Rngs(0), **kwargs)  # noqa: E731
    ids = np.ones((1, 4), np.int32)
    with pytest.raises(ValueError, match="output_attentions needs attn_implementation='xla'"):
        build(attn_implementation="splash")(ids, output_attentions=True)
    with pytest.raises(ValueError, match="no dropout on attention weights"):
        build(attn_implementation="splash")(ids, dropout_key=jax.random.key(0))
    with pytest.raises(ValueError, match="attn_implementation 'flash': choose one of xla"):
        build(attn_implementation="flash")
    with pytest.raises(ValueError, match="remat 'some': choose one of none"):
        build(remat="some")
    model = build(attn_implementation="splash")  # with a cache, attention is always plain
    cached = model(ids, cache=model.init_cache(1, 8)).logits
    np.testing.assert_allclose(cached, build()(ids).logits, rtol=1e-5)
