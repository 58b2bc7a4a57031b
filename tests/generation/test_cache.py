"""The cache gives back what was written, in order, from storage that does not move."""

import dataclasses

import pytest
import torch

from moebius.config import (
    DecoderConfig,
    DenseMlp,
    GroupedQueryAttention,
    LatentAttention,
    LayerConfig,
    RmsNorm,
    Rope,
    Yarn,
)
from moebius.errors import CapacityError
from moebius.generation import KeyValueCache
from moebius.generation.cache import cache_bytes_per_token
from moebius.layers.decoder import Decoder
from tests.families import randomize

NORM = RmsNorm(1e-6)
YARN = Rope(1e4, 8, interleaved=True, yarn=Yarn(40.0, 32, mscale=0.7, mscale_all_dim=1.3))
GROUPED = GroupedQueryAttention(4, 2, 16, Rope(1e4, 16), qkv_bias=True)
WINDOW = dataclasses.replace(GROUPED, sliding_window=8, sinks=True)
LATENT = LatentAttention(4, 24, 16, 12, 8, 10, YARN, NORM)
MIXERS = {
    "window-and-full": (WINDOW, dataclasses.replace(WINDOW, sliding_window=None), GROUPED),
    "two-windows": (WINDOW, dataclasses.replace(WINDOW, sliding_window=3)),
    "latent": (LATENT, dataclasses.replace(LATENT, q_lora_rank=None, v_head_dim=24, bias=True)),
    "all-kinds": (LATENT, WINDOW, GROUPED),
}


def decoder_of(mixers) -> Decoder:
    layers = tuple(LayerConfig(mixer, DenseMlp(48)) for mixer in mixers)
    made = Decoder(DecoderConfig("test", 64, 32, 256, layers, NORM))
    randomize(made, seed=3)
    return made.eval()


def cache_for(decoder, batch=2, capacity=60):
    cache = KeyValueCache.for_decoder(decoder.config, batch=batch, capacity=capacity, dtype=torch.float32, device="cpu")
    for layer in cache.layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    return cache


@pytest.fixture
def cache(decoder):
    return KeyValueCache.for_decoder(decoder.config, batch=2, capacity=10, dtype=torch.float32, device="cpu")


def write(cache, tokens, seed):
    states = torch.randn(2, 2, tokens, 32, generator=torch.Generator().manual_seed(seed))
    views = [layer.update(states + number, -states - number) for number, layer in enumerate(cache.layers)]
    cache.advance(tokens)
    return states, views


def test_each_layer_gives_all_so_far(cache):
    first, _ = write(cache, 4, seed=0)
    second, views = write(cache, 3, seed=1)
    whole = torch.cat([first, second], dim=2)
    for number, (keys, values) in enumerate(views):
        assert torch.equal(keys, whole + number)
        assert torch.equal(values, -whole - number)
    assert cache.length == 7


def test_storage_stays_where_it_is(cache):
    _, views = write(cache, 4, seed=0)
    before = views[0][0].data_ptr()
    _, views = write(cache, 1, seed=1)
    assert views[0][0].data_ptr() == before == cache.layers[0].keys.data_ptr()


def test_a_forward_that_never_advanced_leaves_no_trace(cache):
    first, _ = write(cache, 4, seed=0)
    cache.layers[0].update(torch.full((2, 2, 3, 32), 99.0), torch.full((2, 2, 3, 32), 99.0))
    second, views = write(cache, 2, seed=1)
    assert torch.equal(views[0][0], torch.cat([first, second], dim=2))


def test_a_cropped_cache_goes_on_from_there(cache):
    first, _ = write(cache, 6, seed=0)
    cache.crop(2)
    second, views = write(cache, 1, seed=1)
    assert torch.equal(views[1][0], torch.cat([first[:, :, :2], second], dim=2) + 1)
    with pytest.raises(ValueError, match="crop"):
        cache.crop(4)


def test_a_grown_cache_holds_the_same_tokens(cache):
    first, _ = write(cache, 6, seed=0)
    larger = cache.grown(20)
    second, views = write(larger, 8, seed=1)
    assert torch.equal(views[0][0], torch.cat([first, second], dim=2))
    assert (larger.capacity, larger.length, cache.length) == (20, 14, 6)


def test_a_full_cache_says_so(cache):
    write(cache, 9, seed=0)
    with pytest.raises(CapacityError, match=r"holds 10 .* 11 are needed"):
        write(cache, 2, seed=1)


def test_a_cache_that_cannot_be_had_names_the_bytes_of_a_token(decoder):
    assert cache_bytes_per_token(decoder.config, torch.float32) == 2 * 2 * 2 * 32 * 4
    with pytest.raises(CapacityError, match="1,024 bytes a token"):
        KeyValueCache.for_decoder(decoder.config, batch=2**20, capacity=2**30, dtype=torch.float32, device="cpu")


def test_unwritten_storage_is_never_read(decoder):
    """Poisoned with NaN, the cache gives the same logits."""
    cache, ids = cache_for(decoder, batch=1), torch.arange(3, 23)[None]
    with torch.no_grad():
        steps = [decoder(part, cache=cache).logits for part in ids.split(4, dim=1)]
        assert torch.allclose(torch.cat(steps, dim=1), decoder(ids).logits, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("mixers", MIXERS.values(), ids=MIXERS)
@pytest.mark.parametrize("chunks", [(1,) * 24, (24, 1, 1), (20, 30, 1, 9)], ids=["steps", "prompt", "chunks"])
def test_every_kind_of_layer_goes_on_from_it(mixers, chunks):
    decoder = decoder_of(mixers)
    cache, ids = cache_for(decoder), torch.randint(0, 64, (2, sum(chunks)))
    found = torch.cat([decoder(part, cache=cache).logits for part in ids.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(found, decoder(ids).logits, rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("mixers", MIXERS.values(), ids=MIXERS)
def test_left_padding_is_never_seen_by_any_kind_of_layer(mixers):
    decoder = decoder_of(mixers)
    cache, ids = cache_for(decoder, batch=1), torch.randint(0, 64, (1, 30))
    padded, mask = torch.cat([torch.full((1, 4), 63), ids], dim=1), torch.tensor([[0] * 4 + [1] * 30])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    parts = []
    for part in (slice(0, 25), slice(25, 33), slice(33, 34)):
        where = {"position_ids": positions[:, part], "cache": cache}
        parts.append(decoder(padded[:, part], mask[:, : part.stop], **where).logits)
    torch.testing.assert_close(torch.cat(parts, 1)[:, 4:], decoder(ids).logits, rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("mixers", MIXERS.values(), ids=MIXERS)
def test_every_kind_of_layer_can_be_cropped_and_grown(mixers):
    decoder = decoder_of(mixers)
    cache, ids = cache_for(decoder, capacity=24), torch.randint(0, 64, (2, 40))
    decoder(ids[:, :24], cache=cache)
    cache.crop(13)
    cache = cache.grown(40)
    found = decoder(ids[:, 13:], cache=cache).logits
    torch.testing.assert_close(found, decoder(ids).logits[:, 13:], rtol=0, atol=5e-5)


def test_a_latent_layer_keeps_its_latent_and_one_key():
    cache = cache_for(decoder_of([LATENT]))
    assert cache.layers[0].keys.shape == (2, 60, 1, 16)
    assert cache.layers[0].values.shape == (2, 60, 1, 8)


def test_the_bytes_of_a_token_are_those_of_its_tensors():
    config = decoder_of(MIXERS["all-kinds"]).config
    assert cache_bytes_per_token(config, torch.bfloat16) == 2 * ((16 + 8) + 2 * 2 * 16 + 2 * 2 * 16)
    deepseek_v3 = LatentAttention(128, 1536, 512, 128, 64, 128, YARN, NORM)
    layers = (LayerConfig(deepseek_v3, DenseMlp(1)),) * 61
    published = DecoderConfig("test", 1, 7168, 1, layers, NORM)
    assert cache_bytes_per_token(published, torch.bfloat16) == 61 * 576 * 2
